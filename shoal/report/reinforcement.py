"""What reinforcement did to a model: its part of the page of a `shoal rl` run.

Metrics are those of `post/rl.py`: rl/*, gap/*, and solved/TASK/LEVEL, the curriculum's running pass rates. A run
without rl/accuracy has no such part. What is missing is left out.
"""

from collections.abc import Callable, Sequence
from math import log10
from typing import Any

from shoal.report import curves, words
from shoal.report.dialogues import Dialogue
from shoal.report.facts import Facts, number
from shoal.report.plots import Chart, Line, Points, interpolated, smoothed

SOLVED = "solved/"
STRIPS = 24  # moments at which pass rates are shown
LEAST_KL = 1e-12  # what is less is shown as this, on a logarithmic axis
WINDOW = 0.1  # share of a run that a smoothed line looks at: steps are few and noisy

LINES: tuple[tuple[str, str, tuple[tuple[str, str, str], ...], Callable[[float], str], bool], ...] = (
    (
        "Right answers",
        "Of all answers drawn for training, what graders called right, and what had the form that was asked for.",
        (("right", "rl/accuracy", "a"), ("well-formed", "rl/format", "b")),
        words.share,
        True,
    ),
    ("Reward", "What the rules gave an answer, on average.", (("reward", "rl/reward", "a"),), "{:.2f}".format, False),
    (
        "Length of an answer",
        "Tokens of thinking and answer together.",
        (("tokens", "rl/length", "b"),),
        "{:.0f}".format,
        False,
    ),
    (
        "Entropy",
        "Nats a token: how open the model still is. Near nought it says the same each time, and nothing teaches it.",
        (("entropy", "rl/entropy", "c"),),
        "{:.2f}".format,
        False,
    ),
    (
        "What teaches",
        "Prompts whose answers differ in reward: from the others nothing can be learnt. Answers cut off at the end.",
        (("prompts that teach", "rl/teaching", "a"), ("answers cut off", "rl/unfinished", "c")),
        words.share,
        True,
    ),
)


def reinforced(f: Facts) -> bool:
    return "rl/accuracy" in f.series


def charts(f: Facts) -> list[Chart]:
    made = [line_chart(f, *what) for what in LINES] + [gap(f), curves.balance(f)]
    return [chart for chart in made if chart]


def line_chart(
    f: Facts, title: str, about: str, metrics: tuple, format_y: Callable[[float], str], is_share: bool
) -> Chart | None:
    raw = [(name, curves.over_time(f, metric), colour) for name, metric, colour in metrics]
    lines = [Line(name, smoothed(points, WINDOW), colour, faint=points) for name, points, colour in raw if points]
    if not lines:
        return None
    high = max(y for line in lines for _, y in line.points)
    tick, top = ("{:.0%}".format, 1.0) if is_share else (format_y, high)
    return Chart(title, about, lines, **curves.axis(f), format_y=format_y, format_tick=tick, y_range=(0, top))


def gap(f: Facts) -> Chart | None:
    points = [(x, log10(max(y, LEAST_KL))) for x, y in curves.over_time(f, "gap/k3")]
    if not points:
        return None
    about = "KL between the engine that draws and the trainer that learns, on the same weights (k3): rounding alone."
    line = Line("k3 a token", smoothed(points, WINDOW), "b", faint=points)
    return Chart("Engine against trainer", about, [line], **curves.axis(f), format_y=lambda y: f"{10**y:.1e}")


def levels(f: Facts) -> list[dict[str, Any]]:
    """A row for each task and level: its running pass rate at moments from first to last, hardest tasks at the end."""
    found = {name[len(SOLVED) :]: points for name, points in f.series.items() if name.startswith(SOLVED)}
    rows = [(name.replace("/", " "), strip(points, f)) for name, points in found.items()]
    return [{"name": name, "cells": cells, "last": cells[-1]["share"]} for name, cells in sorted(rows, key=easiest)]


def easiest(row: tuple[str, list[dict[str, float]]]) -> tuple[float, str]:
    return -row[1][-1]["share"], row[0]


def strip(points: Points, f: Facts) -> list[dict[str, float]]:
    steps = [step for step, _ in f.series["rl/accuracy"]]
    moments = [steps[0] + (steps[-1] - steps[0]) * i / (STRIPS - 1) for i in range(STRIPS)]
    return [{"share": interpolated(points, step), "known": float(step >= points[0][0])} for step in moments]


def verdict(f: Facts) -> list[str]:
    """The headline and what follows it: held-out problems before and after, and what it took."""
    before, after = (number(f.evals.get(name, {}).get("value")) for name in ("before", "after"))
    seconds = f.last("time/seconds")
    how = f" by reinforcement alone, in {words.duration(seconds)}" if seconds else " by reinforcement alone"
    if before is None or after is None:
        right = f.series["rl/accuracy"]
        return [f"Right answers in training: {words.share(right[0][1])} at first, {words.share(right[-1][1])} now{how}"]
    head = f"From {words.share(before)} to {words.share(after)} of held-out problems solved"
    return [head, f"It learnt{how}: nobody showed it a solution, graders said which answers are right."]


def tiles(f: Facts) -> list[tuple[str, str, str]]:
    """(label, figure, note) of the four numbers one looks for first."""
    after = number(f.evals.get("after", {}).get("value"))
    before = number(f.evals.get("before", {}).get("value"))
    seconds, rate = f.last("time/seconds"), f.last("speed/samples_per_second")
    length = f.series.get("rl/length", [])
    steps = len(f.series["rl/accuracy"])
    return [
        (
            "held-out problems",
            words.MISSING if after is None else words.share(after),
            "" if before is None else f"{words.share(before)} before",
        ),
        ("training time", words.duration(seconds) if seconds else words.MISSING, f"{steps:,} steps"),
        ("answers", f"{rate:,.0f} / s" if rate else words.MISSING, "drawn, graded and learnt from"),
        (
            "length of an answer",
            f"{length[-1][1]:.0f} tokens" if length else words.MISSING,
            f"{length[0][1]:.0f} at first" if length else "",
        ),
    ]


def talks(found: Sequence[Dialogue]) -> list[dict[str, Any]]:
    """Answers as the page shows them, clipped; the first and the last step that were kept."""
    return [
        {
            "step": d.step, "task": f"{d.task} {d.level or ''}".strip(), "prompt": d.prompt, "outcome": d.outcome,
            "thinking": clipped(d.thinking), "said": clipped(d.said), "reward": d.reward, "advantage": d.advantage,
        }
        for d in found
    ]  # fmt: skip


def clipped(text: str) -> str:
    over = len(text) - words.LONGEST
    return text if over <= 0 else f"{text[: words.LONGEST]}\n… {over:,} characters more"
