"""Graders: checks run in processes of their own, which are killed when they hang, die or babble.

    with Graders(workers=1, seconds=2.0) as graders:
        outcomes = graders.grade([(item, extract_answer(completion)), …])

A check may meet anything a model writes, and some are other people's code, so none runs in our process. A worker is a
fresh interpreter that lives on from one answer to the next (some 0.1 ms each) and is replaced when it must be killed.
What comes back from it is one short line, never a pickle: who takes over a worker can lie about the answer at hand and
do no more. (Checks that run a model's code do that in the sandbox, which can't lie either: `sandbox.py`.)

An outcome is `right`, `wrong`, or `failed` where the check raised, died or ran out of time: no evidence about the
model, and to be counted apart. `failures` has the last reason by task.
"""

import ctypes
import os
import pickle
import resource
import selectors
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Self

from shoal.tasks.task import Item, Outcome

MAX_ANSWER = 2**16  # characters; longer ones are wrong without being looked at
MAX_REPLY = 300  # bytes
MEMORY = 4 * 2**30  # address space of a worker, bytes
START_SECONDS = 60.0  # for a worker to start and import what a check needs, on a machine busy elsewhere
LOADED = b"loaded\n"  # the check is there and its time begins
PR_SET_PDEATHSIG = 1


class Graders:
    """A context manager; outside of it no worker runs. Not for several threads at once."""

    def __init__(self, workers: int = 1, seconds: float = 2.0):
        assert workers >= 1 and seconds > 0, (workers, seconds)
        self.seconds = seconds
        self.failures: dict[str, str] = {}
        self._size = workers
        self._workers: list[Worker] = []

    def __enter__(self) -> Self:
        self._workers = [Worker() for _ in range(self._size)]
        return self

    def __exit__(self, *_) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def grade(self, pairs: Sequence[tuple[Item, str | None]]) -> list[Outcome]:
        """Outcomes in the order of the pairs; None, and what is longer than MAX_ANSWER, is wrong."""
        assert self._workers, "graders work inside their `with` block"
        for slot, worker in enumerate(self._workers):
            if worker.pair is not None or worker.process.poll() is not None:  # left so by an interrupt, or dead
                self._replace(slot)
        outcomes: list[Outcome] = ["wrong"] * len(pairs)
        waiting = deque(i for i, (_, answer) in enumerate(pairs) if answer is not None and len(answer) <= MAX_ANSWER)
        with selectors.DefaultSelector() as selector:
            while waiting or selector.get_map():
                for slot, worker in enumerate(self._workers):
                    if waiting and worker.pair is None:
                        worker.begin(waiting.popleft(), pairs, self.seconds)
                        selector.register(worker.replies, selectors.EVENT_READ, slot)
                first = min(w.deadline for w in self._workers if w.pair is not None)
                ready = {key.data for key, _ in selector.select(max(0.0, first - time.monotonic()))}
                for slot, worker in enumerate(self._workers):
                    if worker.pair is not None and (slot in ready or time.monotonic() >= worker.deadline):
                        self._take(slot, slot in ready, pairs, outcomes, selector)
        return outcomes

    def _take(self, slot: int, ready: bool, pairs, outcomes: list[Outcome], selector: selectors.BaseSelector) -> None:
        """Note what a worker replied, or replace it where that is no reply."""
        worker = self._workers[slot]
        words = worker.read() if ready else "ran out of time"
        if words is None:  # the reply isn't whole yet
            return
        index, worker.pair = worker.pair, None
        assert index is not None
        selector.unregister(worker.replies)
        said, _, reason = words.partition(" ")
        if said not in ("right", "wrong", "failed"):
            self._replace(slot)
            said, reason = "failed", words
        if said == "failed":
            self.failures[pairs[index][0].task] = reason
        outcomes[index] = said

    def _replace(self, slot: int) -> None:
        self._workers[slot].kill()
        self._workers[slot] = Worker()


class Worker:
    """One process. `pair` is the index of what it grades, None while it rests."""

    def __init__(self):
        path = os.pathsep.join(p for p in sys.path if p)
        self.folder = tempfile.mkdtemp(prefix="shoal-grader-")  # what a killed worker leaves goes with it
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shoal.tasks.grading", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(os.environ, PYTHONPATH=path, OMP_NUM_THREADS="1", TMPDIR=self.folder),
            bufsize=0,
            start_new_session=True,  # Ctrl-C is the parent's to answer
        )
        assert self.process.stdin and self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        self.pair: int | None = None
        self.seconds = self.deadline = 0.0
        self.reply = b""

    def begin(self, index: int, pairs: Sequence[tuple[Item, str | None]], seconds: float) -> None:
        item, answer = pairs[index]
        payload = pickle.dumps((item.check, answer))
        self.pair, self.reply = index, b""
        self.seconds, self.deadline = max(seconds, item.seconds), time.monotonic() + START_SECONDS
        with suppress(BrokenPipeError):  # it died; reading says so
            self.requests.write(struct.pack("<Q", len(payload)) + payload)

    def read(self) -> str | None:
        """The reply's one line; None while it is not whole; what is none of ours where the worker is lost."""
        came = os.read(self.replies.fileno(), MAX_REPLY + 1)
        self.reply += came
        if not came:
            return f"died with status {self.process.wait()}"
        if self.reply.startswith(LOADED):
            self.reply = self.reply.removeprefix(LOADED)
            self.deadline = time.monotonic() + self.seconds
        if len(self.reply) > MAX_REPLY or b"\n" in self.reply[:-1]:
            return "wrote more than its reply"
        return self.reply.decode(errors="replace").rstrip("\n") if self.reply.endswith(b"\n") else None

    def kill(self) -> None:
        """It, and what it started in its session."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.requests.close()
        self.replies.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def serve(parent: int) -> None:
    """A worker's whole life: read a check and an answer, reply with a line."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    requests, replies = os.fdopen(os.dup(0), "rb"), os.dup(1)
    quiet = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):  # checks print, ask and warn to no one
        os.dup2(quiet, fd)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    while header := requests.read(8):
        payload = requests.read(struct.unpack("<Q", header)[0])
        os.write(replies, outcome(payload, partial(os.write, replies, LOADED)).encode()[: MAX_REPLY - 1] + b"\n")


def outcome(payload: bytes, loaded: Callable[[], object]) -> str:
    """The line that a worker replies: the outcome, and after `failed` why. `loaded` is called before the check."""
    try:
        check, answer = pickle.loads(payload)
        loaded()
        verdict = check(answer.strip())
        return "right" if verdict is True else "wrong" if verdict is False else f"failed said {verdict!r}, no verdict"
    except Exception as e:  # whatever a check raises is the check's failure, and the next one's none
        return "failed " + " ".join(f"{type(e).__name__}: {e}".split())


if __name__ == "__main__":
    serve(int(sys.argv[1]))
