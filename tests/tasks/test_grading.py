import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from shoal.tasks.catalog import TASKS
from shoal.tasks.grading import MAX_ANSWER, Graders
from shoal.tasks.task import Item, draw

ROOT = Path(__file__).parent.parent.parent


def behave(how: str, answer: str) -> bool:
    if answer != "bad":
        return answer == "good"
    match how:
        case "raises":
            raise ValueError("no idea")
        case "exits":
            sys.exit(0)
        case "dies":
            os._exit(0)
        case "hangs":
            time.sleep(1000)
        case "hangs, holding every thread":
            pow(7, 10**9)
        case "takes no signals":
            for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, lambda *_: None)
            while True:
                pass
        case "floods":
            for fd in range(20):
                threading.Thread(target=os.write, args=(fd, b"right\n" * 100_000), daemon=True).start()
            time.sleep(1000)
        case "prints":
            print("right\n" * 10_000, flush=True)
            sys.stderr.write("right\n")
            return False
        case "takes memory":
            return len(bytearray(10**12)) > 0
        case "recurses":
            return behave(how, answer)
        case "says yes":
            return 1  # pyright: ignore[reportReturnType]
    raise AssertionError(how)


def item(how: str) -> Item:
    return Item("test", 1, "", "", "", partial(behave, how), how)


@pytest.fixture(scope="module")
def graders():
    with Graders(seconds=0.15) as found:
        yield found


@pytest.mark.parametrize(
    ("how", "outcome", "reason"),
    [
        ("raises", "failed", "ValueError: no idea"),
        ("exits", "failed", "died"),
        ("dies", "failed", "died with status 0"),
        ("hangs", "failed", "ran out of time"),
        ("hangs, holding every thread", "failed", "ran out of time"),
        ("takes no signals", "failed", "ran out of time"),
        ("floods", "failed", ""),
        ("prints", "wrong", ""),
        ("takes memory", "failed", "MemoryError"),
        ("recurses", "failed", "RecursionError"),
        ("says yes", "failed", "said 1"),
    ],
)
def test_a_check_that_misbehaves_costs_its_own_answer_only(graders, how, outcome, reason):
    graders.failures.clear()
    pairs = [(item(how), answer) for answer in ("good", "bad", "good", "other", None)]
    assert graders.grade(pairs) == ["right", outcome, "right", "wrong", "wrong"]
    assert reason in graders.failures.get("test", "")


def test_outcomes_keep_the_order_of_the_pairs_whatever_the_workers():
    quick = [task for task in TASKS.values() if not task.seconds]
    items = [draw(quick, 0, i, "train") for i in range(60)]
    pairs = [(it, it.answer if i % 3 else "nothing of the kind") for i, it in enumerate(items)]
    with Graders(workers=2) as graders:
        assert graders.grade(pairs) == ["right" if i % 3 else "wrong" for i in range(60)]
        assert graders.grade([]) == []


def test_answers_too_long_are_wrong_unseen_and_space_around_them_is_none(graders):
    good = item("raises")
    assert graders.grade([(good, " good\n"), (good, "g" * (MAX_ANSWER + 1))]) == ["right", "wrong"]


def test_a_killed_worker_is_replaced_and_none_is_left_behind():
    with Graders() as graders:
        first = graders._workers[0].process.pid
        os.kill(first, signal.SIGKILL)
        graders._workers[0].process.wait()
        assert graders.grade([(item("raises"), "good")]) == ["right"]
        second = graders._workers[0].process.pid
        assert second != first
    assert not psutil.pid_exists(second)


CODE = """
import sys
from shoal.tasks.grading import Graders
from shoal.tasks.programs import Returns
from shoal.tasks.task import Item
item = Item("t", 1, "", "", "", Returns("f", ((1,),), (1,), 60.0), "c", 90.0)
with Graders() as graders:
    print("up", flush=True)
    graders.grade([(item, "import time; time.sleep(100)")])
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("killed", ["ourselves", "the grader"])
def test_a_cell_does_not_outlive_its_grader_nor_that_us(killed, tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    us = subprocess.Popen([sys.executable, "-c", CODE], stdout=subprocess.PIPE, env=environment, cwd=ROOT)
    family = []
    while len(family) < 3:  # the grader, and the cell's two processes
        time.sleep(0.05)
        family = psutil.Process(us.pid).children(recursive=True)
    victim = family[0] if killed == "the grader" else psutil.Process(us.pid)
    victim.kill()
    us.wait(20)
    deadline = time.monotonic() + 10
    while alive := [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)
    assert killed == "ourselves" or not list(tmp_path.iterdir())
