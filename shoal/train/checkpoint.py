"""Checkpoints: whole or absent, and almost free for the loop that asks for them.

    checkpoints/step-000400/
      config.json  model*.safetensors  tokenizer.json …    a Hugging Face model folder, written by the caller's function
      train_state/state.safetensors  counters.json         what training needs besides: fp32 masters, moments, position
      manifest.json                                        size and SHA-256 of every file above

Everything is written into a hidden sibling and synced, the manifest last; one rename publishes it. So a kill at any
moment leaves the old checkpoint or the new one, and a folder without a dot is whole unless a disk damaged it later:
`newest` checks, and says what it refused and why.

`Saver` stalls training only while it copies tensors into host buffers that are allocated once (pinned where they come
from a GPU). A thread of low priority does the rest (of the lowest it would starve beside busy neighbours); a process
that ends waits for it. The price is memory for a second copy; forking for a copy-on-write snapshot would spare it, but
a fork of a process with OpenMP and CUDA threads is a gamble.

One saver a folder: the run's lock sees to that, so hidden folders found at the start belong to the dead.
"""

import errno
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from shoal.errors import CheckpointError, ResourceError
from shoal.model.hf_files import Planned, write_json, write_safetensors
from shoal.train import manifest

STATE, COUNTERS = "train_state/state.safetensors", "train_state/counters.json"
SPARE_BYTES = 16 << 20  # room for the small files: config, tokenizer, headers
OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MAKE_ROOM = "free some space or keep fewer checkpoints, then continue with --resume"


class Checkpoint(NamedTuple):
    """A checkpoint that `newest` found whole. `path` is also a model folder."""

    path: Path
    step: int

    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path / STATE)

    @property
    def counters(self) -> dict:
        return json.loads((self.path / COUNTERS).read_text())


class Refused(NamedTuple):
    path: Path
    why: str


def newest(root: Path) -> tuple[Checkpoint | None, list[Refused]]:
    """The newest whole checkpoint below `root`, every byte checked, and the newer ones that are not whole."""
    refused = []
    for step, path in reversed(steps(root)):
        if not (faults := manifest.faults(path, step)):
            return Checkpoint(path, step), refused
        refused.append(Refused(path, "; ".join(faults)))
    return None, refused


def steps(root: Path) -> list[tuple[int, Path]]:
    """Published checkpoints, whole or not, oldest first."""
    found = ((re.fullmatch(r"step-(\d{6,})", path.name), path) for path in root.glob("step-*"))
    return sorted((int(match[1]), path) for match, path in found if match)


class Saver:
    """Saves while training goes on. `write_model(weights, folder)` writes a model folder; it runs in a thread.

    A save that failed raises at the next `save`, `check`, or `close`; the checkpoints before it are untouched.
    """

    def __init__(self, root: Path, write_model: Callable[[dict[str, Tensor], Path], None], keep: int):
        assert keep >= 1, keep
        self.root, self.write_model, self.keep = root, write_model, keep
        self.weights: dict[str, Tensor] = {}
        self.tensors: dict[str, Tensor] = {}
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".step-*"):
            shutil.rmtree(leftover)

    def save(self, step: int, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], counters: dict) -> None:
        """Return as soon as everything is copied. Waits for a save that is still being written."""
        self.close()
        require_room(self.root, step, sum(t.nbytes for t in (*weights.values(), *tensors.values())))
        self.weights = snapshot(weights, self.weights)
        self.tensors = snapshot(tensors, self.tensors)
        if any(t.is_cuda for t in (*weights.values(), *tensors.values())):
            torch.cuda.synchronize()
        self.thread = threading.Thread(target=self._write, args=(step, json.dumps(counters)))
        self.thread.start()

    def check(self) -> None:
        """Raise what went wrong in the background, if anything did. Costs nothing: call it every step."""
        if self.failure:
            failure, self.failure = self.failure, None
            raise failure

    def close(self) -> None:
        """Wait until the last save is on the disk."""
        if self.thread:
            self.thread.join()
        self.thread = None
        self.check()

    def _write(self, step: int, counters: str) -> None:
        try:
            if sys.platform == "linux":  # where priority is a thread's own
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
            write_model = partial(self.write_model, self.weights)
            save(self.root, step, write_model, self.tensors, json.loads(counters), self.keep)
        except BaseException as error:  # the thread ends here; the loop hears of it
            self.failure = error


def save(
    root: Path, step: int, write_model: Callable[[Path], None], tensors: dict[str, Tensor], counters: dict, keep: int
) -> None:
    """Write one checkpoint and return when it is on the disk; then keep the `keep` newest.

    A whole checkpoint of the same step stays as it is: a run is deterministic and continues from its newest, so it
    holds this state. A damaged one is replaced. ResourceError: the disk is full. CheckpointError: it fails.
    """
    final, temporary = root / f"step-{step:06d}", root / f".step-{step:06d}.tmp"
    try:
        if not final.exists() or manifest.faults(final, step):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary, step, write_model, tensors, counters)
            discard(final)
            os.rename(temporary, final)
            manifest.sync_directory(root)
        for _, old in [found for found in steps(root) if found[0] <= step][:-keep]:
            discard(old)
    except OSError as error:
        raise explained(error, final) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write(
    folder: Path, step: int, write_model: Callable[[Path], None], tensors: dict[str, Tensor], counters: dict
) -> None:
    write_model(folder)
    (folder / STATE).parent.mkdir()
    planned = [
        Planned(name, t.dtype, tuple(t.shape), partial(tensors.__getitem__, name)) for name, t in tensors.items()
    ]
    write_safetensors(folder / STATE, planned)
    write_json(folder / COUNTERS, counters)
    manifest.seal(folder, step)


def snapshot(tensors: Mapping[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the host, into last time's buffers where they fit. From a GPU the copies are still under way."""
    return {name: host_buffer(t, buffers.get(name)).copy_(t.detach(), non_blocking=True) for name, t in tensors.items()}


def host_buffer(t: Tensor, last: Tensor | None) -> Tensor:
    if last is not None and last.shape == t.shape and last.dtype == t.dtype:
        return last
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)


def discard(folder: Path) -> None:
    """Hide first, then delete: a kill in between leaves nothing that looks like a damaged checkpoint."""
    if folder.exists():
        hidden = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(hidden, ignore_errors=True)
        os.rename(folder, hidden)
        shutil.rmtree(hidden)


def require_room(root: Path, step: int, n_bytes: int) -> None:
    free, needed = shutil.disk_usage(root).free, n_bytes + SPARE_BYTES
    if free < needed:
        got = f"{free / 2**20:,.0f} MiB free in {root}, too little to save step {step}; earlier checkpoints are intact"
        raise ResourceError(got, f"{needed / 2**20:,.0f} MiB", MAKE_ROOM)


def explained(error: OSError, final: Path) -> CheckpointError | ResourceError:
    got = f"{error}, while writing {final}; earlier checkpoints are intact"
    if error.errno in OUT_OF_SPACE:
        return ResourceError(f"the disk is full: {got}", "room for one more checkpoint", MAKE_ROOM)
    fix = "look at the disk (dmesg) and its permissions, then continue with --resume"
    return CheckpointError(f"the disk refused: {got}", "a disk that takes writes", fix)
