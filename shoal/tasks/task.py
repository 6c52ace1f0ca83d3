"""Tasks whose answers can be checked: what a problem is, how one is drawn, and on which side of the split it falls.

A model can't be rewarded into a skill it never shows (the gradient scales with the pass rate), so the same items serve
twice: their worked solutions are training text, and later their checks score what the model writes by itself. A check
says True or False and nothing between, never evaluates what a model wrote, and runs in a process that can be killed
(`grading.py`).

An item is `train` or `held_out` by the SHA-256 of its task and its content. The content is what makes the problem
itself, however it is phrased, so no other wording of a held-out problem is ever trained on, whatever seed drew it.
Draw `index` of a seed comes from a generator keyed by the hash of (seed, index): any draw alone, in any order, and two
seeds share nothing but chance.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

from shoal.errors import DataError

Outcome = Literal["right", "wrong", "failed"]  # failed: the grader couldn't tell
Split = Literal["train", "held_out"]
Check = Callable[[str], bool]  # picklable: a module's function, or a functools.partial of one

HELD_OUT_ONE_IN = 8
TRIES = 2000  # draws of the wrong split in a row; with one in eight held out, 2000 of them have a chance of 1e-116
MARKS = ("<think>", "</think>", "<answer>", "</answer>")


class Made(NamedTuple):
    """A problem as a task makes it. `check` None: nothing but `answer` itself is right."""

    prompt: str
    reasoning: str
    answer: str
    content: str
    check: Check | None = None


@dataclass(frozen=True)
class Item:
    """`reasoning` and `answer` are "" where the task has none to show. `seconds` is what a grader must grant the
    check where it needs longer than usual, as code does, which has a deadline of its own.
    """

    task: str
    level: int
    prompt: str
    reasoning: str
    answer: str
    check: Check
    content: str
    seconds: float = 0.0

    @property
    def split(self) -> Split:
        digest = hashlib.sha256(f"{self.task}\n{self.content}".encode()).digest()
        return "train" if int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN else "held_out"


@dataclass(frozen=True)
class Task:
    """`make` draws a problem of a level. `items`: every problem of a file, in its order; () where endless."""

    name: str
    levels: tuple[int, ...]
    make: Callable[[Random, int], Made]
    items: tuple[Item, ...] = ()
    seconds: float = 0.0

    def item(self, level: int, made: Made) -> Item:
        prompt, reasoning, answer, content, check = made
        return Item(self.name, level, prompt, reasoning, answer, check or Exactly(answer), content, self.seconds)


@dataclass(frozen=True)
class Exactly:
    """The check of most tasks: the answer and nothing else."""

    expected: str

    def __call__(self, answer: str) -> bool:
        return answer == self.expected


def draw(tasks: Sequence[Task], seed: int, index: int, split: Split, levels: Sequence[int] | None = None) -> Item:
    """Item `index` of the endless list that the other arguments name; task and level drawn evenly from those given.

    Raises DataError where the task drawn has none of these levels, or no problem of this split.
    """
    rng = Random(int.from_bytes(hashlib.sha256(f"{seed}:{index}".encode()).digest(), "big"))
    task = rng.choice(tasks)
    open_levels = [level for level in task.levels if levels is None or level in levels]
    if not open_levels:
        have = ", ".join(map(str, task.levels))
        raise DataError(f"levels {levels} of task {task.name}", f"some of {have}", "choose levels that it has")
    level = rng.choice(open_levels)
    for _ in range(TRIES):
        item = task.item(level, task.make(rng, level))
        if item.split == split:
            return item
    got = f"task {task.name}, level {level}, without a problem of the {split} split"
    raise DataError(got, "one in eight held out, the others to train on", "add problems, or take another level")


def extract_answer(completion: str) -> str | None:
    """The text between <answer> and </answer> right after the only </think>; None when the form is another.

    The answer is code where code is asked for, so it may hold any character, but none of these marks.
    """
    reasoning, end, rest = completion.partition("</think>")
    rest = rest.strip()
    if not end or "<answer>" in reasoning or not (rest.startswith("<answer>") and rest.endswith("</answer>")):
        return None
    answer = rest.removeprefix("<answer>").removesuffix("</answer>")
    return None if any(mark in answer for mark in MARKS) else answer
