"""Whole training runs as measurements: a verb of Shoal in a process of its own, its record read afterwards.

A run's directory under runs/bench/ is named by everything that decides its outcome (the content of `shoal/`,
the recipe, minutes, seed and flags), so a bench that was interrupted, or that shares runs with another one, trains only
what is missing. Trainings can't take turns by the step; benches alternate whole runs and repeat them with other seeds.
"""

import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from shutil import rmtree

import shoal
from bench.shape import THREADS
from shoal.run import Run

RUNS = Path("runs/bench")
DATA = {"data.sources": "python-stdlib", "data.val_suffixes": "f"}  # the figure's text: the library alone
SCORE = "eval/bits_per_byte"
ROOMS = ("*.py", *(f"{room}/**/*" for room in ("data", "model", "ops", "plan", "recipes", "tasks", "train")))


@dataclass(frozen=True)
class Recipe:
    """A row of a table of trainings: a recipe of Shoal's with settings changed."""

    name: str
    recipe: str
    changes: dict[str, str] = field(default_factory=dict)  # by dotted key


@dataclass(frozen=True)
class Trained:
    """How a run ended. `bits_per_byte` is of all held-out text (scores on the way there read a part of it only);
    `seconds` are those of training, the start from pair statistics included.
    """

    bits_per_byte: float
    seconds: float
    tokens: float


class TrainingFailed(Exception):
    """A verb ended with an error, or without what was asked of it. Holds the end of what it said."""


def train(row: Recipe, minutes: float, seed: int = 0, again: bool = False) -> Trained:
    """The finished run of these settings, trained now unless it is there already (and `again` is false)."""
    settings = {"minutes": f"{minutes:g}", "seed": str(seed), "threads": str(THREADS), **DATA, **row.changes}
    asked = ["pretrain", row.recipe, *flags(settings)]
    return read(made(asked, f"{row.name.replace(' ', '-')}_{minutes:g}min_seed{seed}", again=again))


def flags(settings: Mapping[str, str]) -> list[str]:
    return [word for key, value in settings.items() for word in (f"--{key}", value)]


def made(asked: list[str], name: str, rooms: tuple[str, ...] = ROOMS, again: bool = False) -> Path:
    """The run of `shoal ASKED`, which `rooms` of the source decide about: made now unless it is there, finished."""
    key = hashlib.sha256(" ".join([code(rooms), *asked]).encode()).hexdigest()[:8]
    path = RUNS / f"{name}_{key}"
    if again or not finished(path):
        rmtree(path, ignore_errors=True)
        launch([*asked, "--out", str(path)], path.with_name(f"{path.name}.log"))
    if not finished(path):
        raise TrainingFailed(f"the run was stopped, see {path}")
    return path


def launch(words: list[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"  shoal {' '.join(words)}", flush=True)
    began = time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(
            [sys.executable, "-m", "shoal.cli.main", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": str(THREADS)},
        )
    print(f"    {time.monotonic() - began:.0f} s with start and end", flush=True)
    if done.returncode:
        raise TrainingFailed(f"exit code {done.returncode}:\n{log.read_text()[-1500:]}")


def finished(path: Path) -> bool:
    return (path / "config.toml").exists() and Run.open(path).status().get("state") == "done"


def read(path: Path) -> Trained:
    last = {name: value for line in Run.open(path).metrics() for name, value in line.items()}
    if SCORE not in last:
        raise TrainingFailed(f"the run ended without a held-out score, see {path}")
    return Trained(last[SCORE], last["time/seconds"], last["train/tokens"])


@cache
def code(rooms: tuple[str, ...] = ROOMS) -> str:
    """A hash of the source that trains, as it stands, committed or not."""
    root = Path(next(iter(shoal.__path__)))
    files = sorted(p for room in rooms for p in root.glob(room) if p.suffix in (".py", ".c", ".h"))
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]
