"""Tasks of reasoning-gym, `reasoning-gym:NAME`, where it is installed.

What is known of it and done about it: adjacent seeds share problems, so every draw is problem 0 of a seed of its own. A
missing or half right answer earns something, so only exactly 1.0 is right. Some scorers evaluate what the model wrote
(countdown's among them, which a power tower hangs and a call takes over): those are refused by name, as far as the
scorer's own module says eval, exec, sympify or parse_expr. The others run in a grader's process like every check.
"""

import inspect
import re
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache, partial
from random import Random
from typing import Any

from shoal.errors import ConfigError
from shoal.tasks.task import Made, Task

SECONDS = 10.0  # a grader waits for the import of a large package
EVALUATES = re.compile(r"(?<![\w.])(eval|exec|compile)\(|\b(sympify|parse_expr)\(")


def task(name: str) -> Task:
    """Raises ConfigError where reasoning-gym, or the task in it, is missing, or its scorer evaluates answers."""
    try:
        from reasoning_gym.dataset import ProceduralDataset  # pyright: ignore[reportMissingImports]
        from reasoning_gym.factory import DATASETS  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ConfigError(f"task reasoning-gym:{name}", "reasoning-gym", "pip install 'shoal-lm[rl]'") from e
    if name not in DATASETS:
        close = get_close_matches(name, DATASETS, n=1, cutoff=0.5)
        fix = f"did you mean reasoning-gym:{close[0]}?" if close else f"choose from {', '.join(sorted(DATASETS))}"
        raise ConfigError(f"task reasoning-gym:{name}", "the name of one of its datasets", fix)
    scorer: Any = DATASETS[name][0].score_answer
    module = inspect.getmodule(scorer)
    if scorer is not ProceduralDataset.score_answer and module and EVALUATES.search(inspect.getsource(module)):
        got = f"task reasoning-gym:{name}, whose scorer evaluates text as code"
        raise ConfigError(got, "a scorer that compares", "take another of its datasets, or a task built in here")
    try:
        make(name, Random(0), 1)
    except Exception as e:  # whatever its configs and generators raise
        got = f"task reasoning-gym:{name}, which makes no problem: {str(e)[:200]}"
        raise ConfigError(got, "a dataset that needs no settings", "take another of its datasets") from e
    return Task(f"reasoning-gym:{name}", (1,), partial(make, name), seconds=SECONDS)


def make(name: str, rng: Random, level: int) -> Made:
    entry = dataset(name, rng.getrandbits(32))[0]
    question, answer = entry["question"], entry["answer"]
    return Made(question, "", "" if answer is None else str(answer), question, Scored(name, entry))


def dataset(name: str, seed: int) -> Any:
    import reasoning_gym  # pyright: ignore[reportMissingImports]

    return reasoning_gym.create_dataset(name, seed=seed, size=1)


scorers = cache(partial(dataset, seed=0))


@dataclass(frozen=True)
class Scored:
    name: str
    entry: dict[str, Any]

    def __call__(self, answer: str) -> bool:
        return bool(scorers(self.name).score_answer(answer, self.entry) == 1.0)
