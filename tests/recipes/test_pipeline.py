"""Stages: done once, gone on with where they stopped, and never built on something else than before."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from shoal.errors import RunError
from shoal.recipes import _pipeline
from shoal.recipes._pipeline import Budget, Pipeline, Stopped
from shoal.recipes._teller import Teller
from shoal.run import Run


@dataclass(frozen=True)
class Config:
    lr: float = 0.1


BUDGET = Budget({"one": 0.25, "two": 0.5}, minutes=8)
SILENT = Teller(lambda words: None, lambda metrics: None)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    monkeypatch.setattr(_pipeline.page, "write", lambda path: path)
    (tmp_path / "base").write_text("weights")
    return Run.create("r1", tmp_path / "run", Config(), {}, ["shoal", "r1"])


def made(run: Run, calls: list, base: Path | None = None, stop: bool = False) -> Path:
    """Two stages; the second is built on the first."""
    p = Pipeline(run, BUDGET, SILENT, "cpu", 1)

    def work(its: Run, resume: bool) -> tuple[Path, dict]:
        calls.append((its.id, resume))
        if stop and its.id == "2_two":
            raise Stopped
        (its.path / "made").write_text(f"made in {its.id}")
        return its.path / "made", {"steps": 3}

    first = p.stage("one", "sft", Config(), [base or run.path.parent / "base"], work)
    return p.stage("two", "rl", Config(), [first], work)


def test_a_stage_is_done_once_and_leaves_a_line(run):
    calls = []
    assert made(run, calls) == made(run, calls) == run.path / "stages/2_two/made"
    assert calls == [("1_one", False), ("2_two", False)]
    one, two = run.pipeline()["stages"]
    assert one["minutes"]["predicted"] == 2 and one["facts"] == {"steps": 3} and one["state"] == "done"
    assert two["inputs"] == {one["output"]: one["sha256"]}


def test_a_stage_that_was_stopped_goes_on(run):
    calls = []
    with pytest.raises(Stopped):
        made(run, calls, stop=True)
    assert run.status()["state"] == "stopped" and run.pipeline()["stages"][1]["state"] == "running"
    made(run, calls)
    assert calls == [("1_one", False), ("2_two", False), ("2_two", True)]


def test_a_folder_without_settings_is_begun_anew(run):
    (run.path / "stages/1_one/logs").mkdir(parents=True)
    calls = []
    made(run, calls)
    assert calls[0] == ("1_one", False)


def test_a_failure_is_noted_in_both(run):
    p = Pipeline(run, BUDGET, SILENT, "cpu", 1)
    with pytest.raises(ZeroDivisionError):
        p.stage("one", "sft", Config(), [], lambda its, resume: 1 / 0)  # type: ignore[arg-type, return-value]
    assert {Run.open(path).status()["state"] for path in (run.path, run.path / "stages/1_one")} == {"failed"}


@pytest.mark.parametrize("changed", ["base", "run/stages/1_one/made"])
def test_other_inputs_or_outputs_are_refused(run, changed):
    made(run, [])
    (run.path.parent / changed).write_text("other weights")
    with pytest.raises(RunError, match="1_one of run, whose input or output changed"):
        made(run, [])


def test_minutes_are_shared_out_and_steps_are_everybodys():
    assert BUDGET.of("two") == {"minutes": 4.0, "steps": None} and "two 240 s" in str(BUDGET)
    assert Budget(BUDGET.shares, steps=3).of("two") == {"minutes": None, "steps": 3}
