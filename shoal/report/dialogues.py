"""What a model answered, as runs keep it: one answer a line of JSON, read with care.

    samples/rollouts.jsonl    answers that a run of reinforcement learnt from, token by token        (post/rl.py)
    evals/NAME.jsonl          attempts at held-out problems                                        (evals/record.py)

Both become a `Dialogue`. A line that is neither (the last one of a killed run may be cut off) is counted and left out.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.report.facts import items, number, numbers

ROLLOUTS = "rollouts.jsonl"
END = "</think>"
END_BYTES = 1 << 20  # of the file, at either end, in which the first and the last step are looked for


@dataclass(frozen=True)
class Dialogue:
    """One answer. `place` says whose it is: (step, number of the prompt, number of the answer); the step is None in an
    evaluation. What a file doesn't say is None or empty.
    """

    place: tuple[int | None, int, int]
    task: str
    level: int | None
    prompt: str
    thinking: str
    said: str
    outcome: str
    expected: str = ""
    budget: int | None = None
    reward: float | None = None
    advantage: float | None = None
    tokens: list[str] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    raw: str = ""

    @property
    def step(self) -> int | None:
        return self.place[0]

    @property
    def index(self) -> int:
        return self.place[1]


def sources(run: Path) -> list[Path]:
    """The files of a run that hold answers: what it learnt from, then its evaluations. Of a folder that is no run, the
    evaluations in it.
    """
    rollouts, evals = run / "samples" / ROLLOUTS, run / "evals"
    return [rollouts] * rollouts.is_file() + sorted((evals if evals.is_dir() else run).glob("*.jsonl"))


def ends(run: Path, most: int = 2) -> list[Dialogue]:
    """Of the first and of the last step that a run of reinforcement kept: the first answer to each of some prompts."""
    path = run / "samples" / ROLLOUTS
    if not path.is_file():
        return []
    with path.open("rb") as file:
        head = file.read(END_BYTES)
        file.seek(max(0, file.seek(0, 2) - END_BYTES))
        tail = file.read()
    parts = [
        [d for line in part.decode("utf-8", "replace").split("\n") if (d := dialogue(line))] for part in (head, tail)
    ]
    steps = [[d.step for d in part if d.step is not None] for part in parts]
    if not all(steps):
        return []
    first, last = min(steps[0]), max(steps[1])
    found = firsts(parts[0], first, most)
    return found if last == first else found + firsts(parts[1], last, most)


def firsts(part: list[Dialogue], step: int, most: int) -> list[Dialogue]:
    by_prompt: dict[int, Dialogue] = {}
    for d in part:
        if d.step == step:
            by_prompt.setdefault(d.index, d)
    return list(by_prompt.values())[:most]


def read(path: Path) -> Iterator[Dialogue | None]:
    """Line by line; None for one that isn't an answer."""
    with path.open("rb") as file:
        for line in file:
            yield dialogue(line.decode("utf-8", errors="replace").rstrip("\n"))


def dialogue(raw: str) -> Dialogue | None:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or not isinstance(line.get("prompt"), str):
        return None
    step, index, sample = whole(line, "step"), whole(line, "index", "item"), whole(line, "sample")
    if index is None or sample is None:
        return None
    thinking, end, said = word(line, "text").partition(END)
    return Dialogue(
        (step, index, sample),
        word(line, "task"),
        whole(line, "level"),
        line["prompt"],
        line["thinking"] if isinstance(line.get("thinking"), str) else thinking,
        line["said"] if isinstance(line.get("said"), str) else end + said,
        word(line, "outcome"),
        word(line, "expected"),
        whole(line, "budget"),
        number(line.get("reward")),
        number(line.get("advantage")),
        [token for token in items(line, "tokens") if isinstance(token, str)],
        numbers(line.get("logprobs")),
        numbers(line.get("ratios")),
        raw,
    )


def word(line: dict[str, Any], key: str) -> str:
    value = line.get(key)
    return value if isinstance(value, str) else ""


def whole(line: dict[str, Any], *keys: str) -> int | None:
    """A whole number under the first of the keys that is there."""
    value = next((line[key] for key in keys if key in line), None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
