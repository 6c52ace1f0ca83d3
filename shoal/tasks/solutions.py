"""Solutions as a base model meets them before anybody teaches it: most give the answer alone, some show their work,
and those that do are not all in the reader's language.

That is what pretraining text is like, and what R1-Zero starts from: the way to think is in the base, but it is one way
among others (arXiv 2501.12948, section 2.2; LOG.md has what a base without any worked solution comes to). Rewards then
find it. Problems are training items alone; the reasoning is a task's own, after an opening in one of three languages.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

from shoal.tasks.task import Task, draw

OPENINGS = {"en": "Step by step.", "ko": "차례로 하자.", "zh": "一步一步来。"}


@dataclass(frozen=True)
class Habits:
    """Of those who write: the share that shows its work, and of those the share that does so in Korean or Chinese."""

    worked: float = 0.3
    foreign: float = 0.3


def solutions(
    tasks: Sequence[Task], levels: Sequence[int], habits: Habits, count: int, seed: int = 0
) -> Iterator[tuple[str, str, str]]:
    """`count` training items as (prompt, reasoning, answer); the reasoning is "" where only the answer is given."""
    for index in range(count):
        item = draw(tasks, seed, index, "train", levels)
        rng = Random(f"{seed}:{index}:habit")
        language = rng.choices(tuple(OPENINGS), (1 - habits.foreign, habits.foreign / 2, habits.foreign / 2))[0]
        shown = rng.random() < habits.worked
        yield item.prompt, opened(item.reasoning, language) if shown else "", item.answer


def opened(reasoning: str, language: str) -> str:
    return f"{OPENINGS[language]}\n{reasoning}"
