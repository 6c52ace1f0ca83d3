"""Temporary."""

from collections.abc import Sequence
from random import Random

from shoal.tasks.task import Task


class Curriculum:
    def __init__(self, tasks: Sequence[Task], levels: Sequence[int] | None = None, even: bool = False):
        self.cells = [(t.name, l) for t in tasks for l in t.levels if levels is None or l in levels]
        self.rates = {}
        self.even = even

    def choose(self, seed: int, index: int) -> tuple[str, int]:
        r = Random(f"{seed}:{index}")
        weights = [1.0 if self.even else 0.1 + 4 * self.rates.get(c, 0.5) * (1 - self.rates.get(c, 0.5)) for c in self.cells]
        return r.choices(self.cells, weights)[0]

    def record(self, task: str, level: int, rate: float) -> None:
        k = (task, level)
        self.rates[k] = 0.9 * self.rates.get(k, 0.5) + 0.1 * rate

    def state(self):
        return [[*k, v] for k, v in self.rates.items()]

    def load(self, state):
        self.rates = {(a, b): v for a, b, v in state}
