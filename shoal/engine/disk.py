"""The prefix cache's second floor: full pages in files, found again after they fell out of memory, and after a restart.

    engine's thread    copies each full page out once, asks what there is, takes in a few pages a step that were read
    reader's thread    reads them
    writer's thread    writes them, evicts the longest unused above the bound, looks through the folder at the start

Pages are written when they are full, not when memory evicts them: the copy costs the same (LOG.md), and a server that
is killed has lost only what was waiting to be written. Nobody waits for the writer; where it can't keep up, pages are
left out, and offered again by the next stream that uses them.

A file's name is a hash of the page's key and of all that its numbers depend on: weights, code, dtype, layers. Files of
other models are never found and fall out as the longest unused. A file is a SHA-256 and the page's bytes, renamed into
place when whole; one that is cut, flipped or renamed is dropped when it is read. A write that fails, as on a full disk,
or a read that takes for ever, as on one that hangs, switches the floor off with one line in the log; requests never
notice. Nothing is synced: after a power cut some files may be damaged, and those are found out.

Pages tell what was in the prompts they were made of, so the folder is for its owner only.
"""

import fcntl
import hashlib
import logging
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from secrets import token_hex
from threading import Lock, Thread

import torch
from torch import Tensor

from shoal.engine.pages import Key
from shoal.errors import ResourceError
from shoal.model.gguf_file import parts

MOST_WAITING = 2**26  # bytes that may wait to be written
NAME, UNFINISHED = re.compile(r"[0-9a-f]{32}"), ".new"
DIGEST = 32
CLOSE_SECONDS = 10.0  # to write what is waiting

log = logging.getLogger(__name__)


