"""What the fine-tuning stages of R1 learn: readable solutions for the cold start, general data beside its own samples.

Lessons lie in a JSONL file of the stage, `{"prompt", "reasoning", "answer"}` a line, as `shoal sft --data` reads them.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from shoal.post.conversations import Conversation, read, worked
from shoal.post.rewards import language_of
from shoal.run import replace_text
from shoal.tasks.catalog import GENERAL
from shoal.tasks.solutions import OPENINGS
from shoal.tasks.task import Item, Task, draw

CLOSINGS = {"en": "So the answer is {}.", "ko": "따라서 답은 {}이다.", "zh": "所以答案是{}。"}
FILE = "lessons.jsonl"


def problems(tasks: Sequence[Task], levels: Sequence[int] | None, count: int, seed: int) -> list[Item]:
    """Of the training split, each once; fewer where draws repeat themselves."""
    drawn = (draw(tasks, seed, index, "train", levels) for index in range(count))
    return list({(item.task, item.content): item for item in drawn}.values())


def cold_start(tasks: Sequence[Task], levels: Sequence[int] | None, count: int, seed: int) -> list[Conversation]:
    """Worked solutions opened and closed in words, in the language of the prompt (R1, section 2.3.1)."""
    items = (item for item in problems(tasks, levels, count, seed) if item.reasoning)
    return [worked(item.prompt, readable(item), item.answer, item.task) for item in items]


def readable(item: Item) -> str:
    language = language_of(item.prompt)
    language = language if language in CLOSINGS else "en"
    return f"{OPENINGS[language]}\n{item.reasoning}\n{CLOSINGS[language].format(item.answer)}"


def general(count: int, seed: int) -> list[Conversation]:
    """Questions without anything to reckon, as R1 took writing and facts: the library's functions in a sentence."""
    items = problems(tuple(GENERAL.values()), None, count, seed)
    return [worked(item.prompt, item.reasoning, item.answer, item.task) for item in items]


def write(path: Path, lessons: Iterable[Conversation]) -> Path:
    rows = [(talk.messages[0].content, talk.messages[1].reasoning, talk.messages[1].content) for talk in lessons]
    lines = (dict(zip(("prompt", "reasoning", "answer"), row)) for row in rows)
    replace_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def lessons(path: Path) -> list[Conversation]:
    return list(read(path))
