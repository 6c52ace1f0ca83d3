"""Folders survive the round trip bit by bit, under DeepSeek's names, in the memory of the model plus one tensor."""

import json
import logging
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from bench.parity import fp8_difference, random_config, write_fp8
from shoal.errors import ModelError
from shoal.model import hf
from shoal.model.hf_files import Planned, TensorFolder, write_safetensors
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer

TINY = PRESETS["tiny"]


def random_model(config=TINY, dtype=torch.float32) -> Transformer:
    model = Transformer(config).init_weights(0).set_dtype(dtype)
    for name, buffer in model.named_buffers():
        buffer.normal_(0, 1, generator=torch.Generator().manual_seed(len(name)))
    return model


def equal(a: Transformer, b: Transformer) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def rewrite(folder, change) -> None:
    """Rewrite model.safetensors after `change` did what it wants to the dict of its tensors."""
    files = TensorFolder(folder)
    tensors = {name: files.read(name) for name in files.entries}
    change(tensors)
    planned = [Planned(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()]
    write_safetensors(folder / "model.safetensors", planned)


@pytest.mark.parametrize("shard", [10**9, 60_000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folder_brings_the_model_back_bit_by_bit(tmp_path, shard, dtype):
    model = random_model(dtype=dtype)
    hf.save(model, tmp_path, max_shard_bytes=shard)
    again = hf.load(tmp_path, dtype)
    assert again.config == TINY and equal(model, again)
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in again.named_parameters()}


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3", "glm4_moe", "qwen2", "llama"])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_architecture_comes_back(tmp_path, architecture, seed):
    config = random_config(architecture, seed)
    model = random_model(config)
    hf.save(model, tmp_path)
    state = hf.load(tmp_path, torch.float32)
    assert state.config == replace(config, max_positions=1024)
    if architecture != "deepseek_v2":  # whose router has no bias to keep
        assert equal(model, state)


def test_names_are_the_published_ones(tmp_path):
    hf.save(random_model(), tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    layer = "model.layers.1."
    for name in (
        "q_a_proj",
        "q_a_layernorm",
        "q_b_proj",
        "kv_a_proj_with_mqa",
        "kv_a_layernorm",
        "kv_b_proj",
        "o_proj",
    ):
        assert f"{layer}self_attn.{name}.weight" in names
    for name in ("gate.e_score_correction_bias", "experts.7.down_proj.weight", "shared_experts.up_proj.weight"):
        assert f"{layer}mlp.{name}" in names
    module = "model.layers.3."
    for name in ("embed_tokens", "enorm", "hnorm", "eh_proj", "shared_head.norm", "shared_head.head", "mlp.gate"):
        assert f"{module}{name}.weight" in names


def test_gate_and_up_keep_their_places(tmp_path):
    model = random_model()
    hf.save(model, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    stacked = model.state_dict()["layers.1.ffn.experts.gate_up"]
    gate, up = (tensors[f"model.layers.1.mlp.experts.5.{n}_proj.weight"] for n in ("gate", "up"))
    assert torch.equal(torch.cat([gate, up]), stacked[5])


def test_export_to_bf16_leaves_the_router_bias_in_fp32(tmp_path):
    hf.save(random_model(), tmp_path, dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for n, t in tensors.items() if n.endswith("correction_bias")} == {torch.float32}
    assert {t.dtype for n, t in tensors.items() if not n.endswith("correction_bias")} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_generation_config_says_how_to_stop_and_sample(tmp_path):
    hf.save(random_model(), tmp_path, bos_id=3, eos_id=5)
    expected = {"bos_token_id": 3, "eos_token_id": 5, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == expected


def test_a_module_embedding_that_is_no_copy_is_refused(tmp_path):
    hf.save(random_model(), tmp_path)
    rewrite(tmp_path, lambda t: t["model.layers.3.embed_tokens.weight"].add_(1))
    with pytest.raises(ModelError, match=r"layers\.3\.embed_tokens\.weight differs"):
        hf.load(tmp_path, torch.float32)


def test_dropped_modules_are_believed_and_said(tmp_path, caplog):
    model = random_model()
    hf.save(model, tmp_path)
    rewrite(tmp_path, lambda t: [t.pop(n) for n in list(t) if n.startswith("model.layers.3.")])
    with caplog.at_level(logging.WARNING):
        again = hf.load(tmp_path, torch.float32)
    assert again.config == replace(TINY, n_mtp=0) and "files hold 0" in caplog.text


def test_a_tied_head_may_stand_in_the_files(tmp_path):
    config = random_config("llama", 1)
    assert config.tie_embeddings
    model = random_model(config)
    hf.save(model, tmp_path)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    again = hf.load(tmp_path, torch.float32)
    assert again.head.weight is again.embed.weight and equal(model, again)
    rewrite(tmp_path, lambda t: t["lm_head.weight"].mul_(2))
    with pytest.raises(ModelError, match=r"lm_head\.weight differs"):
        hf.load(tmp_path, torch.float32)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_fp8_folders_equal_dequantising_by_hand(tmp_path, seed):
    assert fp8_difference(random_config("deepseek_v3", seed), seed, tmp_path) == 0.0


def test_fp8_in_bf16_rounds_once(tmp_path):
    hf.save(random_model(), tmp_path / "plain")
    expected = write_fp8(tmp_path / "plain", tmp_path / "fp8", block=16, seed=0)
    name = "model.layers.0.mlp.down_proj.weight"
    found = hf.load(tmp_path / "fp8", torch.bfloat16).state_dict()["layers.0.ffn.down.weight"]
    assert torch.equal(found, expected[name].bfloat16())


def test_both_spellings_of_rotary_settings_are_read():
    config = random_config("deepseek_v3", 0)
    old = hf.to_hf_config(config)
    new = {k: v for k, v in old.items() if not k.startswith("rope_")}
    new["rope_parameters"] = {k: v for k, v in old["rope_scaling"].items() if k != "type"} | {
        "rope_theta": old["rope_theta"]
    }
    assert hf.read_config(new) == hf.read_config(old) == config


def test_deepseeks_own_auto_map_is_not_followed():
    published = {"auto_map": {"AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"}}
    assert hf.read_config(hf.to_hf_config(TINY) | published) == TINY


PEAK = """
import resource, sys, torch
from dataclasses import replace
from pathlib import Path
from shoal.model import hf
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

folder, what = Path(sys.argv[1]), sys.argv[2]
if what == "write":
    hf.save(Transformer(replace(PRESETS["tiny"], vocab_size=65536, dim=256, n_layers=30)).init_weights(0), folder)
else:
    small = Path(sys.argv[3])
    hf.save(Transformer(PRESETS["tiny"]).init_weights(0), small)
    hf.load(small, torch.float32)  # what reading costs once
    if what == "load":
        before = peak()
        hf.load(folder, torch.float32)
    else:
        model = hf.load(folder, torch.float32)
        before = peak()
        hf.save(model, small / "again", dtype=torch.bfloat16)
    print(peak() - before)
"""


@pytest.mark.slow
def test_memory_peaks_at_the_model_plus_one_tensor(tmp_path):
    def measure(what: str) -> int:
        command = [sys.executable, "-c", PEAK, tmp_path / "big", what, tmp_path / what]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout or 0)

    measure("write")
    files = TensorFolder(tmp_path / "big")
    sizes = {n: e.end - e.start for n, e in files.entries.items()}
    model = sum(s for n, s in sizes.items() if "layers.30.embed_tokens" not in n and "shared_head.head" not in n)
    largest, noise = max(sizes.values()), 12 * 2**20
    assert largest > 4 * noise
    assert measure("load") < model + largest + noise
    assert measure("save") < largest + noise
