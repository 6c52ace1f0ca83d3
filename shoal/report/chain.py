"""The page of a whole chain of stages: `write(run)` makes report.html and report.md of a run with a pipeline.json.

Besides what a run has (`page.py`), it reads of that file, all optional:

    {minutes, steps, stages: [{name, folder, kind, state, minutes: {predicted, used}, facts: {steps, tokens, answers,
     lessons, verdicts: {verdict: count}, …}}], models: {name: checkpoint}, compared: {minutes}}

and of each stage its metrics, of each model its evals/problems.json and .jsonl (`evals/record.py`), with the shares
`format` and `language`. Models are shown in their order: what couldn't, and then could. The base's own page, if the run
itself is a pretraining, is base.html beside it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from shoal.report import page, reasoning, words
from shoal.report.facts import Facts, items, number, numbers, read, record
from shoal.report.plots import Chart, Line, nice, smoothed
from shoal.report.reasoning import COLOURS, Evaluation, rows_of
from shoal.run import PIPELINE, replace_text

STAGES = {  # what each is called on the page
    "pretrain": "Pretraining",
    "r1_zero": "R1-Zero: reinforcement alone",
    "cold_start": "Cold start: readable solutions",
    "reasoning": "Reinforcement of reasoning",
    "samples": "Its own best answers",
    "tuning": "The base learns those",
    "r1": "R1: reinforcement on everything",
    "teaching": "R1 answers for the student",
    "student": "The student learns those",
    "compared": "Evaluations",
}
CURVES = (
    ("rl/accuracy", "Right answers", "Share of answers that a grader called right, on training problems.", words.share),
    ("rl/length", "Length of an answer", "Tokens of thinking and answer together.", "{:.0f}".format),
    ("rl/reward", "Reward", "What the rules gave on average; each stage weighs its own.", "{:.2f}".format),
)
PROBLEMS = "problems"  # evals/problems.json
SHOWN = 6  # problems with everybody's answers
LONGEST = 1500  # characters of one answer


@dataclass(frozen=True)
class Model:
    """One column: `found` and `attempts` are its evals/problems, the attempts without a budget, by item."""

    name: str
    colour: str
    found: dict[str, Any]
    attempts: dict[int, list[dict[str, Any]]]

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        return self.points[-1][1] if self.points else []

    @property
    def points(self) -> list[tuple[str, list[Mapping[str, Any]]]]:
        """(budget in words, rows), the last one free."""
        budgets = [p for p in items(self.found, "budgets") if isinstance(p, dict)]
        return [(reasoning.budget(p), rows) for p in budgets if (rows := rows_of(p))]


def write(run: Path | str) -> Path:
    """The page of the whole; of the run's own pretraining too, if it has one. RunError where there is no run."""
    folder = Path(run)
    facts = read(folder)
    if facts.model:
        page.write(folder, "base")
    view = look(facts, folder)
    for name, template in (("report.html", "chain.html"), ("report.md", "chain.md.jinja")):
        replace_text(folder / name, page.TEMPLATES.get_template(template).render(view))
    return folder / "report.html"


def look(facts: Facts, folder: Path) -> dict[str, Any]:
    table = record(folder / PIPELINE, facts.problems)
    stages = [row for row in items(table, "stages") if isinstance(row, dict) and inside(row.get("folder"))]
    models = list(models_of(table, folder, facts.problems))
    found = [Evaluation(m.name, m.points) for m in models if m.points]
    rows = list(receipt(facts, table, stages))
    return {
        "facts": facts,
        "state": facts.status.get("state"),
        "verdict": verdict(models),
        "tiles": tiles(models, rows),
        "models": models,
        "measures": list(measures(models)),
        "charts": reasoning.charts(found),
        "tables": list(reasoning.tables(found)),
        "dialogues": list(dialogues(models)),
        "curves": [chart for of in CURVES if (chart := curve(folder, stages, models, *of))],
        "kept": list(kept(stages)),
        "receipt": rows,
        "total": total(rows),
        "links": [("the base's pretraining", "base.html")] * bool(facts.model)
        + [(title(s), f"{s['folder']}/report.html") for s in stages],
        "env": list(page.flat(facts.env)),
        "next_command": f"shoal chat {page.shown(folder)}",
        "words": words,
    }


