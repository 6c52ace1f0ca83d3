"""Experts on the disk, read whole and ahead of use into memory that was set aside for them.

An expert is three matrices; each is a range of bytes of a safetensors file, or two where it has scales. Ranges that lie
side by side are one read, from one page boundary to another, into a slot: the same bytes at the same distance from a
boundary, so the disk may write them there by itself (O_DIRECT) and a matrix is multiplied with where it was read to.

Reads are done by a few threads, those that somebody waits for first. Whatever is read is believed only if the file is
the one whose header was checked, before and after: same device, inode, size and time of last change.
"""

import heapq
import logging
import mmap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import count
from threading import Condition, Thread
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.errors import StorageError
from shoal.model.hf_files import Entry, TensorFolder
from shoal.ops.quant import Form, Quantised

log = logging.getLogger(__name__)

PAGE = 4096
GAP = 1 << 14  # bytes between two ranges that are rather read than skipped
READERS = 4

Matrix = Tensor | Quantised


class Located(NamedTuple):
    """A matrix in the files: a tensor, or codes and scales."""

    codes: Entry
    scales: Entry | None = None
    form: Form | None = None
    block: tuple[int, int] = (1, 1)
    shape: tuple[int, int] = (0, 0)

    def entries(self) -> list[Entry]:
        return [self.codes] if self.scales is None else [self.codes, self.scales]

    @property
    def nbytes(self) -> int:
        return sum(e.end - e.start for e in self.entries())


Expert = tuple[Located, Located, Located]  # gate, up, down


class Run(NamedTuple):
    """Bytes of a file, page by page, and where in a slot they go. The last page may end with the file, at `least`."""

    file: str
    start: int
    end: int
    least: int
    at: int


def runs(expert: Expert) -> list[Run]:
    """What is read for an expert: its ranges, neighbours in one."""
    found: list[Run] = []
    for e in sorted((e for matrix in expert for e in matrix.entries()), key=lambda e: (e.file, e.start)):
        start, end = e.start // PAGE * PAGE, -(-e.end // PAGE) * PAGE
        last = found[-1] if found else None
        if last and last.file == e.file and start <= last.end + GAP:
            found[-1] = last._replace(end=max(end, last.end), least=max(e.end, last.least))
        else:
            found.append(Run(e.file, start, end, e.end, last.at + last.end - last.start if last else 0))
    return found


def slot_bytes(experts: Iterable[Expert]) -> int:
    """Of the largest expert, in whole pages."""
    return max(r[-1].at + r[-1].end - r[-1].start for r in map(runs, experts))


class Placed(tuple[Matrix, Matrix, Matrix]):
    """Gate, up and down where they lie; and how a program placed them, once one has."""

    kept: bytes | None = None


class Job:
    """One expert on its way into a slot."""

    __slots__ = ("error", "expert", "slot", "state", "urgent")
    WAITING, READING, DONE, FAILED, CANCELLED = range(5)

    def __init__(self, expert: int, slot: int):
        self.expert, self.slot, self.state = expert, slot, Job.WAITING
        self.error: StorageError | None = None
        self.urgent = False

    @property
    def ended(self) -> bool:
        return self.state >= Job.DONE


