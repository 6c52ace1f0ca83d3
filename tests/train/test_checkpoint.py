"""A checkpoint is whole or refused by name, and saving never shows through in what is saved."""

import errno
import json
import os
import resource
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shoal.errors import CheckpointError, ResourceError
from shoal.model.hf_files import Planned, write_safetensors
from shoal.train import manifest
from shoal.train.checkpoint import STATE, Saver, newest, save

FILES = [
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "train_state/state.safetensors",
    "train_state/counters.json",
    "manifest.json",
]


def write_model(weights: dict[str, torch.Tensor], folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "deepseek_v3"}')
    (folder / "tokenizer.json").write_text("{}")
    planned = [Planned(name, t.dtype, tuple(t.shape), t.clone) for name, t in weights.items()]
    write_safetensors(folder / "model.safetensors", planned)


def training(step: int) -> tuple[dict, dict, dict]:
    """Weights, state and counters as they might stand at a step: every dtype, an empty tensor, a scalar."""
    g = torch.Generator().manual_seed(step)
    master = torch.randn(64, 33, generator=g)
    state = {
        "master.a": master,
        "moment.a": torch.randn(64, 33, generator=g).bfloat16(),
        "counts": torch.randint(0, 9, (7,), generator=g),
        "mask": torch.rand(5, generator=g) > 0.5,
        "bytes": torch.randint(0, 255, (11,), generator=g, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(step + 0.1, dtype=torch.float64),
        "halves": torch.randn(3, generator=g).half(),
        "eighths": torch.randn(5, generator=g).to(torch.float8_e4m3fn),
        "transposed": master.T,
    }
    return {"a": master.bfloat16()}, state, {"step": step, "seconds": step / 3}


def saved(root: Path, *steps: int, keep: int = 9) -> Saver:
    saver = Saver(root, write_model, keep)
    for step in steps:
        saver.save(step, *training(step))
    saver.close()
    return saver


def assert_holds(root: Path, step: int) -> None:
    checkpoint, _ = newest(root)
    weights, state, counters = training(step)
    assert checkpoint and checkpoint.step == step and checkpoint.counters == counters
    assert_same(checkpoint.tensors(), state)
    assert_same(load_file(checkpoint.path / "model.safetensors"), weights)


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        assert found[name].dtype == t.dtype and found[name].shape == t.shape
        assert bits(found[name]) == bits(t), name


def bits(t: torch.Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def visible(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    saved(tmp_path, 100, 200)
    assert_holds(tmp_path, 200)
    assert visible(tmp_path) == ["step-000100", "step-000200"]
    assert sorted([*manifest.files(tmp_path / "step-000200"), "manifest.json"]) == sorted(FILES)


def test_an_empty_or_absent_folder_has_no_checkpoint(tmp_path):
    assert newest(tmp_path / "absent") == (None, [])


def test_steps_are_ordered_as_numbers(tmp_path):
    saved(tmp_path, 999999, 1000000)
    assert_holds(tmp_path, 1000000)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def link(path: Path) -> None:
    os.rename(path, path.parent.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent.parent / "elsewhere")


@pytest.mark.parametrize("damage", [flip, cut, os.remove, link])
@pytest.mark.parametrize("name", FILES)
def test_damage_to_any_file_is_found_and_named_and_the_previous_checkpoint_used(tmp_path, name, damage):
    saved(tmp_path / "checkpoints", 100, 200)
    damage(tmp_path / "checkpoints/step-000200" / name)
    _, refused = newest(tmp_path / "checkpoints")
    assert [r.path.name for r in refused] == ["step-000200"]
    assert name in refused[0].why
    assert_holds(tmp_path / "checkpoints", 100)


def test_every_flipped_byte_of_a_manifest_is_found(tmp_path):
    saved(tmp_path, 100)
    path = tmp_path / "step-000100/manifest.json"
    raw = path.read_bytes()
    for at in range(len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        assert newest(tmp_path)[0] is None, f"byte {at} of {len(raw)}"


def test_a_file_nobody_listed_and_a_renamed_folder_are_refused(tmp_path):
    saved(tmp_path, 100, 200)
    (tmp_path / "step-000200/train_state/more.safetensors").write_bytes(b"")
    shutil.copytree(tmp_path / "step-000100", tmp_path / "step-000300")
    why = {r.path.name: r.why for r in newest(tmp_path)[1]}
    assert why["step-000200"] == "train_state/more.safetensors: not in the manifest"
    assert why["step-000300"] == "manifest.json: belongs to step 100"
    assert_holds(tmp_path, 100)


def test_training_may_go_on_while_a_save_is_written(tmp_path):
    going_on, copies = threading.Event(), []

    def slow(weights: dict, folder: Path) -> None:
        going_on.wait()
        copies.append({t.data_ptr() for t in weights.values()})
        write_model(weights, folder)

    saver = Saver(tmp_path, slow, keep=9)
    for step in (100, 200):
        going_on.clear()
        weights, state, counters = training(step)
        saver.save(step, weights, state, counters)
        for t in (*weights.values(), *state.values()):
            t.zero_()
        counters["step"] = -1
        going_on.set()
        saver.close()
        assert_holds(tmp_path, step)
    assert copies[0] == copies[1], "the host buffers are allocated once"


def test_a_second_save_waits_for_the_first(tmp_path):
    running, most = [], []

    def count(weights: dict, folder: Path) -> None:
        running.append(1)
        most.append(len(running))
        write_model(weights, folder)
        running.pop()

    saver = Saver(tmp_path, count, keep=9)
    for step in range(5):
        saver.save(step, *training(step))
    saver.close()
    assert most == [1] * 5
    assert_holds(tmp_path, 4)


def test_only_the_newest_are_kept(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, keep=2)
    assert visible(tmp_path) == ["step-000003", "step-000004"]


def test_a_damaged_newer_checkpoint_never_pushes_out_the_one_just_written(tmp_path):
    saved(tmp_path, 200, 400)
    flip(tmp_path / "step-000400" / STATE)
    saved(tmp_path, 300, keep=1)  # resumed from 200
    assert_holds(tmp_path, 300)
    saved(tmp_path, 400, keep=1)
    assert_holds(tmp_path, 400)
    assert visible(tmp_path) == ["step-000400"]


def test_a_whole_checkpoint_of_the_same_step_is_left_alone(tmp_path):
    saved(tmp_path, 100)
    before = (tmp_path / "step-000100" / STATE).stat()
    saved(tmp_path, 100)
    assert (tmp_path / "step-000100" / STATE).stat() == before


def test_leftovers_of_a_killed_save_are_removed_at_the_start(tmp_path):
    saved(tmp_path, 100)
    (tmp_path / ".step-000200.tmp/train_state").mkdir(parents=True)
    (tmp_path / ".step-000050.old").mkdir()
    Saver(tmp_path, write_model, keep=9)
    assert visible(tmp_path) == ["step-000100"]


@pytest.fixture
def file_limit():
    """No file may grow beyond some bytes: the kernel refuses the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit", [10, 3000, 8000])  # hit by the model's files, the state's head, its middle
def test_a_refused_write_leaves_the_previous_checkpoint_intact(tmp_path, file_limit, limit):
    saver = saved(tmp_path, 100)
    file_limit(limit)
    saver.save(200, *training(200))
    with pytest.raises(ResourceError, match=r"earlier checkpoints are intact[^$]*fix: "):
        saver.close()
    file_limit(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    assert visible(tmp_path) == ["step-000100"]
    assert_holds(tmp_path, 100)
    saver.save(300, *training(300))
    saver.close()
    assert_holds(tmp_path, 300)


@pytest.fixture
def tiny_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=96k", "none", str(disk)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint_intact(tiny_disk, monkeypatch):
    monkeypatch.setattr("shoal.train.checkpoint.SPARE_BYTES", 0)
    saver = saved(tiny_disk, 100)
    with pytest.raises(ResourceError, match="too little to save step 300; earlier checkpoints are intact"):
        (tiny_disk / "other").write_bytes(bytes(24_000))
        saver.save(300, *training(300))  # seen before anything is written
    monkeypatch.setattr("shoal.train.checkpoint.require_room", lambda *_: None)
    saver.save(300, *training(300))
    with pytest.raises(ResourceError, match="the disk is full: .*earlier checkpoints are intact"):
        saver.close()
    assert visible(tiny_disk) == ["other", "step-000100"]
    assert_holds(tiny_disk, 100)


def test_an_input_output_error_is_told_at_the_next_check_and_only_once(tmp_path, monkeypatch):
    saver = saved(tmp_path, 100)

    def refuse(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", refuse)
    saver.save(200, *training(200))
    assert saver.thread
    saver.thread.join()
    with pytest.raises(CheckpointError, match="Input/output error"):
        saver.check()
    saver.check()
    assert visible(tmp_path) == ["step-000100"]


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_before_the_return(tmp_path, monkeypatch):
    events, fsync, rename = [], os.fsync, os.rename

    def seen_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), tmp_path))

    def seen_rename(old: Path, new: Path) -> None:
        events.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "rename", seen_rename)
    weights, state, counters = training(100)
    save(
        tmp_path,
        100,
        lambda folder: write_model(weights, folder),
        {k: t.contiguous() for k, t in state.items()},
        counters,
        1,
    )
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    expected = {os.path.normpath(f".step-000100.tmp/{name}") for name in [*FILES, "train_state", "."]}
    assert set(before) == expected and after == ["."]
    assert before.index(".step-000100.tmp/manifest.json") > max(
        before.index(f".step-000100.tmp/{n}") for n in FILES[:-1]
    )


def test_counters_are_json_anyone_can_read(tmp_path):
    saved(tmp_path, 100)
    assert json.loads((tmp_path / "step-000100/train_state/counters.json").read_text()) == training(100)[2]


@pytest.mark.gpu
def test_a_snapshot_of_a_gpu_is_of_the_moment_it_was_asked_for(tmp_path):
    saver = Saver(tmp_path, write_model, keep=9)
    for step in (100, 200):
        weights, state, counters = training(step)
        weights, state = ({name: t.cuda() for name, t in ts.items()} for ts in (weights, state))
        saver.save(step, weights, state, counters)
        for t in (*weights.values(), *state.values()):
            t.zero_()
        saver.close()
        assert_holds(tmp_path, step)
    assert all(t.is_pinned() for t in saver.tensors.values() if t.numel())
