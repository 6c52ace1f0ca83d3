"""R1-Zero: how many more held-out problems a base solves after reinforcement alone, by `shoal rl r1_zero`.

    python -m bench.r1_zero [--quick] [--base RUN] [--minutes 10] [--seeds 3]

One base, pretrained by the quickstart's recipe unless one is given; a run of reinforcement for each seed. `ratio` is
the rise of pass@1 (after − before, in shares) of the median seed. Nothing labelled is shown after pretraining: graders
say right or wrong. Before and after are the run's own: 200 held-out problems, 4 attempts each, at temperature 0.6.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench import reasoning
from bench.record import emit
from bench.table import show
from bench.training import code
from shoal.cli.opened import model_folder
from shoal.run import Run

LIMIT = 0.40
BASE_MINUTES = 5.0


@dataclass(frozen=True)
class Rise:
    """Of one run: what was solved before and after, with 95% intervals, and how long answers in training were."""

    before: dict
    after: dict
    lengths: list[float]
    minutes: float

    @classmethod
    def of(cls, path: Path) -> "Rise":
        run = Run.open(path)
        before, after = (json.loads((run.evals / f"{name}.json").read_text()) for name in ("before", "after"))
        return cls(before, after, run.series("rl/length")[1], run.series("time/seconds")[1][-1] / 60)

    @property
    def points(self) -> float:
        return self.after["value"] - self.before["value"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="half a minute of pretraining and of reinforcement, one seed"
    )
    parser.add_argument("--base", help="a run, a checkpoint or a model folder to start from")
    parser.add_argument("--minutes", type=float, help="of reinforcement, 10")
    parser.add_argument("--seeds", type=int, help="3")
    args = parser.parse_args()
    minutes, seeds = args.minutes or (0.5 if args.quick else 10.0), args.seeds or (1 if args.quick else 3)
    base = model_folder(args.base).resolve() if args.base else reasoning.base(0.5 if args.quick else BASE_MINUTES)
    report([Rise.of(reasoning.zero(base, minutes, seed)) for seed in range(seeds)], str(base), minutes)


def report(found: list[Rise], base: str, minutes: float) -> None:
    show(
        ["seed", "before", "95%", "after", "95%", "rise", "tokens at first", "at last", "minutes"],
        [
            [
                seed, r.before["value"], spread(r.before), r.after["value"], spread(r.after), r.points,
                mean(r.lengths[:5]), mean(r.lengths[-5:]), r.minutes,
            ]
            for seed, r in enumerate(found)
        ],
    )  # fmt: skip
    rises = [r.points for r in found]
    emit(
        "r1_zero",
        ratio=median(rises),
        ours=[r.after["value"] for r in found],
        peer=[r.before["value"] for r in found],
        spread=[min(rises), max(rises)],
        limit=LIMIT,
        unit="share of held-out problems, pass@1",
        intervals={"before": [r.before["interval"] for r in found], "after": [r.after["interval"] for r in found]},
        lengths=[r.lengths for r in found],
        minutes=minutes,
        base=base,
        tasks=reasoning.TASKS,
        levels=reasoning.LEVELS,
        code=code(reasoning.DECIDING),
    )


def spread(record: dict) -> str:
    return "{:.3f}–{:.3f}".format(*record["interval"])


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
