"""MODEL.gguf wherever a model is named, and OUT.gguf where one is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.cli import export, generate, plan, score
from shoal.cli.main import run_verb
from shoal.cli.opened import end_ids, open_model, turns_of
from shoal.data.tokenizer import Tokenizer
from shoal.engine import native
from shoal.errors import ConfigError, ModelError
from shoal.model import gguf_write, hf
from shoal.model.attend import Packed
from shoal.model.hf_files import read_json, write_json
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.precision.weights import QuantisedExperts, QuantisedLinear
from tests.model.test_gguf import wide

TEXT = "def add(a, b):\n    return a + b  # größer 漢字 🙂\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    tokenizer, path = Tokenizer.train([TEXT], 400), tmp_path_factory.mktemp("gguf") / "model"
    config = replace(wide(PRESETS["tiny"]), n_mtp=0, vocab_size=512, max_positions=512, init_std=0.2)
    hf.save(Transformer(config).init_weights(0), path, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    tokenizer.save(path)
    ends = [tokenizer.eos_id, 7]
    write_json(path / "generation_config.json", read_json(path, "generation_config.json") | {"eos_token_id": ends})
    return path


@pytest.fixture(scope="module")
def file(folder) -> Path:
    out = folder.with_name("model.gguf")
    assert export.main([str(folder), str(out), "--weights", "f32"]) == 0
    return out


def answered(capsys, verb, *argv) -> dict:
    assert verb.main([str(a) for a in argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_score_and_generate_are_the_folders(folder, file, tmp_path, capsys):
    (tmp_path / "text").write_text(TEXT[:300], encoding="utf-8")
    ours, theirs = (answered(capsys, score, m, "--text-file", tmp_path / "text", "--json") for m in (folder, file))
    assert ours == theirs
    asked = ("--prompt", "def add", "--max-tokens", 8, "--json", "--temperature", 0)
    one, other = (answered(capsys, generate, m, *asked) for m in (folder, file))
    assert one.pop("model") != other.pop("model") and one.keys() == other.keys()
    assert (one["text"], one["tokens"]) == (other["text"], other["tokens"])


def test_turns_end_where_they_did(folder, file):
    opened = open_model(str(file), "float32")
    assert set(end_ids(file, 512)) == set(end_ids(folder, 512)) == {opened.tokenizer.eos_id, 7}
    assert 7 in turns_of(opened).plain.ends
    assert opened.tokenizer.chat_template == Tokenizer.load(folder).chat_template


@pytest.mark.parametrize("weights", ["q8_0", "q4_0"])
def test_few_bits_stay_few(folder, tmp_path, weights, capsys):
    out = tmp_path / "small.gguf"
    assert export.main([str(folder), str(out), "--weights", weights]) == 0
    assert f"{weights}; llama.cpp doesn't know its tokenizer" in capsys.readouterr().out
    model = open_model(str(out), "bfloat16").model
    kept = [m for m in model.modules() if isinstance(m, (QuantisedLinear, QuantisedExperts))]
    assert len(kept) == 3 * 4 + 3 + 2 * 4 + 1
    again = tmp_path / "folder"
    assert export.main([str(out), str(again), "--dtype", "float32"]) == 0
    dense, source = hf.load(again, torch.float32).state_dict(), hf.load(out, torch.float32).state_dict()
    assert all(torch.equal(x, dense[name]) for name, x in source.items())
    assert Tokenizer.load(again).sha256 == Tokenizer.load(folder).sha256
    assert end_ids(again, 512) == end_ids(out, 512)


def test_gate_and_up_of_other_types_run_as_modules(folder, tmp_path, monkeypatch):
    path, uneven = tmp_path / "m.gguf", gguf_write.kind_of
    monkeypatch.setattr(gguf_write, "kind_of", lambda name, *a: "q8_0" if "ffn_up" in name else uneven(name, *a))
    export.main([str(folder), str(path), "--weights", "q4_0"])
    model = open_model(str(path), "bfloat16").model
    assert not native.takes(model)
    tokens = torch.arange(20, 50)
    assert model(tokens, torch.arange(30), Packed([30])).isfinite().all()


def test_a_file_becomes_a_folder_in_few_bits(folder, file, tmp_path, capsys):
    assert export.main([str(file), str(tmp_path / "int8"), "--weights", "int8"]) == 0
    assert export.main([str(folder), str(tmp_path / "same"), "--weights", "int8"]) == 0
    one, other = (hf.load(tmp_path / name, torch.float32).state_dict() for name in ("int8", "same"))
    assert all(torch.equal(x, other[name]) for name, x in one.items())
    asked = [str(file), "--prompt", "x", "--memory", "1GiB"]
    assert run_verb("generate", asked) == 2
    assert "shoal import" in capsys.readouterr().err


def test_a_plan_for_a_file_says_what_a_budget_needs_first(file, capsys):
    assert plan.main(["fit", str(file), "--ram", "1GiB"]) == 0
    assert f"--memory takes folders; first: shoal import {file} FOLDER" in capsys.readouterr().err


def test_what_a_file_cannot_be_is_said(folder, file, tmp_path, capsys):
    for argv, match in (
        (["x.gguf", "--weights", "int4"], "--weights int4 for a GGUF file"),
        (["x.gguf", "--dtype", "bfloat16"], "--dtype for a GGUF file"),
        (["x", "--weights", "q8_0"], "--weights q8_0 for a folder"),
        ([str(file), "--weights", "q8_0"], "exists"),
    ):
        with pytest.raises(ConfigError, match=match):
            export.main([str(folder), *argv])
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"bad.gguf"):
        open_model(str(tmp_path / "bad.gguf"), "float32")
    assert run_verb("score", [str(tmp_path / "none.gguf"), "--text-file", "x"]) == 2
    assert not list(Path().glob("*.gguf"))
