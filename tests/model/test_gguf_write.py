"""Files that we write, read by us and by the `gguf` package, whose rounding ours has to be."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.parity import random_config
from shoal.errors import ModelError
from shoal.model import hf
from shoal.model.config import YarnConfig
from shoal.model.gguf_config import settings_of
from shoal.model.gguf_file import GGUFFile
from shoal.model.gguf_write import FILE_TYPES, kind_of, q4_0, q8_0, write
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from tests.model.test_gguf import LLAMA, log_probs, random_model, readable, wide


def written(model: Transformer, path, weights: str, **settings):
    state = model.state_dict()
    said = settings_of(model.config, "x") | settings
    write(path, model.config, lambda piece: piece.of(state[piece.ours]), weights, said)
    return path


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("architecture", ["deepseek_v3", "deepseek_v2", "qwen2", "llama"])
def test_a_model_comes_back_as_it_was(tmp_path, architecture, seed):
    config = replace(readable(random_config(architecture, seed)), n_mtp=0)
    if isinstance(yarn := config.rope_scaling, YarnConfig):
        config = replace(config, rope_scaling=replace(yarn, mscale=0.707, mscale_all_dim=0.707))
    if architecture in ("qwen2", "llama"):
        scaling = LLAMA.rope_scaling if architecture == "llama" else None
        config = replace(config, rope_scaling=scaling, rope_theta=5e5)
    model = random_model(config)
    again = hf.load(written(model, tmp_path / "m.gguf", "f32"), torch.float32)
    assert again.config == config
    state = again.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("weights", FILE_TYPES)
def test_the_gguf_package_reads_what_we_read(tmp_path, weights):
    gguf = pytest.importorskip("gguf")
    model = random_model(replace(wide(PRESETS["tiny"]), n_mtp=0))
    path = written(model, tmp_path / "m.gguf", weights, words=["a", "漢"], n=np.array([1, -2], np.int32), yes=True)
    reader, ours = gguf.GGUFReader(path), GGUFFile(path)
    assert [t.name for t in reader.tensors] == list(ours.entries)
    for tensor in reader.tensors:
        e = ours.entries[tensor.name]
        assert (tensor.data_offset, tensor.tensor_type.name.lower()) == (e.start, e.kind.name.lower())
        assert tuple(tensor.shape[::-1]) == e.shape
    for key, value in ours.metadata.items():
        theirs = reader.get_field(key).contents()
        assert list(value) == theirs if isinstance(value, np.ndarray) else pytest.approx(value) == theirs, key
    assert torch.isfinite(log_probs(hf.load(path, torch.float32))).all()


@pytest.mark.parametrize("encode", [q8_0, q4_0])
def test_numbers_are_rounded_as_ggml_does(encode):
    gguf = pytest.importorskip("gguf")
    x = torch.randn(8, 96, generator=torch.Generator().manual_seed(0))
    x[0, :32], x[1, 32:64], x[2] = 0, torch.arange(32) * 127 / 31, -x[2]
    theirs = gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[encode.__name__.upper()])
    assert encode(x).flatten(1).numpy().tobytes() == theirs.tobytes()


def test_what_llama_cpp_cannot_say_is_refused():
    config = replace(PRESETS["tiny"], rope_scaling=YarnConfig(8.0, mscale=1.0, mscale_all_dim=0.0))
    with pytest.raises(ModelError, match="mscale 1 and mscale_all_dim 0"):
        settings_of(config, "x")
    with pytest.raises(ModelError, match="glm4_moe"):
        settings_of(random_config("glm4_moe", 0), "x")


def test_a_file_in_four_bits_has_eight_where_the_converter_has():
    of = {name: kind_of(f"{name}.weight", (64, 64), "q4_0") for name in ("output", "token_embd", "blk.0.attn_k_b")}
    assert set(of.values()) == {"q8_0"}
    assert kind_of("blk.0.attn_output.weight", (64, 64), "q4_0") == "q4_0"
