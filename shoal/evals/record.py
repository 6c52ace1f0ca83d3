"""What an evaluation leaves behind, for the report, for `shoal samples` and for whoever recomputes it.

    NAME.json     {name, metric, value, better, step, measured_on, interval, rules, budgets: [{budget, rows}, …]}
                  the first six are those of every evaluation (`report/page.py`), `rows` as in `scaling.table`
    NAME.jsonl    one attempt a line: {item, sample, budget, seed, task, level, prompt, thinking, said, answer,
                  outcome, tokens, thinking_tokens}; `thinking + said` is the completion, to the character

The value is the accuracy over all items at the last budget.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from shoal.errors import ConfigError
from shoal.evals.harness import Attempt, Attempts, Rules
from shoal.evals.scaling import Tried, table
from shoal.run import replace_text

Curve = Sequence[tuple[int | None, Attempts]]  # by budget


def record(name: str, curve: Curve, rules: Rules, step: int | None = None, problems: str = "held-out problems") -> dict:
    """The JSON of an evaluation; `problems` says which they were."""
    budgets = [{"budget": budget, "rows": table(by_level(attempts))} for budget, attempts in curve]
    whole, attempts = budgets[-1]["rows"][0], curve[-1][1]
    of = f"{len(attempts)} {problems}, {rules.samples} attempts each"
    return {
        "name": name,
        "metric": "accuracy",
        "value": whole["accuracy"],
        "better": "higher",
        "step": step,
        "measured_on": f"{of}, temperature {rules.temperature:g}, top-p {rules.top_p:g}",
        "interval": whole["interval"],
        "rules": asdict(rules),
        "budgets": budgets,
    }


def by_level(attempts: Attempts) -> dict[tuple[str, int], list[Tried]]:
    found: dict[tuple[str, int], list[Tried]] = {}
    for group in attempts:
        item = group[0].item
        tried = [(a.answer, a.outcome, a.thinking_tokens) for a in group]
        found.setdefault((item.task, item.level), []).append(tried)
    return found


def lines(curve: Curve) -> Iterator[dict]:
    for _, attempts in curve:
        for i, group in enumerate(attempts):
            for s, attempt in enumerate(group):
                yield {"item": i, "sample": s} | line(attempt)


def line(a: Attempt) -> dict:
    thinking, end, said = a.completion.partition("</think>")
    return {
        "budget": a.budget,
        "seed": a.seed,
        "task": a.item.task,
        "level": a.item.level,
        "prompt": a.item.prompt,
        "thinking": thinking,
        "said": end + said,
        "answer": a.answer,
        "outcome": a.outcome,
        "tokens": a.tokens,
        "thinking_tokens": a.thinking_tokens,
    }


def write(folder: Path, file: str, found: dict, curve: Curve) -> Path:
    """`file`.jsonl and then `file`.json, whose path is returned. Raises ConfigError for a name that is no file's."""
    if not re.fullmatch(r"[\w.-]{1,80}", file) or file.startswith("."):
        raise ConfigError(f"the name {file!r}", "letters, digits, _ - and .", "choose another --name")
    folder.mkdir(parents=True, exist_ok=True)
    replace_text(folder / f"{file}.jsonl", "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in lines(curve)))
    replace_text(folder / f"{file}.json", json.dumps(found, indent=1) + "\n")
    return folder / f"{file}.json"
