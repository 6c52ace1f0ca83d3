"""`shoal sft` and `shoal distill` as a user calls them."""

import json
import re
import tomllib

import pytest

from shoal.cli import distill, rl, sft
from shoal.errors import ConfigError, DataError
from shoal.model import hf
from shoal.run import Run
from tests.post.scripted import says, server
from tests.post.talks import ROWS, tokenizer

SMALL = ("--batch.context", "64", "--batch.samples", "2", "--threads", "1")


@pytest.fixture
def data(tmp_path):
    keys = ("prompt", "reasoning", "answer")
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps(dict(zip(keys, row))) for row in ROWS[:8]))
    return tmp_path / "talks.jsonl"


def test_a_file_is_learnt_and_the_run_goes_on(folder, data, tmp_path, capsys):
    words = [str(data), "--model", str(folder), "--out", str(tmp_path / "run"), *SMALL]
    assert sft.main([*words, "--dry-run"]) == 0 and not (tmp_path / "run").exists()
    assert "8 samples" in capsys.readouterr().out
    assert sft.main([*words, "--steps", "1"]) == 0
    config = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert config["model"] == str(folder) and config["epochs"] == "none"
    assert sft.main(["--resume", str(tmp_path / "run"), "--steps", "2"]) == 0
    run = Run.open(tmp_path / "run")
    assert [line["step"] for line in run.metrics()] == [1, 2] and run.status()["state"] == "done"
    assert "that learned its lessons" in (run.path / "report.html").read_text()
    with data.open("a") as file:
        file.write("\n" + json.dumps({"prompt": "a", "answer": "b"}))
    with pytest.raises(DataError, match="have changed"):
        sft.main(["--resume", str(tmp_path / "run"), "--steps", "3"])


def test_what_is_missing_is_said(folder, capsys):
    with pytest.raises(ConfigError, match="no model"):
        sft.main(["--data", "tasks:addition"])
    with pytest.raises(DataError, match="no data"):
        sft.main(["--model", str(folder)])
    with pytest.raises(ConfigError, match="no recipe 'stf'"):
        sft.main(["stf", "--model", str(folder)])
    assert sft.main(["--print-config", "--minutes", "3"]) == 0
    assert 'epochs = "none"  # flag' in capsys.readouterr().out


def test_a_dry_run_of_reinforcement_makes_no_run(folder, tmp_path, capsys):
    words = ["--model", str(folder), "--tasks", "chain_sum", "--steps", "3", "--out", str(tmp_path / "run")]
    assert rl.main([*words, "--dry-run"]) == 0 and not (tmp_path / "run").exists()
    assert "chain_sum" in (said := capsys.readouterr().out) and "3 steps" in said


def adds(body: dict, number: int):
    """Right about every problem but each fourth."""
    numbers = map(int, re.findall(r"\d+", body["messages"][0]["content"].partition("\n\n")[0]))
    return says(f"<answer>{sum(numbers) + (number % 4 == 3)}</answer>", "I added them.")


def test_a_preset_learns_what_a_url_says_and_nothing_is_asked_again(folder, tmp_path, capsys):
    with server(adds) as asked:
        words = ["--teacher", asked.url, "--endpoint.model", "oracle", "--endpoint.usd_out", "1000", "--samples", "2"]
        words += ["--student", "tiny", "--tokenizer", str(folder), "--prompts", "addition:4", "--steps", "1", *SMALL]
        out = tmp_path / "run"
        assert distill.main([*words, "--batch.samples", "4", "--out", str(out)]) == 0
        assert len(asked) == 8
        assert distill.main(["--resume", str(out), "--steps", "2"]) == 0
        assert len(asked) == 8
        assert all("<answer> and </answer>" in body["messages"][0]["content"] for body, *_ in asked)
    record = json.loads((out / "distill.json").read_text())
    assert record["verdicts"]["wrong"] == 2 and record["cost"]["usd"] == pytest.approx(8 * 20 / 1000)
    assert record["verdicts"]["kept"] + record["verdicts"]["duplicate"] == 6
    student = hf.load_config(out / "checkpoints" / "step-000002")
    assert student.vocab_size == tokenizer().vocab_size and student.n_layers == 3
    assert "$0.16" in capsys.readouterr().out


def test_a_model_here_judges_a_student(folder, tmp_path):
    out = str(tmp_path / "run")
    words = ["--teacher", str(folder), "--student", "tiny", "--prompts", "addition:4", "--samples", "1", "--group", "2"]
    words += ["--on-policy", "--sampling.max_tokens", "3", *SMALL, "--out", out]
    assert distill.main([*words, "--steps", "1"]) == 0
    assert Run.open(out).metrics()[0]["train/loss"] > 0 and Run.open(out).status()["state"] == "done"


def test_contradictions_are_said_before_anything_is_made(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    url = ["--teacher", "http://127.0.0.1:9/v1", "--prompts", "addition:4"]
    here = ["--teacher", str(folder), *url[2:], "--student", "tiny", "--on-policy", "--steps", "3"]
    (tmp_path / "asked.toml").write_text('answers = "a.jsonl"\nendpoint.model = "oracle"\nkeep.repeats = 8\n')
    for words, what in (
        ([*url], "no student"),
        ([*url, "--student", "tiny"], "a teacher whose tokenizer nobody knows"),
        ([*url, "--student", str(folder), "--on-policy", "--steps", "3"], "--on-policy with the teacher"),
        ([*url, "--student", str(folder)], "without a model"),
        ([*url[:2], "--prompts", "adition:4", "--student", str(folder)], "did you mean addition"),
        (["--teacher", str(folder), *url[2:], "--student", "tiny", "--on-policy"], "epochs 2 of samples"),
        ([*here, "--sampling.temperature", "0.6", "--keep.repeats", "2"], "with sampling.temperature, keep.repeats"),
        ([*here, "-c", "asked.toml"], "with answers, endpoint.model, of"),
    ):
        with pytest.raises(ConfigError, match=re.escape(what)):
            distill.main(words)
    assert not (tmp_path / "runs").exists()
