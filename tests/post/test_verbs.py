"""`shoal sft` as a user calls it."""

import json
import tomllib

import pytest

from shoal.cli import sft
from shoal.errors import ConfigError, DataError
from shoal.run import Run
from tests.post.talks import ROWS

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
