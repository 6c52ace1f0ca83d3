"""All tasks by name.

    resolve("countdown,addition")        the tasks that a user's text names

`GENERATORS` are the corpus sources made of worked solutions (`data/sources.py`): `worked-arithmetic:20000` for all of
arithmetic, `worked-tasks:20000` for all tasks, `worked-NAME:20000` for one. They hold nothing of the held-out split.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import partial

from shoal.errors import ConfigError
from shoal.tasks import arithmetic, puzzles, snippets
from shoal.tasks.task import Task, draw

TASKS = {task.name: task for task in (*arithmetic.TASKS, *puzzles.TASKS, *snippets.TASKS)}


def resolve(names: str) -> tuple[Task, ...]:
    """The tasks of a list with commas. Raises ConfigError for a name that is none, with the nearest that is."""
    tasks = tuple(find(name.strip()) for name in names.split(",") if name.strip())
    if not tasks:
        raise ConfigError("no task", "names with commas between them", f"choose from {', '.join(TASKS)}")
    return tasks


def find(name: str) -> Task:
    if name in TASKS:
        return TASKS[name]
    close = get_close_matches(name, TASKS, n=1, cutoff=0.5)
    fix = f"did you mean {close[0]}?" if close else f"choose from {', '.join(TASKS)}"
    raise ConfigError(f"task {name!r}", "the name of a task", fix)


def worked(tasks: Sequence[Task], count: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """The first `count` training items as (prompt, reasoning, answer)."""
    for index in range(count):
        item = draw(tasks, seed, index, "train")
        yield item.prompt, item.reasoning, item.answer


GENERATORS = {
    "worked-arithmetic": partial(worked, arithmetic.TASKS),
    "worked-tasks": partial(worked, tuple(TASKS.values())),
} | {f"worked-{name}": partial(worked, (task,)) for name, task in TASKS.items()}
