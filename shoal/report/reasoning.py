"""How well a model solves problems: charts and a table from evaluations that say `budgets` (evals/record.py).

One evaluation is shown in full: pass@1 and votes. Several, as of the stages of a recipe, stand side by side, a line for
each. An item is a held-out problem; whatever isn't a number where one should be is left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log2
from typing import Any

from shoal.report.facts import Facts, items, number, numbers
from shoal.report.plots import Chart, Line
from shoal.report.words import MISSING, share, text

COLOURS = ("a", "b", "c", "d")
TICKS = (0, 4, 16, 64, 256, 1024, 4096, 16384, 65536)  # tokens of thinking
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Evaluation:
    """`points` are (budget in words, rows), the last one with the most thinking."""

    name: str
    points: list[tuple[str, list[Row]]]

    @property
    def rows(self) -> list[Row]:
        return self.points[-1][1]


def evaluations(facts: Facts) -> list[Evaluation]:
    found = []
    for stem, record in facts.by_step():
        points = [(budget(p), rows) for p in items(record, "budgets") if isinstance(p, dict) and (rows := rows_of(p))]
        if points:
            found.append(Evaluation(text(record.get("name")) or stem, points))
    return found


def rows_of(point: Row) -> list[Row]:
    return [row for row in items(point, "rows") if isinstance(row, dict)]


def budget(point: Row) -> str:
    n = number(point.get("budget"))
    return "free" if n is None else f"{n:,.0f}"


def charts(found: Sequence[Evaluation]) -> list[Chart]:
    return [chart for make in (scaling, attempts, levels) if (chart := make(found[: len(COLOURS)]))]


def scaling(found: Sequence[Evaluation]) -> Chart | None:
    """Accuracy against tokens of thinking; the x axis is logarithmic, from nought."""
    lines = [
        line(e.name, [(place(rows[0]), rows[0]) for _, rows in e.points], colour)
        for e, colour in zip(found, COLOURS)
        if len(e.points) > 1
    ]
    if len(found) == 1 and lines:
        votes = [(place(rows[0]), last(rows[0], "cons_at_k")) for _, rows in found[0].points]
        lines = [named("one attempt", lines[0])]
        if (k := most_k(found[0].rows[0])) > 1:
            lines.append(Line(f"majority of {k}", known(votes), "b", dots=True))
    lines = [it for it in lines if len(it.points) > 1]
    if not lines:
        return None
    about = "Share of held-out problems solved with as many tokens of thinking, a point a budget; bands hold 95%."
    high = max(x for it in lines for x, _ in it.points)
    ticks = [log2(1 + t) for t in TICKS if log2(1 + t) <= high + 0.01]
    words = {"x_unit": "tokens of thinking", "ticks": ticks, "format_x": lambda x: f"{2**x - 1:,.0f}"}
    return Chart("Thinking longer", about, lines, **words, format_y=share, format_tick="{:.0%}".format, y_range=(0, 1))


def attempts(found: Sequence[Evaluation]) -> Chart | None:
    """pass@k, and for one evaluation cons@k, with the most thinking."""
    lines = [Line(e.name, over_k(e.rows[0], "pass_at_k"), colour, dots=True) for e, colour in zip(found, COLOURS)]
    if len(found) == 1:
        votes = Line("the majority is right", over_k(found[0].rows[0], "cons_at_k"), "b", dots=True)
        lines = [named("one of k is right", lines[0]), votes]
    lines = [it for it in lines if len(it.points) > 1]
    if not lines:
        return None
    about = "If a problem is tried k times: the share with a right attempt among them" + (
        ", and where the most frequent answer is right." if len(found) == 1 else "."
    )
    ticks = sorted({x for it in lines for x, _ in it.points})
    words = {"x_unit": "attempts", "ticks": ticks, "format_x": lambda x: f"{2**x:.0f}"}
    return Chart("More attempts", about, lines, **words, format_y=share, format_tick="{:.0%}".format, y_range=(0, 1))


def levels(found: Sequence[Evaluation]) -> Chart | None:
    """Accuracy by difficulty: of one evaluation for each task, of several or with many tasks for all together."""
    lines = [Line(e.name, by_level(e.rows), colour, dots=True) for e, colour in zip(found, COLOURS)]
    if len(found) == 1:
        rows = [row for row in found[0].rows if row.get("task") and number(row.get("level")) is not None]
        tasks = list(dict.fromkeys(text(row["task"]) for row in rows))
        each = [[(number(row["level"]) or 0.0, row) for row in rows if row["task"] == task] for task in tasks]
        lines = [line(*of) for of in zip(tasks, each, COLOURS)] if len(tasks) <= len(COLOURS) else lines
        lines = lines if len(tasks) <= len(COLOURS) else [named("all tasks", lines[0])]
    lines = [it for it in lines if len(it.points) > 1]
    if not lines:
        return None
    ticks = sorted({x for it in lines for x, _ in it.points})
    words = {"x_unit": "level", "ticks": ticks, "format_x": "{:g}".format}
    about = "Share of held-out problems solved in one attempt, by difficulty."
    return Chart("Harder problems", about, lines, **words, format_y=share, format_tick="{:.0%}".format, y_range=(0, 1))


def line(name: str, rows: Sequence[tuple[float | None, Row]], colour: str) -> Line:
    """Accuracies at their places, in order, with a band where intervals are known."""
    points = known((x, number(row.get("accuracy"))) for x, row in rows)
    ends = [(x, numbers(row.get("interval"))) for x, row in rows]
    band = sorted((x, of[0], of[1]) for x, of in ends if x is not None and len(of) == 2)
    return Line(name, points, colour, dots=True, band=band)


def named(name: str, line: Line) -> Line:
    return Line(name, line.points, line.colour, dots=True, band=line.band)


def place(row: Row) -> float | None:
    tokens = number(row.get("thinking_tokens"))
    return None if tokens is None else log2(1 + max(0.0, tokens))


def known(points: Any) -> list[tuple[float, float]]:
    return sorted((x, y) for x, y in points if x is not None and y is not None)


def over_k(row: Row, name: str) -> list[tuple[float, float]]:
    ks, values = numbers(row.get("k")), numbers(row.get(name))
    return sorted((log2(k), y) for k, y in zip(ks, values) if k >= 1)


def by_level(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """The mean over the problems of a level, whatever their task."""
    sums: dict[float, tuple[float, float]] = {}
    for row in rows:
        level, accuracy, n = (number(row.get(name)) for name in ("level", "accuracy", "items"))
        if level is not None and accuracy is not None and n and n > 0:
            before = sums.get(level, (0.0, 0.0))
            sums[level] = before[0] + n * accuracy, before[1] + n
    return [(level, total / n) for level, (total, n) in sorted(sums.items())]


def most_k(row: Row) -> int:
    return int(max(numbers(row.get("k")), default=0))


def last(row: Row, name: str) -> float | None:
    values = numbers(row.get(name))
    return values[-1] if values else None


def tables(found: Sequence[Evaluation]) -> Iterator[dict[str, Any]]:
    """Each evaluation as {name, head, rows} of words: accuracy by task and level, a column for each budget."""
    for e in found:
        k = most_k(e.rows[0])
        budgets = [name for name, _ in e.points]
        thinking = ["in one attempt"] if len(budgets) == 1 else [f"thinking {name}" for name in budgets]
        more = [f"one of {k}", f"majority of {k}"] if k > 1 else []
        rows = []
        for of in zip(*(rows for _, rows in e.points)):
            names = [words_of(of[-1].get("task")), words_of(of[-1].get("level")), words_of(of[-1].get("items"))]
            votes = [score(last(of[-1], name)) for name in ("pass_at_k", "cons_at_k")] if k > 1 else []
            rows.append([*names, *(score(number(row.get("accuracy"))) for row in of), *votes])
        yield {"name": e.name, "head": ["task", "level", "problems", *thinking, *more], "rows": rows}


def words_of(value: object) -> str:
    return "all" if value is None else f"{n:g}" if (n := number(value)) is not None else text(value)


def score(value: float | None) -> str:
    return MISSING if value is None else share(value)
