"""Pages on their way from the disk to streams that need them: one thread reads, a step takes in what it has read.

    stream's next unit is on the disk → fetch: it and those behind it, LOAD_BYTES at most → taken in between two steps

Nobody waits but the stream that needs them, whose prompt is computed from where the pages end. A disk that hangs is
given up after READ_SECONDS, and one whose reader fails at once; then pages are computed as if there were none.
"""

from concurrent.futures import Future, wait
from itertools import takewhile
from threading import Condition
from time import perf_counter
from typing import NamedTuple

from torch import Tensor

from shoal.engine.cache import Cache
from shoal.engine.disk import Disk
from shoal.engine.pages import UNIT
from shoal.engine.scheduler import Scheduler
from shoal.engine.stream import Stream

LOAD_BYTES = 2**22  # in one go, a millisecond to take in
READ_SECONDS = 5.0  # for as many


class Reading(NamedTuple):
    stream: Stream
    first: int  # unit
    pages: "Future[list[Tensor]]"
    since: float


class Loader:
    """`loaded` counts pages. Everything here is for the engine's thread."""

    def __init__(self, disk: Disk, cache: Cache, bytes_per_token: int):
        self.disk, self.cache, self.page_bytes = disk, cache, UNIT * bytes_per_token
        self.loaded = 0
        self._reading: Reading | None = None

    def step(self, scheduler: Scheduler, lock: Condition) -> None:
        """Take in what was read, and have the next pages read that spare somebody computing."""
        if self._reading and not self._reading.pages.done():
            if perf_counter() - self._reading.since > READ_SECONDS:
                self.disk.give_up(f"a read takes longer than {READ_SECONDS} s")
                self._reading = None
            return
        if self._reading:
            if (error := self._reading.pages.exception()) is not None:
                self.disk.give_up(repr(error))
            else:
                self._take_in(self._reading, scheduler, lock)
            self._reading = None
        for stream in filter(scheduler.loads, scheduler.running):
            most = max(1, LOAD_BYTES // self.page_bytes)
            ahead = range(stream.kept, min(stream.kept + most, stream.findable))
            keys = list(takewhile(self.disk.has, map(stream.key, ahead)))
            self._reading = Reading(stream, stream.kept, self.disk.fetch(keys, self.page_bytes), perf_counter())
            return

    def _take_in(self, reading: Reading, scheduler: Scheduler, lock: Condition) -> None:
        stream = reading.stream
        for unit, page_N in enumerate(reading.pages.result(), reading.first):
            if stream not in scheduler.running or stream.kept != unit or not scheduler.loads(stream):
                return  # it ended, or began anew
            self.cache.set_page(stream.pages[unit], page_N)
            with lock:
                scheduler.pages.keep(stream.pages[unit], stream.key(unit))
                stream.load()
                self.loaded += 1

    def wait(self, seconds: float) -> None:
        """Where nothing else is to be done, for what is being read."""
        if self._reading:
            wait([self._reading.pages], seconds)

    def forget(self) -> None:
        """Nothing on the disk, or on its way from it, is right any more."""
        self._reading = None
        self.disk.forget()
