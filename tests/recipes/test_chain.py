"""The quickstart's chain, tiny: every stage leaves what it should; a killed chain ends as if it never was."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shoal.cli import quickstart as verb
from shoal.cli.opened import model_folder
from shoal.run import Run
from tests.recipes.chained import SMALL

ROOT = Path(__file__).parents[2]
STAGES = ("1_r1_zero", "2_cold_start", "3_reasoning", "4_samples", "5_tuning", "6_r1", "7_teaching", "8_student")


@pytest.fixture
def small(monkeypatch):
    for module, name, value in SMALL:
        monkeypatch.setattr(module, name, value)


def words(path: Path, *more: str) -> list[str]:
    return ["--steps", "2", "--threads", "1", "--out", str(path), *more]


def made(path: Path) -> dict[str, bytes]:
    """Everything a chain ends with that must not depend on how often it was killed."""
    names = ("model.safetensors", "lessons.jsonl", "problems.json", "problems.jsonl")
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*")) if f.name in names}


@pytest.mark.slow
def test_every_stage_is_a_run_and_the_model_is_r1(small, tmp_path, capsys):
    run = Run(tmp_path / "run")
    assert verb.main(words(run.path)) == 0
    table, said = run.pipeline(), capsys.readouterr().out
    assert [row["folder"] for row in table["stages"]] == [f"stages/{name}" for name in STAGES]
    assert {row["state"] for row in table["stages"]} == {"done"} and run.status()["state"] == "done"
    for row in table["stages"]:
        assert (run.path / row["output"]).exists() and (run.path / row["folder"] / "config.toml").exists()
        assert all((run.path / source).exists() for source in row["inputs"])
    assert model_folder(str(run.path)).parts[-3:-1] == ("6_r1", "checkpoints")
    assert list(table["models"]) == ["base", "R1-Zero", "R1", "student"]
    asked = set()
    for at in table["models"].values():
        found = run.path / Path(at).parent.parent / "evals"
        lines = [json.loads(line) for line in (found / "problems.jsonl").read_text().splitlines()]
        asked.add(tuple(line["prompt"] for line in lines))
        assert json.loads((found / "problems.json").read_text())["format"] >= 0
    assert len(asked) == 1, "the same problems for all"
    assert said.index("stage    1_r1_zero") < said.index("stage    8_student") < said.index("next     shoal chat")
    before = made(run.path)
    assert verb.main(["--resume", str(run.path)]) == 0 and made(run.path) == before


@pytest.mark.slow
@pytest.mark.multiprocess
def test_killed_in_every_stage_it_ends_bit_equal(small, tmp_path):
    assert verb.main(words(tmp_path / "whole")) == 0
    path = tmp_path / "killed"
    started = words(path)
    for name in STAGES:
        folder = path / "stages" / name
        marks = [folder / "metrics.jsonl", folder / "answers.jsonl"]
        process = launched(started)
        while process.poll() is None and not any(mark.exists() and mark.stat().st_size for mark in marks):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, f"{name} was over before it was killed"
        started = ["--resume", str(path)]
    assert launched(started).wait() == 0
    assert made(path) == made(tmp_path / "whole")


def launched(argv: list[str]) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.recipes.chained", *argv]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
