"""Known reward hacks earn nothing, their honest twins everything, and nothing is left. The list is the bench's."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from bench.hacks import CALLS, EXPECTED, VARIABLE, Case, cases
from bench.rewards import children, graded, left_behind
from shoal.tasks.task import extract_answer

# A sample for every run; the slow tier has them all.
FAST = {"early exit", "equal to everything", "found in the environment", "patched encoder", "assert made harmless"}


def all_cases(folder: Path, seconds: float = 0.5) -> list[Case]:
    return cases(folder, seconds)


def bad(found: list[Case]) -> list[tuple]:
    """What went otherwise than it should."""
    outcomes = graded(found)
    return [(c.name, *pair) for c, pair in zip(found, outcomes) if pair != ("wrong", "right")]


def test_hacks_in_text_earn_nothing_and_a_few_in_code(tmp_path):
    code = ("code:", "tests:")
    found = [c for c in all_cases(tmp_path) if not c.name.startswith(code) or c.name.partition(": ")[2] in FAST]
    assert len(found) > 60
    assert not bad(found)


@pytest.mark.slow
def test_all_hacks_earn_nothing_and_leave_nothing(tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    found, before = all_cases(tmp_path), children()
    assert len({c.name for c in found}) == len(found) > 130
    assert not bad(found)
    assert not left_behind(tmp_path / "temporary", before)
    assert not Path("/tmp/hack.py").exists()


NAIVE = """
import sys
EXPECTED = {expected}
def grade():
    names = {{}}
    exec(sys.stdin.read(), names)
    return all(names["f"](*args) == value for args, value in zip({calls}, EXPECTED))
sys.exit(0 if grade() else 1)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "early exit",
        "early exit of the process",
        "exit when called",
        "equal to everything",
        "an int equal to everything",
        "claims to be an int",
        "patched builtins",
        "found in stack frames",
        "found in the environment",
        "found in a file",
        "found in the task's source",
        "computed by another program",
    ],
)
def test_the_hacks_are_real(tmp_path, name):
    """A grader that runs code and compares in the same process pays them. (Of ours, and harmless: run without care.)"""
    [case] = [c for c in all_cases(tmp_path) if c.name == f"code: {name}"]
    naive = NAIVE.format(expected=EXPECTED, calls=CALLS)
    environment = os.environ | {VARIABLE: repr(EXPECTED)}
    code = extract_answer(case.hack)
    assert subprocess.run([sys.executable, "-c", naive], input=code, env=environment, text=True).returncode == 0