def models_of(table: Mapping[str, Any], folder: Path, problems: list[str]) -> Iterator[Model]:
    known = table.get("models")
    for (name, at), colour in zip(known.items() if isinstance(known, dict) else (), COLOURS):
        home = folder / at.partition("/checkpoints/")[0] if inside(at) else folder
        if found := record(home / "evals" / f"{PROBLEMS}.json", problems):
            yield Model(str(name), colour, found, attempts(home / "evals" / f"{PROBLEMS}.jsonl", problems))


def inside(place: object) -> bool:
    """Whether that is a stage's folder, or a checkpoint of one."""
    return isinstance(place, str) and bool(re.fullmatch(r"stages/[\w-]{1,80}(/checkpoints/[\w-]{1,80})?", place))


def attempts(path: Path, problems: list[str]) -> dict[int, list[dict[str, Any]]]:
    """Those without a budget, by item."""
    found: dict[int, list[dict[str, Any]]] = {}
    try:
        lines = path.read_text("utf-8", errors="replace").split("\n") if path.exists() else []
        rows = [json.loads(line) for line in lines if line]
    except (OSError, ValueError, RecursionError):
        problems.append(f"{path.name} of {path.parent.parent.name} is damaged and was left out")
        rows = []
    for row in rows:
        if isinstance(row, dict) and isinstance(item := row.get("item"), int) and row.get("budget") is None:
            found.setdefault(item, []).append(row)
    return found


def whole(m: Model, name: str) -> float | None:
    return number(m.rows[0].get(name)) if m.rows else None


def verdict(models: Sequence[Model]) -> list[str]:
    """What couldn't and then could, how, and what became of the student."""
    by_name = {m.name: m for m in models}
    values = {m.name: value for m in models if (value := whole(m, "accuracy")) is not None}
    if not {"base", "R1"} <= values.keys():
        return ["Stages of a model that learns to reason, not all of them done"]
    sure = gained(by_name["base"], by_name["R1"])
    change = "learned to solve" if sure else "solves, after all stages,"
    head = f"A model that solved {words.share(values['base'])} of problems it had never seen {change} "
    head += words.share(values["R1"]) + ("" if sure else ": no gain that these problems could show")
    parts = []
    if "R1-Zero" in values:
        alone = words.share(values["R1-Zero"])
        parts.append(f"Reinforcement alone, with no solution shown after pretraining, came to {alone}.")
    if "student" in values:
        parts.append(f"The smaller student that R1 taught solves {words.share(values['student'])}.")
    return [head, " ".join(parts)]


def gained(before: Model, after: Model) -> bool:
    """Whether the gain, problem by problem, is above nought by more than 1.96 standard errors."""
    both = sorted(before.attempts.keys() & after.attempts.keys())
    gains = [solved(after, i) - solved(before, i) for i in both]
    return len(gains) > 1 and mean(gains) > 1.96 * stdev(gains) / sqrt(len(gains))


def solved(m: Model, item: int) -> float:
    """The share of a problem's attempts that are right."""
    return mean(row.get("outcome") == "right" for row in m.attempts[item])


def tiles(models: Sequence[Model], rows: Sequence[dict]) -> list[tuple[str, str, str]]:
    base, best = (next((m for m in models if m.name == name), None) for name in ("base", "R1"))
    told = []
    for label, m in (("before", base), ("after", best)):
        value = reasoning.score(whole(m, "accuracy") if m else None)
        told.append((label, value, "of held-out problems" if m else ""))
    lengths = [one(whole(m, "thinking_tokens") if m else None) for m in (base, best)]
    thought = words.MISSING if words.MISSING in lengths else " → ".join(lengths)
    of = total(rows)
    return [*told, ("thinking", thought, "tokens before its answer"), ("it took", of["used"], of["usd"])]


