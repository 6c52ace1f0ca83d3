"""`shoal r1`, and which model a run with stages is."""

import json
import tomllib

import pytest

from shoal.cli import r1 as verb
from shoal.cli.opened import model_folder
from shoal.errors import CheckpointError, ConfigError
from shoal.recipes import _r1, r1
from shoal.run import Run
from shoal.train import manifest
from tests.post.conftest import folder  # noqa: F401
from tests.recipes.chained import SMALL


@pytest.fixture
def small(monkeypatch):
    for module, name, value in SMALL:
        monkeypatch.setattr(module, name, value)


def checkpoint(run: Run):
    path = run.checkpoints / "step-000001"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    manifest.seal(path, 1)
    return path


def test_a_run_with_stages_is_the_model_that_its_pipeline_names(tmp_path):
    run, stage = (
        Run.create("r1", path, r1.recipe(), {}, []) for path in (tmp_path / "run", tmp_path / "run/stages/5_r1")
    )
    base, reasoner = checkpoint(run), checkpoint(stage)
    assert model_folder(str(run.path)) == base
    (run.path / "pipeline.json").write_text(json.dumps({"stages": []}))
    assert model_folder(str(run.path)) == base
    (run.path / "pipeline.json").write_text(json.dumps({"stages": [], "model": "stages/5_r1"}))
    assert model_folder(str(run.path)) == reasoner and model_folder(str(base)) == base
    (reasoner / "config.json").write_text("changed")
    with pytest.raises(CheckpointError, match="no whole checkpoint"):
        model_folder(str(run.path))


def test_what_is_missing_is_said(capsys, folder):  # noqa: F811
    with pytest.raises(ConfigError, match="no model"):
        verb.main(["--minutes", "3"])
    with pytest.raises(ConfigError, match="task 'contdown'"):
        verb.main(["--model", str(folder), "--tasks", "contdown"])
    with pytest.raises(ConfigError, match="one of the two"):
        verb.main(["--model", str(folder), "--minutes", "3", "--steps", "3"])
    assert verb.main(["--model", str(folder), "--minutes", "10", "--dry-run"]) == 0
    assert "cold_start 60 s, reasoning 210 s" in capsys.readouterr().out
    assert verb.main(["--print-config", "--steps", "3", "--r1.judge.url", "http://x/v1"]) == 0
    printed = tomllib.loads(capsys.readouterr().out)
    assert printed["steps"] == 3 and printed["minutes"] == "none" and printed["r1"]["judge"]["url"] == "http://x/v1"


def test_a_resumed_run_keeps_its_settings(tmp_path, monkeypatch, folder):  # noqa: F811
    seen = []
    monkeypatch.setattr(_r1, "run_r1", lambda config, run, teller: seen.append(config) or 0)
    out = str(tmp_path / "run")
    assert verb.main(["--model", str(folder), "--steps", "2", "--reasoning.rollout.group", "4", "--out", out]) == 0
    assert verb.main(["--resume", out]) == 0
    assert seen[0] == seen[1] and seen[0].reasoning.rollout.group == 4 and seen[0].model == str(folder.resolve())
    with pytest.raises(ConfigError, match="differ from what"):
        verb.main(["--resume", out, "--reasoning.rollout.group", "8"])


@pytest.mark.slow
def test_a_base_becomes_r1(small, tmp_path, folder, capsys):  # noqa: F811
    out = str(tmp_path / "run")
    levels = ["--tasks", "addition", "--levels", "1", "--threads", "1", "--samples.problems", "4"]
    assert verb.main(["--model", str(folder), "--steps", "1", *levels, "--out", out]) == 0
    run = Run.open(out)
    assert [row["name"] for row in run.pipeline()["stages"]] == ["cold_start", "reasoning", "samples", "tuning", "r1"]
    assert model_folder(out).parent.parent.name == "5_r1" and (run.path / "report.html").exists()
    assert (run.evals / "problems.json").exists() and "next     shoal chat" in capsys.readouterr().out
