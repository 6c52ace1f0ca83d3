"""R1 against R1-Zero: as accurate at least, in the form that was asked for, and in one language.

    python -m bench.r1 [CHAIN] [--quick] [--runs ZERO R1] [--minutes 15]

CHAIN is a quickstart's directory, whose pipeline.json names its models; --runs names two others instead. Without either
a quickstart is trained. Both models answer the same held-out problems, 4 attempts each at temperature 0.6. Rows: R1's
accuracy over R1-Zero's, R1's share of well-formed answers, and its share of thoughts in the prompt's language alone.
"""

import argparse
import json
from pathlib import Path

from bench import reasoning
from bench.r1_zero import spread
from bench.record import emit
from bench.table import show
from bench.training import flags, made
from shoal.cli.opened import model_folder
from shoal.errors import ConfigError
from shoal.run import PIPELINE, find

LIMITS = (1.0, 0.99, 0.99)
ZERO, R1 = "R1-Zero", "R1"  # as pipeline.json calls them


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chain", nargs="?", help="the directory of a quickstart")
    parser.add_argument("--quick", action="store_true", help="40 problems; a chain of a minute")
    parser.add_argument("--runs", nargs=2, metavar=("ZERO", "R1"), help="two runs, checkpoints or model folders")
    parser.add_argument("--minutes", type=float, help="of the whole chain, 15")
    args = parser.parse_args()
    minutes = args.minutes or (1.0 if args.quick else 15.0)
    models = [model_folder(name) for name in args.runs] if args.runs else of_chain(args.chain or chain(minutes))
    zero, r1 = (reasoning.solved(model, 40 if args.quick else 200, 4) for model in models)
    report(zero, r1, [str(model) for model in models])


def chain(minutes: float) -> Path:
    settings = {"minutes": f"{minutes:g}", "seed": "0", "threads": "2"}
    return made(["quickstart", *flags(settings)], f"chain_{minutes:g}min", reasoning.DECIDING)


def of_chain(name: Path | str) -> list[Path]:
    """R1-Zero's checkpoint and R1's. Raises ConfigError where the run is no chain, or not yet so far."""
    run = find(str(name))
    path = run.path / PIPELINE
    models = json.loads(path.read_text()).get("models", {}) if path.exists() else {}
    if not {ZERO, R1} <= models.keys():
        got = f"{run.path} with the models {', '.join(models) or '(none)'}"
        raise ConfigError(got, f"a finished quickstart, which has {ZERO} and {R1}", "give another, or --runs ZERO R1")
    return [run.path / models[ZERO], run.path / models[R1]]


def report(zero: reasoning.Solved, r1: reasoning.Solved, models: list[str]) -> None:
    show(
        ["", "pass@1", "95%", "format", "language"],
        [[name, s.accuracy, spread(s.found), s.form, s.language] for name, s in ((ZERO, zero), (R1, r1))],
    )
    emit(
        "r1",
        rows=["accuracy, R1 over R1-Zero", "format", "language"],
        ratio=[r1.accuracy / zero.accuracy if zero.accuracy else None, r1.form, r1.language],
        ours=[r1.accuracy, r1.form, r1.language],
        peer=[zero.accuracy, zero.form, zero.language],
        spread=[r1.interval, None, None],
        limit=list(LIMITS),
        intervals=[zero.interval, r1.interval],
        models=models,
        tasks=reasoning.TASKS,
        levels=reasoning.LEVELS,
    )


if __name__ == "__main__":
    main()
