"""A real SIGKILL at every part of a save leaves the old checkpoint or the new one (never a part of one).

A child, forked from this warm process, counts the lines it executes in our files and in those of the standard library
that delete folders, and kills itself at the k-th. A save writes in small pieces here, so that kills fall inside files.
"""

import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from shoal.model import hf_files
from shoal.train import checkpoint, manifest
from shoal.train.checkpoint import Saver, newest

TRACED = (checkpoint.__file__, manifest.__file__, hf_files.__file__, shutil.__file__)


def write_model(weights: dict[str, torch.Tensor], folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    save_file(weights, folder / "model.safetensors")


def state(step: int) -> tuple[dict, dict, dict]:
    return (
        {"w": torch.full((30,), float(step))},
        {f"m{i}": torch.full((5000,), step + i / 8) for i in range(8)},
        {"step": step},
    )


def holds(found: checkpoint.Checkpoint, step: int) -> bool:
    weights = checkpoint.load_file(found.path / "model.safetensors")
    expected = state(step)
    same = all(torch.equal(t, expected[1][name]) for name, t in found.tensors().items())
    return same and torch.equal(weights["w"], expected[0]["w"]) and found.counters == expected[2]


def first_save_then_damaged_successor(root: Path) -> None:
    """Where a child starts: step 100 whole, and step 200 damaged by the disk, so that saving 200 replaces it."""
    saver = Saver(root, write_model, keep=2)
    for step in (100, 200):
        saver.save(step, *state(step))
    saver.close()
    (root / "step-000200/config.json").write_text("{")


def saves(root: Path) -> None:
    """What a child does: start (which cleans), replace 200, save 300 (which prunes 100), and again."""
    saver = Saver(root, write_model, keep=2)
    for step in (200, 300, 400):
        saver.save(step, *state(step))
    saver.close()


def child(root: Path, kill_at: int, done: int) -> None:
    """Run `saves`, SIGKILL at the `kill_at`-th line. Reports every finished save, and at the end the lines counted."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if frame.f_code.co_filename not in TRACED:
            return None
        lines += event == "line"
        if lines == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    threading.settrace(trace)
    sys.settrace(trace)
    saves(root)
    sys.settrace(None)
    os.write(done, str(lines).encode())


def run_child(root: Path, kill_at: int) -> tuple[int, str]:
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            child(root, kill_at, write)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as report:
        said = report.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said


def killed_everywhere(tmp_path: Path, points: int) -> list[int]:
    """Kill at `points` moments spread over the whole of `saves`; the step found after each."""
    template = tmp_path / "template"
    first_save_then_damaged_successor(template)
    whole = tmp_path / "whole"
    shutil.copytree(template, whole)
    code, lines = run_child(whole, kill_at=-1)
    assert code == 0 and int(lines) > points
    found = []
    for k in range(points):
        root = tmp_path / f"killed-{k}"
        shutil.copytree(template, root)
        at = 1 + k * int(lines) // points
        assert run_child(root, at)[0] == -signal.SIGKILL, f"line {at} of {lines}"
        found.append(check(root, at))
        shutil.rmtree(root)
    return found


def check(root: Path, at: int) -> int:
    """The newest whole checkpoint is right in every bit, nothing visible is a part, and the next save succeeds."""
    best, refused = newest(root)
    assert best and holds(best, best.step), f"line {at}"
    assert [r.path.name for r in refused] in ([], ["step-000200"]), f"line {at}: {refused}"
    assert not refused or (refused[0].why.startswith("config.json: cut") and best.step == 100)
    saver = Saver(root, write_model, keep=1)
    saver.save(500, *state(500))
    saver.close()
    assert [path.name for path in root.iterdir()] == ["step-000500"]
    return best.step


@pytest.mark.slow
def test_sigkill_at_12_points_of_a_save(tmp_path):
    found = killed_everywhere(tmp_path, 12)
    assert found == sorted(found) and found[0] == 100


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sigkill_at_200_points_of_a_save(tmp_path):
    found = killed_everywhere(tmp_path, 200)
    assert found == sorted(found) and set(found) >= {100, 200, 300}
