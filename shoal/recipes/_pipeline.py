"""Stages in a row, each a run of its own: done once, resumed where it stopped, its inputs and minutes written down.

    RUN/pipeline.json             what there is to do, what is done, and which stage's model is the whole's
    RUN/stages/1_cold_start/      config, metrics, checkpoints, report: a run like any other
    RUN/stages/2_reasoning/       …

    {"minutes": 15, "steps": null, "model": "stages/6_r1", "stages": [{"name", "folder", "kind", "state", "inputs":
     {path: hash of its content}, "output", "minutes": {"predicted", "used"}, "facts": {…}}, …]}

A pipeline is plain code that calls stages in order. Called again, a stage that is done hands back what it made, after a
look at whether its inputs are still those it was made of; one that was interrupted goes on by its own resume, to the
bit where its budget is steps. Paths are relative to RUN. `used` counts sittings that ended by themselves; what a kill
cut off is not in it.
"""

import json
import shlex
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from shoal import config as configs
from shoal.errors import CheckpointError, RunError
from shoal.recipes._teller import Teller
from shoal.report import page
from shoal.run import PIPELINE, Run, replace_text
from shoal.train.checkpoint import newest


class Stopped(Exception):
    """Somebody asked to stop; what was under way is saved."""


@dataclass(frozen=True)
class Budget:
    """Minutes for the whole, shared out by stage; or so many steps for every stage that trains."""

    shares: dict[str, float]
    minutes: float | None = None
    steps: int | None = None

    def of(self, name: str) -> dict[str, Any]:
        """As the settings of a stage want it."""
        return {"minutes": None if self.minutes is None else self.minutes * self.shares[name], "steps": self.steps}

    def __str__(self) -> str:
        if self.minutes is None:
            return f"{self.steps} steps for each of {', '.join(self.shares)}"
        shares = ", ".join(f"{name} {60 * self.minutes * share:.0f} s" for name, share in self.shares.items())
        return f"{self.minutes:g} minutes: {shares}"


@dataclass
class Pipeline:
    """The caller holds the lock of `run`."""

    run: Run
    budget: Budget
    teller: Teller
    device: str
    threads: int

    def __post_init__(self):
        self.number = 0
        self.table = self.run.pipeline() or {"stages": []}
        self.note(minutes=self.budget.minutes, steps=self.budget.steps)

    def note(self, **facts: Any) -> None:
        self.table |= facts
        replace_text(self.run.path / PIPELINE, json.dumps(self.table, indent=1, ensure_ascii=False) + "\n")

    def stage(
        self,
        name: str,
        kind: str,
        config: Any,
        inputs: Sequence[Path],
        work: Callable[[Run, bool], tuple[Path, dict]],
    ) -> Path:
        """What `work(run, resume)` made: its path, and facts to keep. Raises Stopped, RunError for other inputs."""
        self.number += 1
        path = self.run.path / "stages" / f"{self.number}_{name}"
        row = self.row(name, path, kind)
        given = {self.relative(folder): identity(folder) for folder in inputs}
        if row["state"] == "done":
            return self.again(row, given)
        resume = (path / "config.toml").exists()
        if not resume:
            shutil.rmtree(path, ignore_errors=True)
        command = shlex.split((self.run.path / "command.txt").read_text())
        _, origins = configs.load(config, origin=f"stage {name}")
        run = Run.open(path) if resume else Run.create(kind, path, config, origins, command)
        self.teller.say(f"stage    {path.name}{', resumed' if resume else ''}")
        self.run.status(state=f"stage {path.name}")
        row |= {"state": "running", "inputs": given}
        row["minutes"]["predicted"] = self.budget.of(name)["minutes"] if name in self.budget.shares else None
        self.note()
        began = time.monotonic()
        try:
            with run.lock():
                made, facts = work(run, resume)
                page.write(path)
            row |= {"state": "done", "output": self.relative(made), "sha256": identity(made), "facts": facts}
        except Stopped:
            self.run.status(state="stopped")
            raise
        except BaseException as error:
            for each in (run, self.run):
                each.status(state="failed", error=str(error) or type(error).__name__)
            raise
        finally:
            row["minutes"]["used"] += (time.monotonic() - began) / 60
            self.note()
        return made

    def row(self, name: str, path: Path, kind: str) -> dict:
        """The line of a stage in the table, made where there is none."""
        folder = self.relative(path)
        for row in self.table["stages"]:
            if row["folder"] == folder:
                return row
        row = {"name": name, "folder": folder, "kind": kind, "state": "asked"}
        self.table["stages"].append(row | {"minutes": {"predicted": None, "used": 0.0}})
        return self.table["stages"][-1]

    def again(self, row: dict, given: dict[str, str]) -> Path:
        """What a stage that is done had made, when it is still the same and was made of the same."""
        made = self.run.path / row["output"]
        if given != row["inputs"] or not made.exists() or identity(made) != row["sha256"]:
            got = f"{row['folder']} of {self.run.id}, whose input or output changed since it was done"
            raise RunError(got, "stages as they were left", "restore them, or start a new run")
        return made

    def relative(self, path: Path) -> str:
        path = path.absolute()
        return str(path.relative_to(self.run.path)) if path.is_relative_to(self.run.path) else str(path)


def checkpoint_of(run: Run) -> Path:
    """The newest whole checkpoint of a run. Raises CheckpointError."""
    found, refused = newest(run.checkpoints)
    if found is None:
        why = "; ".join(f"{path.name}: {why}" for path, why in refused) or "none was written"
        raise CheckpointError(f"no whole checkpoint in {run.path} ({why})", "one", "resume that stage")
    return found.path


def identity(path: Path) -> str:
    """SHA-256 of a file; of a folder that of its manifest, or where it has none of its config.json."""
    if path.is_dir():
        path = next((f for name in ("manifest.json", "config.json") if (f := path / name).exists()), path)
    return sha256(path.read_bytes()).hexdigest()
