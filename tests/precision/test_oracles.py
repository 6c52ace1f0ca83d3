"""What we write in few bits is, number by number, what others read: compressed-tensors and transformers."""

import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bench.parity import our_log_probs, random_config
from shoal.model import hf
from shoal.model.config import GQAConfig, ModelConfig
from shoal.model.hf_files import TensorFolder, read_json
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.precision import convert

FORMS = [("int8", None), ("int8", 32), ("int4", 32), ("int4", 64)]
LLAMA = replace(random_config("llama", 0), dim=64, hidden_dim=128, n_layers=2, tie_embeddings=False, rope_scaling=None)
LLAMA = replace(LLAMA, attention=GQAConfig(4, 2, 16))


def written(folder: Path, config: ModelConfig, form, group: int | None) -> Path:
    hf.save(Transformer(replace(config, init_std=0.1)).init_weights(0).set_dtype(torch.bfloat16), folder / "plain")
    convert.write(convert.Source(folder / "plain"), folder / "out", form, group)
    return folder / "out"


@pytest.mark.parametrize("form, group", FORMS)
def test_compressed_tensors_makes_the_same_numbers(tmp_path, form, group):
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor  # pyright: ignore
    from compressed_tensors.quantization import QuantizationConfig  # pyright: ignore

    config = replace(PRESETS["tiny"], hidden_dim=96)  # whose down-projection takes groups of 32
    if group == 64:
        config = replace(LLAMA, hidden_dim=96)
    folder = written(tmp_path, config, form, group)
    described = QuantizationConfig.model_validate(read_json(folder, "config.json")["quantization_config"])
    model, files = hf.load(folder, torch.bfloat16), TensorFolder(folder)
    state, compared = model.state_dict(), 0
    for piece in hf.own_pieces(model):
        module = piece.name.removesuffix(".weight")
        parts = {part: f"{module}.{part}" for part in ("weight_packed", "weight_scale", "weight_shape")}
        if parts["weight_packed"] in files.entries:
            scheme = scheme_of(described, module)
            theirs = PackedQuantizationCompressor.decompress({p: files.read(n) for p, n in parts.items()}, scheme)
            assert torch.equal(theirs["weight"], piece.of(state[piece.ours]))
            compared += 1
        else:
            assert matches(described.ignore, module) or re.search("norm|bias$|embed", module)
    assert compared >= 15


def scheme_of(described, module: str):
    """Theirs go by name before they go by class."""
    named = [s for s in described.config_groups.values() if matches(s.targets, module)]
    return named[0] if named else next(s for s in described.config_groups.values() if "Linear" in s.targets)


def matches(targets, module: str) -> bool:
    return any(target.startswith("re:") and re.match(target[3:], module) for target in targets)


def agrees(transformers: ModuleType, folder: Path, how: object) -> None:
    """Its log-probabilities with ours, of the same folder."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=how, dtype=torch.bfloat16)
    tokens_T = torch.arange(50)
    with torch.no_grad():
        logits = theirs.float()(tokens_T[None]).logits[0].log_softmax(-1)
    ours = our_log_probs(hf.load(folder, torch.bfloat16).float(), tokens_T)
    assert (ours - logits).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "form, group", FORMS[:2]
)  # it dequantises by one scheme; int4 folders have another for the head
def test_transformers_opens_packed_integers(tmp_path, form, group):
    pytest.importorskip("compressed_tensors")
    transformers = pytest.importorskip("transformers")
    folder = written(tmp_path, LLAMA, form, group)
    how = transformers.CompressedTensorsConfig(run_compressed=False)
    agrees(transformers, folder, how)


@pytest.mark.slow
def test_transformers_opens_official_fp8(tmp_path):
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    folder = written(tmp_path, replace(LLAMA, dim=256, hidden_dim=384), "fp8", None)
    how = transformers.FineGrainedFP8Config(dequantize=True)
    agrees(transformers, folder, how)