class Store:
    """All routed experts of a model by number, and memory for some of them."""

    def __init__(self, files: TensorFolder, experts: Sequence[Expert], n_slots: int, direct: bool = True):
        """`direct`: past the page cache, where the file system can. Raises ModelError and StorageError."""
        self.experts, self.slot_bytes = experts, slot_bytes(experts)
        names = {e.file for expert in experts for matrix in expert for e in matrix.entries()}
        self._files = {name: files.open(name, direct) for name in names}
        if direct and not all(f.direct for f in self._files.values()):
            log.warning("the file system has no reads past the page cache: experts are read through it")
        self._arena = mmap.mmap(-1, n_slots * self.slot_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without large pages
            self._arena.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._arena)
        self._made: dict[int, Placed] = {}  # of what was last read, by slot
        self._queue: list[tuple[bool, int, Job]] = []
        self._numbers = count()
        self._work, self._end = Condition(), Condition()
        self._closed = False
        self._busy, self._since = 0, 0.0
        self.bytes_read, self.seconds_reading, self.experts_read = 0, 0.0, 0
        self._threads = [Thread(target=self._serve, name=f"experts-{i}", daemon=True) for i in range(READERS)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        with self._work:
            self._closed = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join()
        for f in self._files.values():
            f.file.close()

    def read(self, job: Job, urgent: bool) -> None:
        """Begin to read; a job that waits may be asked for again, urgently."""
        self._made.pop(job.slot, None)
        with self._work:
            job.urgent = urgent
            heapq.heappush(self._queue, (not urgent, next(self._numbers), job))
            self._work.notify()

    def cancel(self, job: Job) -> bool:
        """True where it hadn't begun, and now never will."""
        with self._work:
            waits = job.state == Job.WAITING
            if waits:
                job.state = Job.CANCELLED
            return waits

    def wait(self, jobs: Sequence[Job]) -> None:
        """Until one of them has ended."""
        with self._end:
            self._end.wait_for(lambda: any(job.ended for job in jobs))

    def release(self, slot: int) -> None:
        """Give its memory back; nothing will be read into it."""
        self._made.pop(slot, None)
        self._arena.madvise(mmap.MADV_DONTNEED, slot * self.slot_bytes, self.slot_bytes)

    def matrices(self, expert: int, slot: int) -> Placed:
        """Gate, up and down of the expert that was read into this slot: the same objects until another read begins."""
        if slot not in self._made:
            self._made[slot] = self.like(expert, slot)
        return self._made[slot]

    def like(self, expert: int, slot: int = 0) -> Placed:
        """Its form and sizes; its numbers where it is in this slot, else nothing is known of them."""
        where = runs(self.experts[expert])
        gate, up, down = (self._matrix(located, where, slot * self.slot_bytes) for located in self.experts[expert])
        return Placed((gate, up, down))

    def _matrix(self, m: Located, where: list[Run], base: int) -> Matrix:
        def tensor(e: Entry, dtype: torch.dtype) -> Tensor:
            (run,) = (r for r in where if r.file == e.file and r.start <= e.start and e.end <= r.end)
            offset, n = base + run.at + e.start - run.start, (e.end - e.start) // dtype.itemsize
            return torch.frombuffer(self._arena, dtype=dtype, count=n, offset=offset)

        if m.form is None or m.scales is None:
            return tensor(m.codes, m.codes.dtype).view(m.codes.shape)
        codes = tensor(m.codes, m.codes.dtype if m.form == "fp8" else torch.uint8).view(m.shape[0], -1)
        scales = tensor(m.scales, m.scales.dtype).view(m.scales.shape)
        return Quantised(m.form, codes, scales.float() if m.form == "fp8" else scales, m.block)

    # From here on, the readers' threads.

    def _serve(self) -> None:
        while True:
            with self._work:
                self._work.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    return
                job = heapq.heappop(self._queue)[2]
                if job.state != Job.WAITING:
                    continue
                job.state = Job.READING
                self._since = self._since if self._busy else perf_counter()
                self._busy += 1
            n = 0
            try:
                n = self._read(job)
            except StorageError as e:
                log.error("expert %d could not be read: %s", job.expert, e)
                job.error = e
            with self._work:
                self._busy -= 1
                if not self._busy:
                    self.seconds_reading += perf_counter() - self._since
                self.bytes_read, self.experts_read = self.bytes_read + n, self.experts_read + (job.error is None)
            with self._end:
                job.state = Job.FAILED if job.error else Job.DONE
                self._end.notify_all()

    def _read(self, job: Job) -> int:
        total, base = 0, job.slot * self.slot_bytes
        for run in runs(self.experts[job.expert]):
            to = self._view[base + run.at : base + run.at + run.end - run.start]
            total += self._files[run.file].read_into(to, run.start, run.least - run.start)
        return total
