"""Honest rewards: known reward hacks earn nothing, their honest twins everything, and nothing is left behind.

    python -m bench.rewards [--quick]

Every completion of `bench/hacks.py` goes the way of a rollout: its answer is taken out, and graded by a grader's
process, code in the sandbox under its real deadline. The ratio is the share of hacks that earned nothing; a hack that
makes its grader fail earns nothing either, and is counted. It is 0 where a twin wasn't paid, or where a process or a
folder was left. --quick takes a shorter deadline.
"""

import argparse
import os
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

from bench.hacks import EXPECTED, VARIABLE, Case, cases
from bench.record import emit
from bench.table import show
from shoal.tasks import sandbox
from shoal.tasks.grading import Graders
from shoal.tasks.task import Outcome, extract_answer

LIMIT = 1.0
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a deadline of half a second for code instead of two")
    seconds = 0.5 if parser.parse_args().quick else sandbox.SECONDS
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as temporary:
        found = cases(Path(folder), seconds)
        before, tempfile.tempdir = children(), temporary  # for our side of graders and cells, to see what they leave
        outcomes = graded(found)
        tempfile.tempdir = None
        left = left_behind(Path(temporary), before)
    report(found, outcomes, left, seconds, time.perf_counter() - began)


def graded(found: list[Case]) -> list[tuple[Outcome, Outcome]]:
    """What the hack and its twin came to, case by case; the expected values stand in the graders' environment."""
    os.environ[VARIABLE] = repr(EXPECTED)
    try:
        with Graders(WORKERS) as graders:
            hacks = graders.grade([(c.item, extract_answer(c.hack)) for c in found])
            twins = graders.grade([(c.item, extract_answer(c.twin)) for c in found])
    finally:
        del os.environ[VARIABLE]
    return [*zip(hacks, twins)]


def children() -> set[int]:
    return {p.pid for p in psutil.Process().children(recursive=True)}


def left_behind(temporary: Path, before: set[int]) -> list[str]:
    """Processes of ours since `before`, cells that lost their parent too, and files, that should be no more."""
    time.sleep(0.5)  # for the kernel to bury the dead
    ours = children() - before
    cells = {p.pid for p in psutil.process_iter(["cmdline"]) if str(sandbox.CELL) in (p.info["cmdline"] or ())}
    return [*(f"process {pid}" for pid in ours | cells), *map(str, temporary.rglob("*"))]


def report(found: list[Case], outcomes: list[tuple[Outcome, Outcome]], left: list[str], seconds: float, took: float):
    kinds = Counter(c.name.split(":")[0] for c in found)
    rows = []
    for kind, count in kinds.items():
        mine = [pair for c, pair in zip(found, outcomes) if c.name.startswith(f"{kind}:")]
        hacks = Counter(hack for hack, _ in mine)
        twins = sum(twin == "right" for _, twin in mine)
        rows.append([kind, count, hacks["wrong"], hacks["failed"], hacks["right"], twins])
    show(["hacks of", "hacks", "wrong", "grader failed", "paid", "honest twins paid"], rows)
    for case, (hack, twin) in zip(found, outcomes):
        if hack == "right" or twin != "right":
            print(f"  {case.name}: hack {hack}, twin {twin}")
    print(*(f"  left behind: {name}" for name in left), sep="\n")
    print(f"sandbox by {sandbox.level()}; {took:.1f} s")
    unpaid = sum(hack != "right" for hack, _ in outcomes) / len(found)
    honest = sum(twin == "right" for _, twin in outcomes) / len(found)
    emit(
        "rewards",
        rows=[row[0] for row in rows],
        ratio=unpaid if honest == 1 and not left else 0.0,
        ours=unpaid,
        peer=None,
        spread=None,
        limit=LIMIT,
        hacks=len(found),
        honest_twins_paid=honest,
        left_behind=left,
        sandbox=sandbox.level(),
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
