"""Tokens are written down before they are sent, so that a killed server still knows what it gave away.

An append-only file, one line a fact, cumulative counts:

    B {"id": …, "key": …, "prices": …}     a request was accepted
    T id prompt cached completion          so much of it may have been sent after this line
    E id                                   its row stands in the ledger

One `write` a turn of the event loop covers all streams; a write that has returned survives SIGKILL (a power cut may
take the last seconds; an fsync a token would cost more than it saves). A server holds a lock on its file; whoever
starts next reads the files that nobody holds, and settles what they left open. Row ids are the requests', so settling
twice is once.
"""

import fcntl
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TextIO

COMPACT_BYTES = 16 * 2**20


class Counts(NamedTuple):
    prompt: int = 0
    cached: int = 0
    completion: int = 0


class Journal:
    """Used on one thread. After an OSError nothing that was noted since the last `flush` may be sent."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.path = folder / f"{os.getpid()}-{secrets.token_hex(4)}.journal"
        self.file = locked(unfinished := self.path.with_suffix(".new"))
        os.rename(unfinished, self.path)  # locked before it has its name
        self.size = 0
        self.pending: list[str] = []
        self.open: dict[str, tuple[str, Counts]] = {}  # id: (its B line, counts)

    def begin(self, row: dict[str, Any]) -> None:
        line = f"B {json.dumps(row)}\n"
        self.open[row["id"]] = (line, Counts())
        self.pending.append(line)

    def note(self, request_id: str, counts: Counts) -> None:
        line, _ = self.open[request_id]
        self.open[request_id] = (line, counts)
        self.pending.append(tokens_line(request_id, counts))

    def end(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if self.open.pop(request_id, None) is not None:
                self.pending.append(f"E {request_id}\n")

    def probe(self) -> None:
        """A line that says nothing: can it be written?"""
        self.pending.append("P\n")

    def flush(self) -> None:
        """Raises OSError; what could be written of a line is taken back."""
        if not self.pending:
            return
        data = "".join(self.pending).encode()
        self.pending.clear()
        try:
            write(self.file, data)
        except OSError:
            cut(self.file, self.size)
            raise
        self.size += len(data)
        if self.size > COMPACT_BYTES:
            self.compact()

    def compact(self) -> None:
        """Only what is open, in a new file that takes the old one's place."""
        lines = [line + tokens_line(name, counts) for name, (line, counts) in self.open.items()]
        data = "".join(lines).encode()
        other = self.path.with_suffix(".new")
        new = locked(other)
        try:
            write(new, data)
            os.rename(other, self.path)
        except OSError:
            os.close(new)
            other.unlink(missing_ok=True)
            raise
        os.close(self.file)
        self.file, self.size = new, len(data)

    def close(self) -> None:
        """Nothing open: the file goes. Something open: it stays for the next start."""
        if self.file < 0:
            return
        if not self.open:
            self.path.unlink(missing_ok=True)
        os.close(self.file)
        self.file = -1


def tokens_line(request_id: str, counts: Counts) -> str:
    return f"T {request_id} {counts.prompt} {counts.cached} {counts.completion}\n"


def locked(path: Path) -> int:
    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND | os.O_CLOEXEC, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def cut(file: int, size: int) -> None:
    try:
        os.ftruncate(file, size)
    except OSError:
        return  # a device, or a file system gone read-only: the reader drops a torn line anyway


class Left(NamedTuple):
    """A request that a dead server left open."""

    row: dict[str, Any]
    counts: Counts


def orphans(folder: Path) -> Iterator[tuple[Path, TextIO]]:
    """Journals that no living server holds, open and locked by us until the next. Others may be at it meanwhile: a
    file that has lost its name since it was opened was replaced by its server, or settled."""
    for path in sorted(folder.glob("*.journal")):
        with suppress(FileNotFoundError, BlockingIOError), open(path, "r+", encoding="utf-8", errors="replace") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                yield path, file


def read(text: str) -> list[Left]:
    """What a journal holds open. A torn last line, which nobody was sent anything for, is dropped."""
    rows: dict[str, dict[str, Any]] = {}
    counts: dict[str, Counts] = {}
    for line in text[: text.rfind("\n") + 1].splitlines():
        kind, _, rest = line.partition(" ")
        if kind == "B":
            row = json.loads(rest)
            rows[row["id"]] = row
        elif kind == "T":
            name, *numbers = rest.split(" ")
            counts[name] = Counts(*map(int, numbers))
        elif kind == "E":
            rows.pop(rest, None)
    return [Left(row, counts.get(name, Counts())) for name, row in rows.items()]