def measures(models: Sequence[Model]) -> Iterator[tuple[str, list[str]]]:
    """(what, a word for each model) of the table that stands first."""
    yield "solved, of held-out problems", [interval(m.rows[0]) if m.rows else words.MISSING for m in models]
    tasks = dict.fromkeys(words.text(row.get("task")) for m in models for row in m.rows if row.get("task"))
    for task in tasks:
        yield f"… {task.replace('_', ' ')}", [interval(of_task(m, task)) for m in models]
    if k := max((reasoning.most_k(m.rows[0]) for m in models if m.rows), default=0):
        votes = [reasoning.last(m.rows[0], "cons_at_k") if m.rows else None for m in models]
        yield f"majority of {k}", [reasoning.score(value) for value in votes]
    yield "tokens of thinking", [one(whole(m, "thinking_tokens")) for m in models]
    for name, what in (("format", "in the right form"), ("language", "thinking in the prompt's language alone")):
        yield what, [reasoning.score(number(m.found.get(name))) for m in models]


def of_task(m: Model, task: str) -> Mapping[str, Any]:
    """The row of a task with all its levels, else the one level it has."""
    rows = [row for row in m.rows if row.get("task") == task]
    return next((row for row in rows if row.get("level") is None), rows[0] if rows else {})


def interval(row: Mapping[str, Any]) -> str:
    value, ends = number(row.get("accuracy")), numbers(row.get("interval"))
    if value is None:
        return words.MISSING
    return words.share(value) + (f" ({100 * ends[0]:.0f}–{100 * ends[1]:.0f})" if len(ends) == 2 else "")


def one(value: float | None) -> str:
    return words.MISSING if value is None else f"{value:.1f}"


def dialogues(models: Sequence[Model]) -> Iterator[dict[str, Any]]:
    """For each task the first problem that the last stage's model solved and the base didn't, then the first that it
    didn't solve; each model's first attempt."""
    base = next((m for m in models if m.name == "base"), None)
    best = next((m for m in models if m.name == "R1"), None)
    if base is None or best is None:
        return
    able = [i for i in sorted(best.attempts) if right(best, i)]
    by_task: dict[str, int] = {}
    for i in able:
        if i not in base.attempts or right(base, i):
            continue
        by_task.setdefault(words.text(best.attempts[i][0].get("task")), i)
    missed = [i for i in sorted(best.attempts) if i not in able]
    for i in [*list(by_task.values())[: SHOWN - 1], *missed[:1]]:
        said = [answer(m, m.attempts[i][0]) for m in models if m.attempts.get(i)]
        row = best.attempts[i][0]
        yield {"prompt": words.text(row.get("prompt")), "task": words.text(row.get("task")), "said": said}


def right(m: Model, item: int) -> bool:
    return m.attempts[item][0].get("outcome") == "right"


def answer(m: Model, row: Mapping[str, Any]) -> dict[str, Any]:
    thinking, said = words.text(row.get("thinking")), words.text(row.get("said"))
    more = len(thinking) - LONGEST
    thinking = thinking[:LONGEST] + (f"\n… {more:,} characters more" if more > 0 else "")
    outcome = words.text(row.get("outcome"))
    return {"model": m.name, "colour": m.colour, "thinking": thinking, "said": said[:LONGEST], "outcome": outcome}


def curve(
    folder: Path, stages: Sequence[dict], models: Sequence[Model], metric: str, name: str, about: str, form: Any
) -> Chart | None:
    """One line for each stage of reinforcement, over its minutes, in the colour of the model that it made."""
    lines, colours = [], {m.name: m.colour for m in models}
    for stage in stages:
        if stage.get("kind") != "rl":
            continue
        path = folder / stage["folder"]
        series = read(path).series if (path / "config.toml").is_file() else {}
        seconds, values = dict(series.get("time/seconds", [])), series.get(metric, [])
        raw = [(seconds[step] / 60, y) for step, y in values if step in seconds]
        if raw:
            colour, few = colours.get(short(stage), "e"), len(raw) < 8
            lines.append(Line(short(stage), smoothed(raw, 0.1), colour, faint=raw, dots=few))
    if not lines:
        return None
    y_range = (0.0, max(y for line in lines for _, y in line.faint) or 1.0) if metric != "rl/reward" else None
    tick = "{:.0%}".format if metric == "rl/accuracy" else "{:g}".format
    ticks = nice(0.0, max(x for line in lines for x, _ in line.points), 5)
    axis = {"x_unit": "minutes", "ticks": ticks, "format_x": "{:g}".format}
    return Chart(name, about, lines, **axis, format_y=form, format_tick=tick, y_range=y_range)


