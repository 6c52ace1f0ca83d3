"""A folder opened in the form it is stored in is the model it stands for, and what it maps is looked after."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.parity import constant, our_log_probs, random_config, write_fp8
from shoal.errors import ModelError, StorageError
from shoal.model import hf
from shoal.model.hf_files import TensorFolder, write_safetensors
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.precision import weights
from shoal.precision.weights import QuantisedExperts, QuantisedLinear

TOKENS = torch.randint(0, 160, (40,), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fp8(tmp_path) -> Path:
    hf.save(Transformer(replace(PRESETS["tiny"], init_std=0.1)).init_weights(0), tmp_path / "plain")
    write_fp8(tmp_path / "plain", tmp_path / "fp8", block=16, seed=0)
    return tmp_path / "fp8"


@pytest.mark.parametrize("architecture", ["deepseek_v3", "deepseek_v2", "qwen2"])
def test_official_fp8_in_its_own_form_is_the_dequantised_model(tmp_path, architecture):
    model = Transformer(random_config(architecture, 1)).init_weights(1)
    hf.save(model, tmp_path / "plain")
    write_fp8(tmp_path / "plain", tmp_path / "fp8", block=16, seed=1)
    kept, plain = weights.load(tmp_path / "fp8", torch.float32), hf.load(tmp_path / "fp8", torch.float32)
    assert (our_log_probs(kept, TOKENS) - our_log_probs(plain, TOKENS)).abs().max() < 1e-5


def test_leaves_are_in_few_bits_and_the_rest_is_not(fp8):
    model = weights.load(fp8)
    kinds = {name: type(module) for name, module in model.named_modules()}
    assert kinds["layers.0.attn.q_up"] is kinds["mtp.0.block.attn.out"] is QuantisedLinear
    assert kinds["layers.1.ffn.experts"] is QuantisedExperts
    state = model.state_dict()
    assert state["layers.0.attn.kv_up.weight"].dtype == state["head.weight"].dtype == torch.bfloat16
    assert state["layers.1.ffn.router.weight"].dtype == torch.float32


def test_what_is_mapped_takes_no_memory(fp8):
    model = weights.load(fp8, mapped=True)
    with open(f"/proc/{os.getpid()}/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if str(fp8) in line]
    ((start, end),) = [(int(a, 16), int(b, 16)) for a, b in spans]
    experts = model.get_submodule("layers.1.ffn.experts")
    assert isinstance(experts, QuantisedExperts)
    assert all(start <= gate.codes.data_ptr() < end for gate in experts.gate)


def test_what_was_read_needs_its_files_no_more(fp8):
    (model, files), mapped = weights.opened(fp8, torch.float32, "cpu"), weights.load(fp8, torch.float32, mapped=True)
    before = our_log_probs(mapped, TOKENS)
    os.truncate(fp8 / "model.safetensors", 64)
    files.unchanged()
    assert torch.equal(our_log_probs(model, TOKENS), before)


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float32, torch.bfloat16])
def test_scales_that_are_powers_of_two_are_read_in_any_dtype(fp8, dtype):
    files, raw = TensorFolder(fp8), json.loads((fp8 / "config.json").read_text())
    expected, planned = {}, []
    for name in files.entries:
        value = files.read(name)
        if name.endswith("_scale_inv"):
            value = expected[name] = torch.exp2(torch.arange(value.numel()) % 7 - 9.0).view(value.shape).to(dtype)
        planned.append(constant(name, value))
    write_safetensors(fp8 / "model.safetensors", planned)
    raw["quantization_config"]["scale_fmt"] = "ue8m0"
    (fp8 / "config.json").write_text(json.dumps(raw))
    leaf = weights.load(fp8).get_submodule("layers.1.attn.out")
    assert isinstance(leaf, QuantisedLinear)
    assert torch.equal(leaf.weight.scales, expected["model.layers.1.self_attn.o_proj.weight_scale_inv"].float())
    none = torch.full((4, 4), torch.nan).to(dtype)
    broken = [constant(p.name, none) if "1.self_attn.o_proj.weight_s" in p.name else p for p in planned]
    write_safetensors(fp8 / "model.safetensors", broken)
    with pytest.raises(ModelError, match="not finite and above zero"):
        weights.load(fp8)


def test_a_plain_folder_opens_as_ever(tmp_path):
    model = Transformer(PRESETS["tiny"]).init_weights(0)
    hf.save(model, tmp_path / "model")
    loaded = weights.load(tmp_path / "model", torch.float32).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("change", ["cut", "write"])
def test_a_file_that_changes_under_us_is_noticed(fp8, change):
    _, files = weights.opened(fp8, torch.bfloat16, "cpu", mapped=True)
    files.unchanged()
    file = fp8 / "model.safetensors"
    if change == "cut":
        os.truncate(file, file.stat().st_size - 1)
    else:
        with open(file, "r+b") as f:
            f.seek(-1, os.SEEK_END)
            f.write(b"\1")
        os.utime(file, ns=(0, 0))  # a clock too coarse to see two writes in a row
    with pytest.raises(StorageError, match="was changed while it was in use"):
        files.unchanged()
    assert isinstance(files, TensorFolder)
    with pytest.raises(StorageError, match="was changed while it was in use"):
        files.read("model.norm.weight")


def test_a_file_that_is_replaced_stays_what_it_was(fp8):
    model, files = weights.opened(fp8, torch.float32, "cpu", mapped=True)
    before = our_log_probs(model, TOKENS)
    os.replace(fp8 / "config.json", fp8 / "model.safetensors")
    files.unchanged()
    assert torch.equal(our_log_probs(model, TOKENS), before)