class Disk:
    """`maker` names what the numbers depend on. One folder belongs to one engine at a time."""

    def __init__(self, folder: Path, max_bytes: int, maker: str):
        """Raises ResourceError where the folder can't be had."""
        self.folder, self.max_bytes, self.maker = folder, max_bytes, maker
        self.off = False
        self._files: OrderedDict[str, int] = OrderedDict()  # sizes by name, longest unused first
        self._bytes = 0
        self._waiting: set[str] = set()  # to be written
        self._lock = Lock()  # guards the three above
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._reads: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._own = own(folder)
        self._jobs.put(self._look)
        self._writer = Thread(target=self._work, name="disk writer", daemon=True)
        self._reader = Thread(target=self._read_on, name="disk reader", daemon=True)
        self._writer.start()
        self._reader.start()

    def depends_on(self, *facts: object) -> None:
        """What is in pages depends on these, too."""
        self.maker = hashlib.sha256(repr((self.maker, *facts)).encode()).hexdigest()

    @property
    def pages(self) -> int:
        return len(self._files)

    def has(self, key: Key) -> bool:
        return not self.off and self._name(key) in self._files

    def fetch(self, keys: Sequence[Key], n: int) -> "Future[list[Tensor]]":
        """Have these pages read, up to the first that isn't whole."""
        future: Future[list[Tensor]] = Future()
        self._reads.put(partial(self._fetch, future, keys, n))
        return future

    def read(self, key: Key, n: int) -> Tensor | None:
        """The page's `n` bytes [n] uint8; None, and gone for good, where they are not what was written."""
        name, data = self._name(key), bytearray(DIGEST + n + 1)
        try:
            with open(self.folder / name, "rb", buffering=0) as file:
                whole = file.readinto(data) == DIGEST + n
        except OSError:
            whole = False
        page = memoryview(data)[DIGEST:-1]
        if not whole or digest(name, page) != data[:DIGEST]:
            log.warning("a page in the cache folder is damaged; it is dropped")
            self.drop([key])
            return None
        return torch.frombuffer(page, dtype=torch.uint8)

    def wants(self, key: Key, n: int) -> bool:
        """Whether a page of `n` bytes should be given to `write`. One that is there already counts as used now."""
        if self.off:
            return False
        name = self._name(key)
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                self._jobs.put(partial(self._stamp, name))
            known = name in self._files or name in self._waiting
            return not (known or (len(self._waiting) + 1) * n > MOST_WAITING)

    def write(self, key: Key, page_N: Tensor) -> None:
        """Have the page's bytes [n] uint8 written soon."""
        name = self._name(key)
        with self._lock:
            self._waiting.add(name)
        self._jobs.put(partial(self._write, name, page_N))

    def drop(self, keys: Sequence[Key]) -> None:
        """Nobody shall find these pages again."""
        for name in map(self._name, keys):
            self._lose(name)
            self._jobs.put(partial(self._remove, name))

    def forget(self) -> None:
        """Nobody shall find any page again, those that are being written included."""
        self.maker = token_hex()
        self._jobs.put(self._clear)

    def give_up(self, why: object) -> None:
        """Nothing is looked for here any more."""
        self.off = True
        log.warning("the cache folder is used no more, %s: %s", self.folder, why)

    def close(self) -> None:
        """Write what is waiting; a disk that hangs is not waited for."""
        self._reads.put(None)
        self._jobs.put(None)
        self._writer.join(CLOSE_SECONDS)
        os.close(self._own)

    def _name(self, key: Key) -> str:
        return hashlib.blake2b(self.maker.encode() + key, digest_size=16).hexdigest()

    def _lose(self, name: str) -> None:
        with self._lock:
            self._bytes -= self._files.pop(name, 0)

    # The reader's thread.

    def _read_on(self) -> None:
        while (job := self._reads.get()) is not None:
            job()

    def _fetch(self, future: "Future[list[Tensor]]", keys: Sequence[Key], n: int) -> None:
        try:
            pages: list[Tensor] = []
            for key in keys:
                if (page_N := self.read(key, n)) is None:
                    break
                pages.append(page_N)
            future.set_result(pages)
        except Exception as e:  # the engine's to tell
            future.set_exception(e)

    # From here on, the writer's thread.

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                if not self.off:
                    job()
            except Exception as e:
                self.give_up(e)

    def _look(self) -> None:
        """What an earlier engine left, the longest unused first."""
        found = []
        for entry in os.scandir(self.folder):
            if entry.is_file(follow_symlinks=False):
                if NAME.fullmatch(entry.name):
                    found.append((entry.stat().st_mtime_ns, entry.name, entry.stat().st_size))
                elif NAME.fullmatch(entry.name.removesuffix(UNFINISHED)):
                    os.unlink(entry)
        with self._lock:
            self._files.update((name, size) for _, name, size in sorted(found))
            self._bytes = sum(self._files.values())
        self._evict()

    def _write(self, name: str, page_N: Tensor) -> None:
        data, path = page_N.numpy().data, self.folder / name
        unfinished = path.with_suffix(UNFINISHED)
        try:
            with open(unfinished, "wb", buffering=0) as file:
                written = file.write(digest(name, data)) + file.write(data)
            if written < DIGEST + len(data):
                raise OSError("no space left")
            os.replace(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)
            raise
        with self._lock:
            self._waiting.discard(name)
            self._bytes += written - self._files.pop(name, 0)
            self._files[name] = written
        self._evict()

    def _evict(self) -> None:
        evicted = []
        with self._lock:
            while self._bytes > self.max_bytes:
                name, size = self._files.popitem(last=False)
                self._bytes -= size
                evicted.append(name)
        for name in evicted:
            (self.folder / name).unlink(missing_ok=True)

    def _stamp(self, name: str) -> None:
        with suppress(FileNotFoundError):  # dropped or evicted meanwhile
            os.utime(self.folder / name)

    def _remove(self, name: str) -> None:
        self._lose(name)
        (self.folder / name).unlink(missing_ok=True)

    def _clear(self) -> None:
        with self._lock:
            names = list(self._files)
        for name in names:
            self._remove(name)


def own(folder: Path) -> int:
    """A lock on the folder, which is made where it isn't there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        why = "another server uses it" if isinstance(e, BlockingIOError) else e.strerror
        fix = "choose another with --cache-folder, or leave --cache-disk out"
        raise ResourceError(f"the cache folder {folder}: {why}", "one that is ours to write to", fix) from None
    return lock


def maker(model: Path) -> str:
    """Names the weights of a model folder or a GGUF file, and the code that computes with them.

    Weights go by their checkpoint's manifest, or where there is none by size and time of change.
    """
    sha256 = hashlib.sha256()
    for room in ("model", "ops", "engine"):
        for path in sorted((Path(__file__).parents[1] / room).rglob("*.[pch]*")):
            if path.suffix in (".py", ".c", ".cpp", ".h"):
                sha256.update(path.read_bytes())
    manifest = model / "manifest.json"
    if model.is_dir():
        sha256.update((manifest if manifest.exists() else model / "config.json").read_bytes())
    if not manifest.exists():
        weights = model.glob("*.safetensors") if model.is_dir() else (model.with_name(part) for part in parts(model))
        files = [(path.name, path.stat()) for path in sorted(weights)]
        sha256.update(repr([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]).encode())
    return sha256.hexdigest()


def digest(name: str, page: memoryview) -> bytes:
    sha256 = hashlib.sha256(name.encode())
    sha256.update(page)
    return sha256.digest()
