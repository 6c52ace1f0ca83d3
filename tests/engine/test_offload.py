"""Experts that come and go change no token; the ones that are wanted stay; faults end a request and nothing else."""

import errno
import os
from dataclasses import replace

import pytest
import torch

from shoal.engine import offload, split
from shoal.engine.engine import LocalEngine
from shoal.engine.experts import Job
from shoal.engine.native import Native
from shoal.engine.offload import Offload, Slots
from shoal.errors import StorageError
from shoal.ops import cpu
from shoal.precision import weights
from tests.engine import stored
from tests.engine.models import LATENT, WIDE, ids, model, prompt, request

CONFIG = replace(LATENT, n_mtp=0)
A, E = 2, 8  # experts chosen of how many


class Shelf:
    """A store that reads nothing: jobs end when they are told to, or at once when they are waited for."""

    def __init__(self, n_experts: int):
        self.experts, self.asked, self.cancelled = [None] * n_experts, [], []
        self.bytes_read, self.seconds_reading, self.slot_bytes, self.released = 0, 0.0, 1 << 20, []
        self.error: StorageError | None = None

    def read(self, job: Job, urgent: bool) -> None:
        job.urgent = urgent
        self.asked.append((job.expert, urgent))

    def cancel(self, job: Job) -> bool:
        self.cancelled.append(job.expert)
        return True

    def wait(self, jobs: list[Job]) -> None:
        assert jobs
        jobs[0].state, jobs[0].error = (Job.FAILED, self.error) if self.error else (Job.DONE, None)

    def release(self, slot: int) -> None:
        self.released.append(slot)

    def matrices(self, expert: int, slot: int) -> tuple[int, int]:
        return expert, slot


def shelved(n_slots: int, n_experts: int = 2 * E) -> tuple[Offload, Shelf]:
    shelf = Shelf(n_experts)
    return Offload(shelf, n_slots, E), shelf  # type: ignore[arg-type]


def use(o: Offload, mixture: int, busy: list[int]) -> list[list[int]]:
    """The batches, by experts' numbers; each expert is in a slot of its own."""
    with o.chosen(mixture, busy) as batches:
        found = []
        for batch in batches:
            slots = [slot for _, (_, slot) in batch]  # type: ignore[misc]
            assert len(set(slots)) == len(slots)
            found.append([e for e, _ in batch])
    lasting = len(o._slots._held) - o.n_slots  # slots that were given up
    assert o._slots._held.sum() == lasting or o._foretold or o._jobs
    return found


FORMS = [("bf16", 3), ("fp8", 1), ("fp8-bf16", 16), ("fp8-ue8m0", 3), ("int8", 16), ("int4", 3)]


@pytest.mark.parametrize(("form", "n_slots"), FORMS)
def test_tokens_are_those_of_the_resident_model(tmp_path, form: str, n_slots: int):
    path = stored.write(tmp_path / "m", CONFIG, form, stored.of(model(CONFIG)))
    far, o = split.load(split.examine(path, torch.bfloat16), n_slots, direct=True)
    engines = LocalEngine(weights.load(path)), LocalEngine(far)
    asked = [request(prompt(n, n), 12) for n in (70, 3)]
    near, read = ([ids(r) for r in engine.generate(asked)] for engine in engines)
    assert read == near
    s = o.stats()
    assert s.chosen > 80 and s.found + s.foretold <= s.chosen and s.bytes_read > 0
    told = engines[1].stats()
    assert (told.experts_chosen, told.experts_bytes_read) == (s.chosen, s.bytes_read)
    assert n_slots < 16 or s.chosen - s.found <= 16, "what fits is read once"
    for engine in engines:
        engine.close()
    o.store.close()


def test_all_that_are_busy_come_once_those_that_are_here_first():
    o, shelf = shelved(4)
    assert use(o, 0, [1, 2]) == [[1], [2]]
    assert use(o, 0, [2, 5, 6, 7]) == [[2], [5], [6], [7]]
    assert [x for x, _ in shelf.asked] == [1, 2, 5, 6, 7]
    assert (o.stats().chosen, o.stats().found) == (6, 1)
    assert use(o, 1, list(range(8))) == [[e] for e in range(8)], "more than there are slots"


def test_who_is_chosen_often_stays():
    o, shelf = shelved(3)
    for e in (1, 2, 3, 4, 5):
        use(o, 0, [0, e])
    assert shelf.asked.count((0, True)) == 1 and o.stats().found == 4


def test_old_choices_fade():
    slots = Slots(2, 4)
    slots.count([0] * 1 + [1])
    for _ in range(3):
        slots.count([0])
    for x in (0, 1):
        slots.take(x)
    slots.hold([0, 1], False)
    for _ in range(4 * offload.HALF_LIFE):
        slots.age()
    slots.count([1])
    assert slots.take(2) == slots.slot_of[2] and slots.slot_of[0] == -1, "chosen four times, long ago"


