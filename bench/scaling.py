"""Thinking longer: accuracy at growing budgets of thinking, and what a vote of 16 attempts adds.

    python -m bench.scaling [RUN] [--quick] [--budgets 0,8,16,32,64] [--items 200]

RUN is a model that reasons; without it, R1-Zero of the quickstart's base (`bench.r1_zero` shares it). Held-out
problems, 16 attempts each; at a budget the thinking is cut and the answer demanded. Two rows: the rise from the least
budget to the largest, which must be a rise at every step, and cons@16 − pass@1 with the largest. That one is taken over
all problems where pass@1 is under 90%, else over the tasks and levels where it is.
"""

import argparse
from itertools import pairwise
from pathlib import Path

from bench import r1_zero, reasoning
from bench.record import emit
from bench.table import show
from shoal.cli.opened import model_folder

LIMITS = (0.15, 0.05)
SAMPLES = 16
OPEN = 0.9  # pass@1 from which votes have nothing left to mend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a run, a checkpoint or a model folder")
    parser.add_argument("--quick", action="store_true", help="40 problems; without RUN half a minute of training each")
    parser.add_argument("--budgets", default="0,8,16,32,64", help="tokens of thinking, growing")
    parser.add_argument("--items", type=int, help="problems, 200")
    parser.add_argument("--temperature", type=float, default=0.6)
    args = parser.parse_args()
    model = model_folder(args.run) if args.run else trained(args.quick)
    items = args.items or (40 if args.quick else 200)
    found = reasoning.solved(model, items, SAMPLES, args.budgets, args.temperature)
    report(found, str(model), args.temperature)


def trained(quick: bool) -> Path:
    base = reasoning.base(0.5 if quick else r1_zero.BASE_MINUTES)
    return reasoning.zero(base, 0.5 if quick else 10.0)


def report(found: reasoning.Solved, model: str, temperature: float) -> None:
    points = [(point["budget"], point["rows"][0]) for point in found.found["budgets"]]
    show(
        ["budget", "pass@1", "95%", f"cons@{SAMPLES}", "tokens of thinking"],
        [[b, row["accuracy"], r1_zero.spread(row), row["cons_at_k"][-1], row["thinking_tokens"]] for b, row in points],
    )
    curve = [row["accuracy"] for _, row in points]
    rises = [after - before for before, after in pairwise(curve)]
    single, voted = votes(found.found["budgets"][-1]["rows"])
    show(["", "measured", "limit"], [["rise in all", curve[-1] - curve[0], LIMITS[0]], ["least rise", min(rises), 0.0]])
    emit(
        "scaling",
        rows=["rise with the budget", f"cons@{SAMPLES} over pass@1"],
        ratio=[curve[-1] - curve[0], None if single is None or voted is None else voted - single],
        ours=[curve[-1], voted],
        peer=[curve[0], single],
        spread=[[min(rises), max(rises)], None],
        limit=list(LIMITS),
        unit="share of held-out problems",
        budgets=[b for b, _ in points],
        accuracy=curve,
        rises_at_each=min(rises) > 0,
        intervals=[row["interval"] for _, row in points],
        cons=[row["cons_at_k"][-1] for _, row in points],
        thinking_tokens=[row["thinking_tokens"] for _, row in points],
        temperature=temperature,
        model=model,
    )


def votes(rows: list[dict]) -> tuple[float | None, float | None]:
    """pass@1 and cons@16 of all problems if there is room for votes, else of the tasks and levels where there is."""
    parts = [row for row in rows if row["level"] is not None]
    chosen = rows[:1] if rows[0]["accuracy"] < OPEN else [row for row in parts if row["accuracy"] < OPEN]
    n = sum(row["items"] for row in chosen)
    if not n:
        return None, None
    return (
        sum(row["items"] * row["accuracy"] for row in chosen) / n,
        sum(row["items"] * row["cons_at_k"][-1] for row in chosen) / n,
    )


if __name__ == "__main__":
    main()
