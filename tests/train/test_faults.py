"""Whole runs, killed and resumed, end bit-equal to one that was never stopped. Real processes, real signals.

Checkpoints are asked for at every step, so kills fall into saves too.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.train.checkpoint import newest

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

STEPS = 16
PRETRAIN = [sys.executable, "-m", "shoal.cli.main", "pretrain"]
PATIENCE_SECONDS = 120
OF_THE_CLOCK = ("time/", "speed/", "memory/", "cost/")  # metrics that differ between equal runs


def start(out: Path) -> subprocess.Popen:
    return spawn(["tiny", "--out", str(out), "--steps", str(STEPS), "--checkpoint.steps", "1"])


def resume(out: Path) -> subprocess.Popen:
    return spawn(["--resume", str(out)])


def spawn(words: list[str]) -> subprocess.Popen:
    return subprocess.Popen([*PRETRAIN, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == code, said
    return said


def until(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    """Wait for something to happen in the run's folder; the process must not end before."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.001)


def logged(out: Path) -> list[dict]:
    path = out / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def last_step(out: Path) -> int:
    return max((line["step"] for line in logged(out)), default=0)


def outcome(out: Path) -> tuple[dict[str, bytes], dict, list[dict]]:
    """All that must not depend on having been stopped: every byte of the last checkpoint, the position, the record."""
    found, refused = newest(out / "checkpoints")
    assert found and found.step == STEPS and not refused
    apart = ("manifest.json", "counters.json")  # hold the seconds trained
    paths = (path for path in sorted(found.path.rglob("*")) if path.is_file() and path.name not in apart)
    files = {path.relative_to(found.path).as_posix(): path.read_bytes() for path in paths}
    counters = {name: value for name, value in found.counters.items() if name != "seconds"}
    record = [{k: v for k, v in line.items() if not k.startswith(OF_THE_CLOCK)} for line in logged(out)]
    return files, counters, record


def assert_same_outcome(out: Path, uninterrupted: Path) -> None:
    files, counters, record = outcome(out)
    expected_files, expected_counters, expected_record = outcome(uninterrupted)
    assert files.keys() == expected_files.keys()
    assert [name for name in files if files[name] != expected_files[name]] == []
    assert counters == expected_counters
    assert record == expected_record


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(start(out))
    assert [line["step"] for line in logged(out) if "train/loss" in line] == list(range(1, STEPS + 1))
    return out


def test_two_runs_are_bit_equal(tmp_path, uninterrupted):
    finish(start(tmp_path / "again"))
    assert_same_outcome(tmp_path / "again", uninterrupted)


def test_sigkill_before_the_first_step_and_between_steps(tmp_path, uninterrupted):
    """Killed as soon as the run exists, then after every fifth step, each time resumed."""
    out = tmp_path / "killed"
    process = start(out)
    until(process, (out / "config.toml").exists)
    process.kill()
    finish(process, -signal.SIGKILL)
    for step in (1, 6, 11):
        process = resume(out)
        until(process, lambda step=step: last_step(out) >= step)
        process.kill()
        finish(process, -signal.SIGKILL)
    finish(resume(out))
    assert_same_outcome(out, uninterrupted)


def test_sigkill_inside_a_save(tmp_path, uninterrupted):
    """Killed while the hidden folder of a save stands: of the first, and of one that has predecessors."""
    out = tmp_path / "killed"
    process = start(out)
    for whole in (0, 1):
        until(process, lambda whole=whole: bool(hidden(out)) and len(visible(out)) >= whole)
        process.kill()
        finish(process, -signal.SIGKILL)
        process = resume(out)
    finish(process)
    assert_same_outcome(out, uninterrupted)


def hidden(out: Path) -> list[Path]:
    return list((out / "checkpoints").glob(".step-*"))


def visible(out: Path) -> list[Path]:
    return sorted((out / "checkpoints").glob("step-*"))


def test_sigkill_while_the_finished_run_is_scored_and_reported(tmp_path, uninterrupted):
    out = tmp_path / "killed"
    process = start(out)
    until(process, (out / "evals/held_out.json").exists)
    process.kill()
    finish(process, -signal.SIGKILL)
    finish(resume(out))
    assert_same_outcome(out, uninterrupted)
    assert (out / "receipt.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_saves_and_stops(tmp_path, uninterrupted, number):
    out = tmp_path / "stopped"
    process = start(out)
    until(process, lambda: last_step(out) >= 4)
    process.send_signal(number)
    said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode >= 0 and number.name in said
    found, refused = newest(out / "checkpoints")
    assert found and not refused and found.step == last_step(out) < STEPS
    assert "--resume" in said
    finish(resume(out))
    assert_same_outcome(out, uninterrupted)


def test_the_second_signal_quits_and_nothing_is_lost(tmp_path, uninterrupted):
    out = tmp_path / "quit"
    process = start(out)
    until(process, lambda: last_step(out) >= 4)
    process.send_signal(signal.SIGINT)
    time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGINT
    finish(resume(out))
    assert_same_outcome(out, uninterrupted)


def test_of_two_launchers_one_is_refused(tmp_path, uninterrupted):
    out = tmp_path / "shared"
    first = start(out)
    until(first, lambda: last_step(out) >= 1)
    first.send_signal(signal.SIGSTOP)  # it can't finish before the second one comes
    second = resume(out)
    assert f"in use by process {first.pid}" in finish(second, 2)
    first.send_signal(signal.SIGCONT)
    finish(first)
    assert_same_outcome(out, uninterrupted)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_continues(tmp_path, uninterrupted):
    out = tmp_path / "damaged"
    process = start(out)
    until(process, lambda: len(visible(out)) >= 2)
    process.kill()
    finish(process, -signal.SIGKILL)
    path = visible(out)[-1] / "train_state/state.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    said = finish(resume(out))
    assert path.parent.parent.name in said and "state.safetensors: flipped" in said
    assert_same_outcome(out, uninterrupted)


def test_every_checkpoint_damaged_is_an_error_and_not_a_fresh_start(tmp_path):
    out = tmp_path / "damaged"
    process = start(out)
    until(process, lambda: len(visible(out)) >= 1)
    process.kill()
    finish(process, -signal.SIGKILL)
    for path in visible(out):
        (path / "config.json").unlink()
    said = finish(resume(out), 2)
    assert "config.json: missing" in said and "fix: " in said