def test_scores_do_not_overflow():
    slots = Slots(1, 2)
    for _ in range(200 * offload.HALF_LIFE):
        slots.age()
        slots.count([0])
    assert slots._score[0] < 1e12 and slots._weight < 1e12


def test_what_was_foretold_is_read_ahead_and_kept_until_its_turn():
    o, shelf = shelved(8)
    use(o, 0, [0, 1])
    with o.chosen(0, [0, 1]) as batches:
        o.foretell(1, [2, 3])
        list(batches)
    assert shelf.asked[-2:] == [(10, False), (11, False)] or shelf.asked[-2:] == [(11, False), (10, False)]
    assert use(o, 1, [2, 4]) == [[2], [4]]
    assert (10, True) in shelf.asked, "whoever is waited for becomes urgent"
    assert shelf.cancelled == [11], "what was foretold wrongly and had not begun is not read"
    s = o.stats()
    assert (s.guessed, s.right, s.foretold, s.read_ahead) == (2, 1, 1, 2)


def test_foretelling_that_is_wrong_stops_reading_and_goes_on_being_judged():
    o, shelf = shelved(8)
    for _ in range(200):
        use(o, 0, [0, 1])
        o.foretell(1, [2, 3])
        use(o, 1, [4, 5])
    before = len(shelf.asked)
    use(o, 0, [0, 1])
    o.foretell(1, [6])
    assert len(shelf.asked) == before
    for _ in range(200):
        use(o, 1, [4, 5])
        use(o, 0, [0, 1])
        o.foretell(1, [4, 5])
    assert o._trust > offload.WORTH


def test_foretold_experts_never_keep_needed_ones_out():
    o, _ = shelved(2)
    use(o, 1, [2, 3])
    o.foretell(1, [2, 3])  # both slots are held for them
    assert use(o, 0, [0, 1]) == [[0], [1]]


def test_experts_make_room_where_the_process_has_outgrown_its_budget(monkeypatch):
    monkeypatch.setattr(offload, "resident_bytes", lambda: 100 << 20)
    shelf = Shelf(2 * E)
    o = Offload(shelf, 8, E, least=A, ceiling=97 << 20)  # type: ignore[arg-type]
    use(o, 0, [0, 1, 2, 3])
    assert len(shelf.released) == 3 and o.n_slots == 5
    for _ in range(5 * offload.LOOK):
        use(o, 0, [0, 1, 2, 3])
        use(o, 1, [0, 1])
    assert o.n_slots == A and len(set(shelf.released)) == 6


def test_an_expert_that_can_not_be_read_leaves_its_slot_empty():
    o, shelf = shelved(3)
    shelf.error = StorageError("a disk that failed", "", "")
    for _ in range(5):
        with pytest.raises(StorageError):
            use(o, 0, [0, 1])
    shelf.error = None
    assert use(o, 0, [0, 1, 2, 3]) == [[0], [1], [2], [3]]
    assert not o._slots._held.any() or o._jobs


@pytest.mark.parametrize("config", [CONFIG, replace(WIDE, n_mtp=0)], ids=["modules", "program"])
@pytest.mark.parametrize("fault", ["error", "row", "cut", "changed"])
def test_a_fault_of_the_disk_ends_the_request_and_no_wrong_token_is_told(tmp_path, monkeypatch, config, fault: str):
    path = stored.write(tmp_path / "m", config, "int8", stored.of(model(config)))
    far, o = split.load(split.examine(path, torch.bfloat16), 2, direct=True)
    engine, file = LocalEngine(far), path / "model.safetensors"
    assert isinstance(engine._runner, Native) == (config is not CONFIG and "native" in cpu.status())
    asked, times = request(prompt(9), 6), file.stat()
    (expected,) = engine.generate([asked])
    read = os.preadv
    with monkeypatch.context() as failing:
        if fault == "changed":
            os.utime(file, ns=(1, 1))
        elif fault == "cut":
            failing.setattr(os, "preadv", lambda fd, to, at: read(fd, to, at) if len(to[0]) < PAGES else 0)
        else:
            failing.setattr(os, "preadv", failing_after(3, whole=fault == "error"))
        (result,) = engine.generate([request(prompt(9, 3), 6)])
        assert result.finish == "error" and "disk" in (result.error or "")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ids(engine.generate([request(prompt(9), 6)])[0]) == ids(expected)
    engine.close()
    o.store.close()


PAGES = 4096  # an embedding's row is shorter, an expert longer


def failing_after(n: int, whole: bool):
    """Of the reads of whole experts, or of rows, all but the first."""
    left, read = [n], os.preadv

    def preadv(fd, to, at) -> int:
        if (len(to[0]) >= PAGES) == whole:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.EIO, "Input/output error")
        return read(fd, to, at)

    return preadv
