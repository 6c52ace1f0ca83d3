"""All tasks by name.

    resolve("countdown,addition")        the tasks that a user's text names, with commas between them
    math:FILE  choice:FILE  code:FILE    problems from a file (`files.py`)
    reasoning-gym:NAME                   a dataset of that package, where it is installed (`gym.py`)

`GENERATORS` are the corpus sources made of worked solutions (`data/sources.py`): `worked-arithmetic:20000` for all of
arithmetic, `worked-tasks:20000` for all tasks, `worked-NAME:20000` for one. They hold nothing of the held-out split.
"""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from functools import partial

from shoal.errors import ConfigError
from shoal.tasks import arithmetic, files, gym, library, puzzles, sandbox, snippets
from shoal.tasks.programs import PATIENCE
from shoal.tasks.solutions import Habits, solutions
from shoal.tasks.task import Task, draw

FORMS = "a task's name, math:FILE, choice:FILE, code:FILE or reasoning-gym:NAME"
TASKS = {task.name: task for task in (*arithmetic.TASKS, *puzzles.TASKS, *snippets.TASKS)}
GENERAL = {library.TASK.name: library.TASK}  # nothing to reckon: in no corpus of worked solutions


def resolve(names: str) -> tuple[Task, ...]:
    """The tasks of a list with commas.

    Raises ConfigError for a name that is none, with the nearest that is; DataError for a file that is not what it says;
    SandboxError where answers are code and no isolation is to be had for it.
    """
    tasks = tuple(find(name.strip()) for name in names.split(",") if name.strip())
    if not tasks:
        raise ConfigError("no task", "names with commas between them", f"choose from {', '.join(TASKS)}")
    return tasks


def find(name: str) -> Task:
    kind, colon, rest = name.partition(":")
    if colon and kind == "reasoning-gym":
        return gym.task(rest)
    found = files.task(kind, rest) if colon and kind in files.READERS else (TASKS | GENERAL).get(name)
    if found is None:
        close = get_close_matches(name, TASKS, n=1, cutoff=0.5)
        fix = f"did you mean {close[0]}?" if close else f"choose from {', '.join(TASKS)}"
        raise ConfigError(f"task {name!r}", FORMS, fix)
    if found.seconds == PATIENCE:  # it runs code: refuse now, not at its first answer
        sandbox.level()
    return found


def worked(tasks: Sequence[Task], count: int, seed: int = 0) -> Iterator[tuple[str, str, str]]:
    """The first `count` training items as (prompt, reasoning, answer)."""
    for index in range(count):
        item = draw(tasks, seed, index, "train")
        yield item.prompt, item.reasoning, item.answer


QUICK_TASKS = ("chain_sum", "addition", "predict_output", "letter_count")  # what a quickstart meets and learns
QUICK_LEVELS = (1, 2)

GENERATORS = {
    "solutions": partial(solutions, tuple(map(find, QUICK_TASKS)), QUICK_LEVELS, Habits()),
    "worked-arithmetic": partial(worked, arithmetic.TASKS),
    "worked-tasks": partial(worked, tuple(TASKS.values())),
} | {f"worked-{name}": partial(worked, (task,)) for name, task in TASKS.items()}
