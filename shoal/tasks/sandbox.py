"""Where code that a model wrote may run: a fresh process with nothing to take, nowhere to go, and a deadline.

    with Cell(seconds=2.0) as cell:
        cell.run("def f(x): return x + 1")
        cell.call("f", (1,))                # 2

A cell starts from an interpreter of its own (nothing of ours is in its memory), gives up what `isolation.py` lists,
says what held, and only then is sent code. Its environment is empty, its folder is its own and removed after it, its
output is bounded. Expected answers stay outside: a cell gets arguments and gives back plain values (`plain.py`), built
anew on our side, so no equality, hash or class of its own comes along, and what it prints or how it exits says nothing.

The least that will do is seccomp together with files out of sight (a root of its own, Landlock, or bubblewrap, which is
taken where the kernel gives namespaces only to it). With less we refuse: `level` raises SandboxError.
"""

import json
import os
import selectors
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, get_args

from shoal.errors import SandboxError
from shoal.tasks import plain
from shoal.tasks.isolation import DEVICES, DISK, ROOM, SHARED_LIBRARIES

Means = Literal["namespaces", "bubblewrap", "landlock"]  # the best first
PYTHON = os.path.realpath(sys.executable)
CELL = Path(__file__).with_name("cell.py")
SECONDS = 2.0  # of a whole check, by the clock
START_SECONDS = 30.0  # for our own part of a cell, on a machine busy elsewhere
MEMORY = 512 * 2**20  # address space, bytes
MAX_REPLY = 2**18  # bytes of one reply


class Ended(Exception):
    """The cell is no more, or has done what no cell may: why, in words. The code's fault, whoever wrote it."""


class Raised(Exception):
    """The code raised: what, in words."""


