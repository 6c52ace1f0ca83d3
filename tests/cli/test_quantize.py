"""quantize and export --weights, as a user calls them; what they write opens wherever a model is named."""

import json
import os
import signal
import subprocess
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.cli import export, generate, quantize, score
from shoal.cli.opened import check_room, open_model, open_to_train
from shoal.data.tokenizer import Tokenizer
from shoal.engine.engine import LocalEngine
from shoal.engine.request import Request
from shoal.errors import ConfigError, DataError, ModelError, ResourceError
from shoal.model import hf
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.precision import weights
from shoal.precision.weights import QuantisedLinear

TEXT = "def add(a, b):\n    return a + b  # größer 漢字 🙂\n" * 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path, tokenizer = tmp_path_factory.mktemp("quantize") / "model", Tokenizer.train([TEXT], 400)
    model = Transformer(replace(PRESETS["tiny"], vocab_size=512, init_std=0.1)).init_weights(0)
    hf.save(model.set_dtype(torch.bfloat16), path, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    tokenizer.save(path)
    (path.parent / "text.py").write_text(TEXT, encoding="utf-8")
    return path


def call(verb, *argv) -> None:
    assert verb.main([str(a) for a in argv]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fp8", "int8", "int4"])
def test_what_is_written_opens_wherever_a_model_is_named(folder, tmp_path, form, capsys):
    group = ["--group", 32] if form == "int4" else []
    call(quantize, folder, "--weights", form, *group, "--calibrate", "none", "--tokens", 0, "--out", tmp_path / "q")
    call(export, folder, tmp_path / "e", "--weights", form, *group, "--max-shard-size", "1GB")
    for path in sorted((tmp_path / "q").iterdir()):
        assert path.read_bytes() == (tmp_path / "e" / path.name).read_bytes(), path.name
    capsys.readouterr()
    asked = ["--prompt", "def", "--max-tokens", "4", "--temperature", "0", "--json", "--dtype", "bfloat16"]
    call(generate, tmp_path / "q", *asked)
    assert len(json.loads(capsys.readouterr().out)["tokens"]) == 4
    call(score, tmp_path / "q", "--text-file", folder.parent / "text.py", "--json")
    found = json.loads(capsys.readouterr().out)["bits_per_byte"]
    call(score, folder, "--text-file", folder.parent / "text.py", "--json")
    assert found == pytest.approx(json.loads(capsys.readouterr().out)["bits_per_byte"], rel=0.05)


def test_served_in_few_bits_and_trained_without(folder, tmp_path):
    call(export, folder, tmp_path / "q", "--weights", "int8")
    kept, whole = open_model(str(tmp_path / "q"), "bfloat16"), open_to_train(str(tmp_path / "q"), "float32")
    assert isinstance(kept.model.get_submodule("layers.0.attn.out"), QuantisedLinear)
    assert whole.model.state_dict()["layers.0.attn.out.weight"].dtype == torch.float32


def test_the_memory_a_folder_needs_is_that_of_its_few_bits(folder, tmp_path):
    call(export, folder, tmp_path / "q", "--weights", "int4", "--group", 32)
    few, plain = (weights.n_bytes(*hf.opened(path, torch.bfloat16)) for path in (tmp_path / "q", folder))
    assert plain == sum(t.nbytes for t in hf.load(folder).state_dict().values())
    model = weights.load(tmp_path / "q")
    held = sum(t.nbytes for t in model.state_dict().values())
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            held += module.weight.nbytes
        elif isinstance(module, weights.QuantisedExperts):
            held += sum(m.nbytes for m in (*module.gate, *module.up, *module.down))
    assert few == held < 0.5 * plain
    with pytest.raises(ResourceError, match="GiB"):
        check_room(2**60, "bfloat16")


@pytest.mark.slow
def test_a_report_stands_beside_the_model(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantize, "stdlib", lambda source: Library(source))
    calibrated = ["--calibrate", folder.parent / "text.py", "--tokens", 512]
    call(quantize, folder, "--weights", "int4", "--group", 32, *calibrated, "--out", tmp_path / "q")
    found = json.loads((tmp_path / "q" / "quality.json").read_text())
    assert found["weights"] == "int4" and found["group"] == 32 and 0 < found["kl"] < 1
    assert 0.13 < found["matrices_share_of_fp32"] < 0.15 and found["share_of_fp32"] < 0.5
    assert (tmp_path / "q" / "quality.md").read_text() in capsys.readouterr().out
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


class Library:
    """A corpus of one text, held out."""

    def __init__(self, source: Path):
        import numpy as np

        self.tokenizer = Tokenizer.load(source)
        self.val = type("Split", (), {"tokens": np.array(self.tokenizer.encode(TEXT))})


@pytest.mark.parametrize(
    "flags, error",
    [
        (["--weights", "fp8", "--group", "32"], ConfigError),
        (["--weights", "int8", "--calibrate", "library"], ConfigError),
        (["--weights", "int4", "--tokens", "0"], ConfigError),
        (["--weights", "int4", "--tokens", "10"], ConfigError),
        (["--weights", "int4", "--calibrate", "nowhere.txt"], DataError),
    ],
)
def test_settings_that_do_not_go_together(folder, tmp_path, flags, error):
    with pytest.raises(error):
        quantize.main([str(folder), "--out", str(tmp_path / "q"), *flags])
    assert not (tmp_path / "q").exists() and not list(tmp_path.iterdir())


def test_a_text_whose_states_do_not_fit_in_memory_is_refused(folder, tmp_path, monkeypatch):
    text = tmp_path / "text"
    text.write_text(TEXT * 4)
    monkeypatch.setattr("shoal.runtime.free_bytes", lambda: 512 * 64 * 20 - 1)  # a window's, less a byte
    with pytest.raises(ResourceError, match="512 tokens"):
        quantize.calibration(folder, str(text), 512, 64, None)
    monkeypatch.setattr("shoal.runtime.free_bytes", lambda: 512 * 64 * 20)
    assert quantize.calibration(folder, str(text), 512, 64, None)


def test_rows_too_short_for_a_group_are_said(folder, tmp_path, capsys):
    call(export, folder, tmp_path / "q", "--weights", "int4", "--group", 64)
    assert "31 matrices, whose rows are no whole groups, in smaller ones" in capsys.readouterr().out


def test_a_folder_that_is_there_is_left_alone(folder, tmp_path):
    with pytest.raises(ConfigError, match="not empty"):
        quantize.main([str(folder), "--weights", "fp8", "--out", str(tmp_path.parent)])
    with pytest.raises(ModelError):
        quantize.main([str(tmp_path), "--weights", "fp8", "--out", str(tmp_path / "q")])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_who_is_asked_to_end_while_writing_leaves_nothing(tmp_path, number):
    def unheard(*_):
        raise AssertionError("by default the process ends here, and what it wrote stays")

    before = signal.signal(number, unheard)
    try:
        with pytest.raises(SystemExit) as e, export.whole_output(tmp_path / "out") as part:
            part.mkdir()
            (part / "model.safetensors").write_bytes(bytes(100))
            signal.raise_signal(number)
        assert e.value.code == 128 + number and signal.getsignal(number) is unheard
    finally:
        signal.signal(number, before)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_one_left_goes_with_the_next_one(tmp_path):
    gone, others = subprocess.Popen(["true"]), [".out.1", ".out.x", ".out2.99", "out.99"]
    gone.wait()
    for name in (f".out.{gone.pid}", *others):
        (tmp_path / name).mkdir()
        (tmp_path / name / "part").touch()
    with export.whole_output(tmp_path / "out") as part:
        part.write_bytes(b"whole")
    assert {path.name for path in tmp_path.iterdir()} == {"out", *others}


def test_a_folder_that_is_written_to_while_it_is_used_answers_nothing_wrong(folder, tmp_path):
    call(export, folder, tmp_path / "q", "--weights", "int8")
    opened = open_model(str(tmp_path / "q"), "bfloat16")
    file = tmp_path / "q" / "model.safetensors"
    with closing(LocalEngine(opened.model, 2**22, unchanged=opened.unchanged)) as engine:
        (before,) = engine.generate([Request((0, 5, 6), 4, print)])
        with open(file, "r+b") as f:
            f.seek(-1, 2)
            f.write(b"\1")
        os.utime(file, ns=(0, 0))
        (after,) = engine.generate([Request((0, 5, 6), 4, print)])
    assert len(before.tokens) == 4 and before.error is None
    assert not after.tokens and "could not be read" in str(after.error)
