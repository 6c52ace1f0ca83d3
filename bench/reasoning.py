"""Models that reason, made and asked as a user would: the base, what reinforcement makes of it, held-out problems.

Runs lie under runs/bench/, named by everything that decides them, and are trained once (`bench/training.py`). Problems
are those of the quickstart. A score is taken of the held-out split, which no recipe ever trains on.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from bench.shape import THREADS
from bench.training import ROOMS, TrainingFailed, flags, made
from shoal.post.rewards import consistent, well_formed
from shoal.tasks.catalog import QUICK_LEVELS, QUICK_TASKS

DECIDING = (*ROOMS, "engine/**/*", "evals/**/*", "post/**/*")
TASKS, LEVELS = ",".join(QUICK_TASKS), ",".join(map(str, QUICK_LEVELS))
ASKED = {"tasks": TASKS, "levels": LEVELS}
MAX_TOKENS = 128  # of a completion, as in training


def base(minutes: float, seed: int = 0) -> Path:
    """A base model by the quickstart's recipe: it has seen worked solutions among many without."""
    words = ["quickstart", "--stages", "base", *flags({"minutes": f"{minutes:g}", "seed": f"{seed}", "threads": "2"})]
    return made(words, f"base_{minutes:g}min_seed{seed}", DECIDING)


def zero(model: Path, minutes: float, seed: int = 0) -> Path:
    """R1-Zero of it: reinforcement alone."""
    settings = {"model": str(model), **ASKED, "minutes": f"{minutes:g}", "seed": f"{seed}", "threads": f"{THREADS}"}
    return made(["rl", "r1_zero", *flags(settings)], f"zero_{minutes:g}min_seed{seed}", DECIDING)


@dataclass(frozen=True)
class Solved:
    """An evaluation: `found` is its record, `attempts` its lines (`evals/record.py`)."""

    found: dict
    attempts: list[dict]

    @property
    def accuracy(self) -> float:
        return self.found["value"]

    @property
    def interval(self) -> list[float]:
        return self.found["interval"]

    @property
    def completions(self) -> list[tuple[str, str]]:
        """(prompt, completion)."""
        return [(a["prompt"], a["thinking"] + a["said"]) for a in self.attempts]

    @property
    def form(self) -> float:
        """The share of attempts in the form that was asked for."""
        return sum(well_formed(text) for _, text in self.completions) / len(self.attempts)

    @property
    def language(self) -> float:
        """The share whose thinking is wholly in the language of its prompt."""
        return sum(consistent(prompt, text) for prompt, text in self.completions) / len(self.attempts)


def solved(model: Path | str, items: int, samples: int, budgets: str = "free", temperature: float = 0.6) -> Solved:
    """`shoal eval` of a model on held-out problems; `budgets` as it takes them."""
    settings = {
        **ASKED, "items": f"{items}", "samples": f"{samples}", "budgets": budgets, "max-tokens": f"{MAX_TOKENS}",
        "temperature": f"{temperature:g}", "threads": f"{THREADS}",
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        words = ["eval", str(model), *flags(settings), "--json", "--out", folder]
        print(f"  shoal {' '.join(words)}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", "shoal.cli.main", *words],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": f"{THREADS}"},
        )
        if done.returncode:
            raise TrainingFailed(f"exit code {done.returncode}:\n{done.stderr[-1500:]}")
        lines = (Path(folder) / "tasks.jsonl").read_bytes().split(b"\n")[:-1]
        return Solved(json.loads((Path(folder) / "tasks.json").read_text()), [json.loads(line) for line in lines])
