"""A folder written in few bits: what it holds, that reading gives back what was made, and at what size."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.errors import ConfigError
from shoal.model import hf
from shoal.model.hf_files import TensorFolder
from shoal.model.hf_names import Piece
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.ops import quant
from shoal.precision import convert, weights
from shoal.precision.weights import QuantisedExperts, QuantisedLinear

FORMS = [("fp8", None), ("int8", None), ("int8", 32), ("int4", 32)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    hf.save(Transformer(replace(PRESETS["tiny"], init_std=0.1)).init_weights(0).set_dtype(torch.bfloat16), folder)
    return folder


@pytest.mark.parametrize("form, group", FORMS)
def test_every_matrix_is_read_as_it_was_made(plain, tmp_path, form, group):
    source = convert.Source(plain)
    convert.write(source, tmp_path / "out", form, group, max_shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    stored, seen = hf.opened(tmp_path / "out", torch.bfloat16)[1], 0
    for piece in source.pieces:
        how = convert.kept(piece, form, group)
        assert stored.in_few_bits(piece) == (how is not None), piece
        if how:
            read, made = stored.quantised(piece), source.rounded(piece, how)
            assert read.form == made.form and read.block == made.block
            assert torch.equal(read.codes.view(torch.uint8), made.codes.view(torch.uint8))
            assert torch.equal(read.scales, made.scales)
            seen += 1
    assert seen > 90


@pytest.mark.parametrize("form, group", FORMS)
def test_high_precision_stays_what_it_was(plain, tmp_path, form, group):
    convert.write(convert.Source(plain), tmp_path / "out", form, group)
    before, after = hf.load(plain).state_dict(), weights.load(tmp_path / "out").state_dict()
    high = {name for name in before if name.endswith(("norm.weight", "router.weight", "router.bias", "proj.weight"))}
    assert len(high) > 20
    for name in {*high, "embed.weight"}:
        assert torch.equal(before[name], after[name]), name
    kept_up = torch.equal(before["layers.0.attn.kv_up.weight"], after["layers.0.attn.kv_up.weight"])
    assert kept_up == (form != "fp8")
    assert ("head.weight" in after) == (form == "fp8")


def test_leaves_of_integers(plain, tmp_path):
    convert.write(convert.Source(plain), tmp_path / "out", "int4", 32)
    model = weights.load(tmp_path / "out")
    head, experts = model.get_submodule("head"), model.get_submodule("mtp.0.block.ffn.experts")
    assert isinstance(head, QuantisedLinear) and head.weight.form == "int8"
    assert isinstance(experts, QuantisedExperts) and {m.form for m in experts.gate + experts.down} == {"int4"}
    assert type(model.get_submodule("mtp.0.proj")).__name__ == "Linear"


def test_a_folder_in_few_bits_is_a_source_too(plain, tmp_path):
    convert.write(convert.Source(plain), tmp_path / "fp8", "fp8", None)
    convert.write(convert.Source(tmp_path / "fp8"), tmp_path / "int8", "int8", None)
    state = hf.load(tmp_path / "fp8", torch.float32).state_dict()
    piece = Piece("model.layers.0.self_attn.o_proj.weight", "layers.0.attn.out.weight", (64, 64))
    found = hf.opened(tmp_path / "int8", torch.bfloat16)[1].quantised(piece)
    assert torch.equal(found.codes, quant.quantise(state[piece.ours], "int8", 64).codes)


def test_rows_that_are_no_whole_groups_take_smaller_ones_or_are_refused(tmp_path):
    config = replace(PRESETS["tiny"], hidden_dim=96)
    hf.save(Transformer(config).init_weights(0), tmp_path / "plain")
    source = convert.Source(tmp_path / "plain")
    down = next(p for p in source.pieces if p.ours == "layers.0.ffn.down.weight")
    assert convert.kept(down, "int4", 64) == convert.kept(down, "int4", 32) == ("int4", 32)
    with pytest.raises(ConfigError, match="rows of 40"):
        convert.kept(replace(down, shape=(64, 40)), "int4", 32)


def test_the_config_is_deepseeks(plain, tmp_path):
    convert.write(convert.Source(plain), tmp_path / "out", "fp8", None)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    published = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert raw["model_type"] == "deepseek_v3" and raw["quantization_config"] == published
    entries = TensorFolder(tmp_path / "out").entries
    scale = entries["model.layers.3.mlp.experts.7.down_proj.weight_scale_inv"]
    assert scale.dtype == torch.float32 and scale.shape == (1, 1)
    assert entries["model.layers.0.self_attn.kv_b_proj.weight"].dtype == torch.float8_e4m3fn
    assert entries["model.layers.3.eh_proj.weight"].dtype == torch.bfloat16
