"""The run directory: layout, lock, the record after kills and resumes, finding runs by name."""

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from shoal.config import from_toml
from shoal.errors import ResourceError, RunError
from shoal.run import Run, find, list_runs, replace_text


@dataclass(frozen=True)
class Config:
    lr: float = 0.1


@pytest.fixture
def run(tmp_path) -> Run:
    return new(tmp_path / "runs" / "2026-11-21_quickstart_k3f9")


def new(path: Path) -> Run:
    return Run.create("quickstart", path, Config(0.3), {"lr": "flag"}, ["shoal", "pretrain", "a b"])


def test_a_new_run_says_what_was_asked_and_where(run):
    assert from_toml(Config, (run.path / "config.toml").read_text()) == Config(0.3)
    assert json.loads((run.path / "config.origin.json").read_text()) == {"lr": "flag"}
    assert (run.path / "command.txt").read_text() == "shoal pretrain 'a b'\n"
    assert run.env()["versions"]["numpy"] and run.env()["cores"] >= 1
    assert run.status()["state"] == "created"
    assert all(folder.is_dir() for folder in (run.checkpoints, run.samples, run.evals, run.logs))


def test_a_directory_in_use_is_not_overwritten(run):
    with pytest.raises(RunError, match="isn't empty"):
        new(run.path)


def test_status_merges(run):
    run.status(state="training", step=3)
    assert run.status(step=4) == run.status()
    assert (run.status()["state"], run.status()["step"]) == ("training", 4)


def test_the_record_is_readable_while_it_grows(run):
    run.log(1, {"train/loss": 2.5, "train/tokens": 10})
    assert Run.open(run.path).metrics() == [{"step": 1, "train/loss": 2.5, "train/tokens": 10}]
    run.log(2, {"train/loss": math.nan})
    assert '"train/loss": null' in (run.path / "metrics.jsonl").read_text()
    assert math.isnan(run.metrics()[1]["train/loss"])
    assert run.series("train/tokens") == ([1], [10])


def test_a_torn_line_is_dropped_by_the_next_writer_and_ignored_by_readers(run):
    run.log(1, {"a": 1.0})
    run.close()
    with open(run.path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "a')
    assert [line["step"] for line in run.metrics()] == [1]
    again = Run.open(run.path)
    again.log(2, {"a": 2.0})
    assert [line["a"] for line in again.metrics()] == [1.0, 2.0]


def test_rewound_record_equals_that_of_an_uninterrupted_run(run, tmp_path):
    straight = new(tmp_path / "straight")
    values = [{"a": 0.1 * step, "n": step, "bad": math.inf} for step in range(6)]
    for step in range(6):
        straight.log(step, values[step])
    for step in (0, 1, 2, 3, 4):
        run.log(step, values[step])
    run.rewind(2)
    for step in (3, 4, 5):
        run.log(step, values[step])
    assert (run.path / "metrics.jsonl").read_bytes() == (straight.path / "metrics.jsonl").read_bytes()


HOLD = "import sys; from shoal.run import Run\nwith Run.open(sys.argv[1]).lock(): print('held', flush=True); input()"


def test_of_a_run_that_never_began_nothing_is_left(tmp_path):
    root = tmp_path / "runs"
    older, run = new(root / "older"), new(root / "newer")
    with pytest.raises(RunError), run.begun():
        raise RunError("a", "b", "c")
    assert not run.path.exists() and (root / "latest").resolve() == older.path
    with pytest.raises(RunError), older.begun():
        older.status(state="training")
        raise RunError("a", "b", "c")
    assert older.status()["state"] == "training"
    with pytest.raises(RunError), new(tmp_path / "alone" / "runs" / "only").begun():
        raise RunError("a", "b", "c")
    assert list((tmp_path / "alone" / "runs").iterdir()) == []


def test_a_second_launcher_is_refused_until_the_first_dies(run):
    """Fault 11, with a real kill."""
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout and first.stdout.readline() == "held\n"
    with pytest.raises(RunError, match=f"in use by process {first.pid}"), run.lock():
        pass
    first.kill()
    first.communicate()
    with run.lock():
        pass


def test_a_full_disk_keeps_the_old_file_and_says_so(tmp_path, monkeypatch):
    replace_text(tmp_path / "f", "old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ResourceError, match="No space left"):
        replace_text(tmp_path / "f", "new")
    assert [p.name for p in tmp_path.iterdir()] == ["f"] and (tmp_path / "f").read_text() == "old"


def full(*_):
    raise OSError(28, "No space left on device")


def test_runs_are_found_by_path_id_ends_and_latest(tmp_path):
    root = tmp_path / "runs"
    first, second = new(root / "2026-11-20_mini_aaaa"), new(root / "2026-11-21_mini_bbbb")
    second.status(created="2099-01-01")
    assert [r.id for r in list_runs(root)] == [second.id, first.id]
    assert (root / "latest").resolve() == second.path
    for name in (str(first.path), first.id, "2026-11-20", "aaaa"):
        assert find(name, root).id == first.id
    assert find("latest", root).id == second.id
    with pytest.raises(RunError, match="names 2 runs"):
        find("2026-11", root)
    with pytest.raises(RunError, match="did you mean 2026-11-20_mini_aaaa"):
        find("2026-11-20_mini_aaab", root)
    with pytest.raises(RunError, match="no runs yet"):
        find("latest", tmp_path)