class Cell:
    """One process for one answer; a context manager. `seconds` of clock time begin with the first request: how long it,
    or another cell beside it, took to start on a busy machine is not the code's fault.
    """

    def __init__(self, seconds: float = SECONDS, memory: int = MEMORY, means: Means | None = None):
        """Raises SandboxError where what held is too little. `means` None: as `level` found."""
        self.folder = tempfile.mkdtemp(prefix="shoal-cell-")
        self.reply = b""
        means = means or found().means
        paths = readable()
        settings = {
            "parent": os.getpid(),
            "means": means,
            "paths": paths,
            "seconds": int(seconds) + 2,
            "memory": memory,
        }
        command = [PYTHON, "-I", "-S", "-B", str(CELL), json.dumps(settings)]
        self.process = subprocess.Popen(
            [*(bubblewrap(paths) if means == "bubblewrap" else ()), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            env={},
            bufsize=0,
            start_new_session=True,
        )
        assert self.process.stdin and self.process.stdout
        self.requests, self.replies = self.process.stdin, self.process.stdout
        os.set_blocking(self.requests.fileno(), False)
        self.deadline = time.monotonic() + START_SECONDS
        try:
            self.held: list[str] = self.read()["held"]
        except (Ended, KeyError, TypeError) as e:
            self.close()
            raise SandboxError(f"a sandbox that didn't start: {e}", NEEDED, FIX) from e
        if "seccomp" not in self.held or not ("root" in self.held or any(h.startswith("landlock") for h in self.held)):
            self.close()
            raise SandboxError(f"isolation by {', '.join(self.held) or 'nothing'}", NEEDED, FIX)
        self.seconds, self.begun = seconds, False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def run(self, source: str, remote: Sequence[str] = ()) -> None:
        """Execute a program in the cell. Raises Raised, Ended."""
        self.write({"run": source, "remote": tuple(remote)})
        self.take("done")

    def call(self, name: str, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """The plain value of a function that the program defined. Raises Raised, Ended."""
        self.write({"call": name, "args": tuple(args), "kwargs": dict(kwargs or {})})
        return self.take("value")

    def take(self, what: str) -> Any:
        reply = self.read()
        if not isinstance(reply, dict) or len(reply) != 1:
            raise Ended("it replied nonsense")
        if "error" in reply:
            raise Raised(str(reply["error"])[:200])
        if what not in reply:
            raise Ended("it replied nonsense")
        return reply[what]

    def write(self, value: Any) -> None:
        if not self.begun:
            self.begun, self.deadline = True, time.monotonic() + self.seconds
        left = plain.dumps(value).encode() + b"\n"
        with suppress(BrokenPipeError), selectors.DefaultSelector() as selector:  # reading says that it ended
            selector.register(self.requests, selectors.EVENT_WRITE)
            while left:
                if not selector.select(self.seconds_left()):
                    raise Ended("ran out of time")
                left = left[os.write(self.requests.fileno(), left[:65536]) :]

    def read(self) -> Any:
        """The next reply, whatever plain value it is."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.replies, selectors.EVENT_READ)
            while b"\n" not in self.reply:
                if len(self.reply) > MAX_REPLY:
                    raise Ended("it wrote too much")
                if not selector.select(self.seconds_left()):
                    raise Ended("ran out of time")
                came = os.read(self.replies.fileno(), MAX_REPLY)
                if not came:
                    raise Ended("it exited")
                self.reply += came
        line, _, self.reply = self.reply.partition(b"\n")
        try:
            return plain.loads(line)
        except ValueError as e:
            raise Ended(f"it replied nonsense: {e}") from None

    def seconds_left(self) -> float:
        return max(0.0, self.deadline - time.monotonic())

    def close(self) -> None:
        """End every process of the cell, and remove its folder."""
        self.process.terminate()  # the first process kills the second, and waits for it
        try:
            self.process.wait(START_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()  # the second dies with it
            self.process.wait()
        self.requests.close()
        self.replies.close()
        shutil.rmtree(self.folder, ignore_errors=True)


NEEDED = "seccomp, and files out of sight by a root of its own, Landlock or bubblewrap"
FIX = "run it on Linux 5.13 or later (x86-64 or AArch64), install bubblewrap, or leave out tasks that run code"


@dataclass(frozen=True)
class Level:
    means: Means
    held: tuple[str, ...]


def level() -> str:
    """What isolation cells get here, in words, as a first cell found. Raises SandboxError where that is too little."""
    return f"{found().means}: {', '.join(found().held)}"


@cache
def found() -> Level:
    """By our own namespaces; by bubblewrap, where the kernel gives namespaces only to it; by Landlock and seccomp."""
    refused = SandboxError("no sandbox", NEEDED, FIX)
    for means in get_args(Means):
        if means != "bubblewrap" or shutil.which("bwrap"):
            try:
                with Cell(means=means) as cell:
                    return Level(means, tuple(cell.held))
            except SandboxError as e:
                refused = e
    raise refused


def readable() -> list[str]:
    """What a bare interpreter needs of the files: its library, the machine's shared libraries, three devices."""
    own = [os.path.realpath(os.path.dirname(os.__file__)), "/etc/ld.so.cache"]
    there = [path for path in (*SHARED_LIBRARIES, *DEVICES, *own) if os.path.exists(path)]
    return [p for p in there if not any(p != q and Path(p).is_relative_to(q) and not os.path.islink(q) for q in there)]


def bubblewrap(paths: Sequence[str]) -> list[str]:
    """Bubblewrap's command for the namespaces and the root of `isolation.py`."""
    binds: list[str] = []
    for path in paths:
        if os.path.islink(path):
            binds += ["--symlink", os.readlink(path), path]
        elif path.startswith("/dev/"):
            binds += ["--dev-bind", path, path]
        else:
            binds += ["--ro-bind", path, path]
    executable = shutil.which("bwrap")
    assert executable, "bubblewrap was there a moment ago"
    for path in (PYTHON, str(CELL.parent)):
        binds += ["--ro-bind", path, path]
    binds += ["--size", str(DISK), "--tmpfs", ROOM]
    return [executable, "--unshare-all", "--die-with-parent", *binds, "--chdir", ROOM, "--"]