def kept(stages: Sequence[dict]) -> Iterator[tuple[str, list[tuple[str, str]], str]]:
    """(stage, [(verdict, share)], what was added) of rejection sampling."""
    for stage in stages:
        facts = facts_of(stage)
        verdicts = facts.get("verdicts")
        counts = {k: n for k, v in (verdicts if isinstance(verdicts, dict) else {}).items() if (n := number(v))}
        if counts:
            asked = sum(counts.values())
            shares = [(f"{k}", f"{n:,.0f} ({n / asked:.0%})") for k, n in sorted(counts.items(), key=lambda it: -it[1])]
            yield title(stage), shares, f"{number(facts.get('general')) or 0:,.0f} general questions were added"


def receipt(facts: Facts, table: Mapping[str, Any], stages: Sequence[dict]) -> Iterator[dict[str, Any]]:
    """A line a stage: minutes predicted and used, what it saw, what it cost."""
    machine = facts.plan.get("machine")
    price = number(machine.get("price_per_hour")) if isinstance(machine, dict) else None
    if facts.model:
        seconds = [number(of.get("seconds")) for of in (facts.plan, facts.receipt)]
        tokens = number(facts.receipt.get("tokens"))
        minutes = [None if s is None else s / 60 for s in seconds]
        yield line("pretrain", minutes, f"{words.count(tokens)} tokens" if tokens else "", price)
    for stage in stages:
        of = stage.get("minutes")
        minutes = [number(of.get(name)) for name in ("predicted", "used")] if isinstance(of, dict) else [None, None]
        state = words.text(stage.get("state"))
        yield line(words.text(stage.get("name")), minutes, saw(facts_of(stage)) if state == "done" else state, price)
    compared = table.get("compared")
    if isinstance(compared, dict) and (used := number(compared.get("minutes"))):
        yield line("compared", [None, used], f"{number(compared.get('attempts')) or 0:,.0f} attempts", price)


def line(name: str, minutes: Sequence[float | None], saw: str, price: float | None) -> dict[str, Any]:
    predicted, used = minutes
    usd = None if price is None or used is None else used / 60 * price
    return {"name": STAGES.get(name, name), "predicted": predicted, "used": used, "saw": saw, "usd": usd}


def saw(facts: Mapping[str, Any]) -> str:
    """What a stage worked through, in words."""
    parts = []
    for name, word in (("steps", "steps"), ("answers", "answers"), ("lessons", "lessons"), ("tokens", "tokens")):
        if (n := number(facts.get(name))) is not None:
            parts.append(f"{words.count(n) if n >= 1000 else f'{n:,.0f}'} {word.removesuffix('s') if n == 1 else word}")
    return ", ".join(parts)


def total(rows: Sequence[dict]) -> dict[str, str]:
    used, predicted = ([r[name] for r in rows if r[name] is not None] for name in ("used", "predicted"))
    usd = [r["usd"] for r in rows if r["usd"] is not None]
    return {
        "used": words.duration(60 * sum(used)) if used else words.MISSING,
        "predicted": words.duration(60 * sum(predicted)) if predicted else words.UNPREDICTED,
        "usd": words.money(sum(usd)) if usd else "",
    }


def facts_of(stage: Mapping[str, Any]) -> Mapping[str, Any]:
    found = stage.get("facts")
    return found if isinstance(found, dict) else {}


def short(stage: Mapping[str, Any]) -> str:
    """For a legend: what stands before a colon, or the name itself."""
    return title(stage).partition(":")[0].removeprefix("Reinforcement of ")


def title(stage: Mapping[str, Any]) -> str:
    name = words.text(stage.get("name"))
    return STAGES.get(name, name)
