"""Experts from the disk are the ones that were written, whole or not at all."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.engine import experts, split
from shoal.engine.experts import Job, Located, Run, Store, runs, slot_bytes
from shoal.engine.offload import StoredRows
from shoal.errors import StorageError
from shoal.model.hf_files import Entry
from shoal.model.transformer import Transformer
from shoal.ops.quant import Quantised
from shoal.precision import weights
from tests.engine import stored
from tests.engine.models import LATENT, model

CONFIG = replace(LATENT, n_mtp=0)
FORMS = ("bf16", *stored.FP8_SCALES, "int8", "int4")


def entry(file: str, start: int, n: int) -> Entry:
    return Entry(file, torch.uint8, (n,), start, start + n)


def folder(tmp_path: Path, form: str, **more) -> Path:
    return stored.write(tmp_path / form, CONFIG, form, stored.of(model(CONFIG)), **more)


def store_of(path: Path, n_slots: int = 2, direct: bool = True) -> Store:
    parts = split.examine(path, torch.bfloat16)
    return Store(parts.stored.files, parts.experts, n_slots, direct)


def fetched(store: Store, expert: int, slot: int) -> Job:
    job = Job(expert, slot)
    store.read(job, urgent=True)
    store.wait([job])
    return job


def test_neighbours_are_one_read_and_others_are_not():
    near = (
        Located(entry("a", 100, 50), entry("a", 150, 8)),
        Located(entry("a", 5000, 100)),
        Located(entry("a", 158, 9)),
    )
    assert runs(near) == [Run("a", 0, 8192, 5100, 0)]
    far = (
        Located(entry("a", 10**7, 50), entry("b", 7, 1)),
        Located(entry("a", 4096, 4096)),
        Located(entry("b", 3, 4)),
    )
    assert runs(far) == [
        Run("a", 4096, 8192, 8192, 0),
        Run("a", 10**7 // 4096 * 4096, 10**7 // 4096 * 4096 + 4096, 10**7 + 50, 4096),
        Run("b", 0, 4096, 8, 8192),
    ]
    assert slot_bytes([near, far]) == 3 * 4096


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_an_expert_is_what_was_written(tmp_path, form: str, direct: bool):
    path = folder(tmp_path, form, max_shard_bytes=60_000)
    store = store_of(path, direct=direct)
    resident = weights.load(path)
    last = len(store.experts) - 1
    for x in (0, 5, last):
        assert fetched(store, x, x % 2).state == Job.DONE
        leaf = resident.layers[1 + x // 8].get_submodule("ffn.experts")
        for name, found in zip(("gate", "up", "down"), store.matrices(x, x % 2), strict=True):
            if isinstance(found, Quantised):
                theirs = getattr(leaf, name)[x % 8]
                assert torch.equal(found.codes.view(torch.uint8), theirs.codes.view(torch.uint8))
                assert torch.equal(found.scales, theirs.scales) and found.block == theirs.block
            else:
                both = leaf.get_parameter("gate_up")[x % 8].chunk(2)
                assert torch.equal(found, leaf.get_parameter("down")[x % 8] if name == "down" else both[name == "up"])
    assert store.experts_read == 3 and store.bytes_read > 0 and store.seconds_reading > 0
    store.close()


def test_scales_that_were_widened_are_those_of_what_was_read_last(tmp_path):
    """They are copies: of nothing read before the expert came, and of no other expert."""
    path = folder(tmp_path, "fp8-bf16")
    store, resident = store_of(path), weights.load(path).layers[1].get_submodule("ffn.experts")
    store.like(0)
    for x in (0, 3, 0):
        fetched(store, x, 0)
        assert torch.equal(store.matrices(x, 0)[2].scales, resident.down[x].scales)  # type: ignore[union-attr]
    known = store.matrices(0, 0)
    fetched(store, 3, 0)  # and nobody asks where it lies
    fetched(store, 0, 0)
    assert store.matrices(0, 0) is not known
    store.close()


def replaced(path: Path) -> None:
    """By a file of the same size and time of last change."""
    times, other = path.stat(), path.with_suffix(".new")
    other.write_bytes(bytes(path.stat().st_size))
    os.utime(other, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(other, path)


def grown(path: Path) -> None:
    with path.open("ab") as f:
        f.write(b"more")


def touched(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


OPENINGS = {
    "experts": lambda parts: Store(parts.stored.files, parts.experts, 1),
    "rows": lambda parts: StoredRows(parts.stored.files, split.lookup(parts) or entry("", 0, 0), torch.bfloat16),
    "near": lambda parts: parts.stored.files.read_into("model.norm.weight", memoryview(bytearray(4 * CONFIG.dim))),
    "all": lambda parts: split.load(parts, 1, direct=True),
}


@pytest.mark.parametrize("opening", OPENINGS)
def test_a_file_that_is_not_the_one_whose_header_was_checked_is_not_read(tmp_path, opening: str):
    path = folder(tmp_path, "fp8")
    parts = split.examine(path, torch.bfloat16)
    replaced(path / "model.safetensors")
    with pytest.raises(StorageError, match="was changed while it was in use"):
        OPENINGS[opening](parts)


@pytest.mark.parametrize("change", [grown, touched, cut])
def test_a_file_that_changes_is_found_out(tmp_path, change):
    path = folder(tmp_path, "int8")
    store = store_of(path)
    assert fetched(store, 0, 0).error is None
    change(path / "model.safetensors")
    job = fetched(store, 1, 1)
    assert job.state == Job.FAILED and isinstance(job.error, StorageError) and "changed" in job.error.got
    store.close()


def test_a_file_that_changes_while_it_is_read_is_found_out(tmp_path, monkeypatch):
    path = folder(tmp_path, "int8")
    store, read = store_of(path), os.preadv

    def overtaken(*to) -> int:
        touched(path / "model.safetensors")
        return read(*to)

    monkeypatch.setattr(os, "preadv", overtaken)
    assert fetched(store, 0, 0).state == Job.FAILED
    store.close()


def broken(*_) -> int:
    raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize(("preadv", "said"), [(broken, "Input/output error"), (lambda *_: 0, "too early")])
def test_a_disk_that_fails_is_an_error_and_a_later_read_is_tried_anew(tmp_path, monkeypatch, preadv, said: str):
    store = store_of(folder(tmp_path, "fp8"))
    with monkeypatch.context() as failing:
        failing.setattr(os, "preadv", preadv)
        error = fetched(store, 3, 0).error
        assert error and said in error.got
    assert fetched(store, 3, 0).error is None
    store.close()


def test_a_disk_that_fails_says_so_whatever_is_read(tmp_path, monkeypatch):
    parts = split.examine(folder(tmp_path, "bf16"), torch.bfloat16)
    rows = OPENINGS["rows"](parts)
    monkeypatch.setattr(os, "preadv", broken)
    for read in (lambda: rows(torch.tensor([3])), lambda: OPENINGS["near"](parts), lambda: OPENINGS["all"](parts)):
        with pytest.raises(StorageError, match=r"model.safetensors: Input/output error"):
            read()


def test_reads_in_small_pieces_add_up(tmp_path, monkeypatch):
    path, read = folder(tmp_path, "bf16"), os.preadv
    store = store_of(path, direct=False)
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: read(fd, [to[0][:1000]], at))
    assert fetched(store, 0, 0).error is None
    whole = weights.load(path)
    assert isinstance(whole, Transformer)
    assert torch.equal(store.matrices(0, 0)[2], whole.get_parameter("layers.1.ffn.experts.down")[0])  # type: ignore
    store.close()


def test_what_waits_can_be_cancelled_and_what_is_urgent_goes_first(tmp_path, monkeypatch):
    store = store_of(folder(tmp_path, "int4"), n_slots=8)
    order, hold, read = [], experts.Condition(), Store._read

    def slow(self: Store, job: Job) -> int:
        with hold:
            hold.wait_for(lambda: going)
        order.append(job.expert)
        return read(self, job)

    going = False
    monkeypatch.setattr(Store, "_read", slow)
    jobs = [Job(x, x) for x in range(8)]
    for job in jobs[: experts.READERS]:  # one for each thread
        store.read(job, urgent=True)
    while any(job.state == Job.WAITING for job in jobs[: experts.READERS]):
        pass
    for job in jobs[experts.READERS :]:
        store.read(job, urgent=False)
    assert store.cancel(jobs[5]) and not store.cancel(jobs[0])
    store.read(jobs[7], urgent=True)
    with hold:
        going = True
        hold.notify_all()
    while not all(job.ended for job in jobs):
        store.wait([job for job in jobs if not job.ended])
    assert 5 not in order and sorted(order) == [0, 1, 2, 3, 4, 6, 7] and order.index(7) < order.index(6)
    store.close()
