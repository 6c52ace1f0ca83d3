"""Distillation against reinforcement: one small base, taught by a larger reasoner or left to itself, equally long.

    python -m bench.distill [--quick] [--teacher RUN] [--minutes 5] [--seeds 3]

The student is a base of the smallest preset by the quickstart's recipe, the same for both ways. One learns the right
answers of the teacher; all of its time counts, that of asking included. The other gets reinforcement (`shoal rl
r1_zero`) for as long, on the same two threads. The teacher is R1-Zero of the quickstart's base unless one is given;
what it cost is not counted, as in R1's comparison (arXiv 2501.12948, section 4.1), which distilling won. `ratio` is
the difference in pass@1 on held-out problems, 4 attempts each: the figure is published, whatever it says.
"""

import argparse
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import median

from bench import r1_zero, reasoning
from bench.reasoning import DECIDING, Solved
from bench.record import emit
from bench.shape import THREADS
from bench.table import show
from bench.training import RUNS, code, flags, made
from shoal import config as configs
from shoal.cli.opened import model_folder
from shoal.model.presets import PRESETS
from shoal.recipes.quickstart import STUDENT
from shoal.run import Run

ANSWERS = 2  # of the teacher to each problem
PROBLEMS_A_MINUTE = 600  # that the teacher is asked, for each minute of learning


@dataclass(frozen=True)
class Race:
    """What one student solves at last: taught, and by reinforcement alone, after as many minutes."""

    taught: Solved
    alone: Solved
    minutes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of a minute of each training, one seed")
    parser.add_argument("--teacher", help="a run, a checkpoint or a model folder")
    parser.add_argument("--minutes", type=float, help="of learning the teacher's answers, 5")
    parser.add_argument("--seeds", type=int, help="3")
    args = parser.parse_args()
    minutes, items = args.minutes or (0.25 if args.quick else 5.0), 40 if args.quick else 200
    before = 0.5 if args.quick else r1_zero.BASE_MINUTES
    teacher = model_folder(args.teacher or str(reasoning.zero(reasoning.base(before), 2 * before))).resolve()
    base = student(before)
    found = [race(teacher, base, minutes, seed, items) for seed in range(args.seeds or (1 if args.quick else 3))]
    report(found, reasoning.solved(teacher, items, 4), reasoning.solved(base, items, 4), minutes)


def student(minutes: float) -> Path:
    """A base of the smallest preset, which has seen what the teacher's base has seen."""
    RUNS.mkdir(parents=True, exist_ok=True)
    shape = RUNS / f"{STUDENT}.toml"
    shape.write_text("[model]\n" + configs.to_toml(PRESETS[STUDENT]).replace("[", "[model."))
    settings = {"minutes": f"{minutes:g}", "seed": "0", "threads": f"{THREADS}"}
    words = ["pretrain", "quickstart", "-c", str(shape), *flags(settings)]
    return made(words, f"student_{minutes:g}min", DECIDING)


def race(teacher: Path, base: Path, minutes: float, seed: int, items: int) -> Race:
    asked = f"{reasoning.TASKS}:{max(100, int(PROBLEMS_A_MINUTE * minutes))}"
    settings = {
        "teacher": str(teacher), "student": str(base), "prompts": asked, "levels": reasoning.LEVELS,
        "samples": f"{ANSWERS}", "sampling.max_tokens": f"{reasoning.MAX_TOKENS}", "epochs": "none",
        "minutes": f"{minutes:g}", "seed": f"{seed}", "threads": f"{THREADS}",
    }  # fmt: skip
    taught = made(["distill", *flags(settings)], f"distilled_{minutes:g}min_seed{seed}", DECIDING)
    took = round(whole_minutes(taught), 2)
    alone = reasoning.zero(base, took, seed)
    return Race(reasoning.solved(taught, items, 4), reasoning.solved(alone, items, 4), took)


def whole_minutes(path: Path) -> float:
    """From the first word of a run to its last."""
    status = Run.open(path).status()
    began, ended = (datetime.fromisoformat(status[name]) for name in ("created", "updated"))
    return (ended - began).total_seconds() / 60


def report(found: list[Race], teacher: Solved, base: Solved, minutes: float) -> None:
    show(
        ["seed", "minutes", "distilled", "95%", "reinforced", "95%", "student's base", "teacher"],
        [
            [
                seed, r.minutes, r.taught.accuracy, r1_zero.spread(r.taught.found), r.alone.accuracy,
                r1_zero.spread(r.alone.found), base.accuracy, teacher.accuracy,
            ]
            for seed, r in enumerate(found)
        ],
    )  # fmt: skip
    ahead = [r.taught.accuracy - r.alone.accuracy for r in found]
    emit(
        "distill",
        ratio=median(ahead),
        ours=[r.taught.accuracy for r in found],
        peer=[r.alone.accuracy for r in found],
        spread=[min(ahead), max(ahead)],
        limit=None,
        unit="share of held-out problems, pass@1",
        intervals={"distilled": [r.taught.interval for r in found], "alone": [r.alone.interval for r in found]},
        teacher=teacher.accuracy,
        base=base.accuracy,
        minutes_of_learning=minutes,
        minutes=[r.minutes for r in found],
        preset=STUDENT,
        code=code(DECIDING),
    )


if __name__ == "__main__":
    main()
