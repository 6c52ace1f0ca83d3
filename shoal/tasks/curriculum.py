"""Which problems to ask next: most of those that are neither always nor never solved.

A group of answers that are all right or all wrong has no advantage to learn from (`post/grpo.py`); with pass rate p the
spread of its rewards is sqrt(p (1 - p)). So each (task, level) has a running pass rate, and is drawn with the weight

    w = LEAST + 4 p (1 - p)         1 + LEAST at half, LEAST at the ends

LEAST keeps asking what is too hard yet and what should not be forgotten. What was never asked counts as half solved.
"""

from collections.abc import Sequence
from random import Random

from shoal.errors import ConfigError
from shoal.tasks.task import Task

LEAST = 0.1
MEMORY = 0.9  # of a pass rate, from one prompt's group of answers to the next
UNKNOWN = 0.5

State = list[tuple[str, int, float]]  # task, level, pass rate; lists once it has been through JSON


class Curriculum:
    """`even`: every task and level as often as any other. Raises ConfigError where there is no level to choose."""

    def __init__(self, tasks: Sequence[Task], levels: Sequence[int] | None = None, even: bool = False):
        self.cells = [(t.name, level) for t in tasks for level in t.levels if levels is None or level in levels]
        self.even = even
        self.rates: dict[tuple[str, int], float] = {}
        if not self.cells:
            there = sorted({level for t in tasks for level in t.levels})
            raise ConfigError(f"levels {levels}", f"some of {there}", "choose levels that the tasks have")

    def choose(self, seed: int, index: int) -> tuple[str, int]:
        """Task and level of prompt `index`: a pure function of the pass rates, the seed and the index."""
        return Random(f"{seed}:{index}").choices(self.cells, [self.weight(cell) for cell in self.cells])[0]

    def weight(self, cell: tuple[str, int]) -> float:
        p = self.rates.get(cell, UNKNOWN)
        return 1.0 if self.even else LEAST + 4 * p * (1 - p)

    def record(self, task: str, level: int, rate: float) -> None:
        """The share of right answers that one prompt's group got."""
        assert 0 <= rate <= 1, rate
        self.rates[task, level] = MEMORY * self.rates.get((task, level), UNKNOWN) + (1 - MEMORY) * rate

    def state(self) -> State:
        """As plain JSON; what `load` takes."""
        return [(task, level, rate) for (task, level), rate in self.rates.items()]

    def load(self, state: State) -> None:
        self.rates = {(task, level): rate for task, level, rate in state}
