import re

import pytest

from shoal.tasks.arithmetic import CHAIN_BOUND, LEVELS, TASKS
from shoal.tasks.task import draw


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("level", LEVELS)
def test_every_line_of_reasoning_is_true(task, level):
    for index in range(40):
        it = draw((task,), 7, index, "train", (level,))
        assert (it.task, it.level) == (task.name, level)
        claimed = claims(it.reasoning)
        assert claimed, it
        for left, right in claimed:
            assert evaluate(left) == int(right), (it, left, right)


def claims(reasoning: str) -> list[tuple[str, str]]:
    """Each `expression=number` over whole numbers in the text."""
    return re.findall(r"(?<![\dx])(-?\d+(?:[+*/%-]-?\d+)+)=(-?\d+)(?!\d)", reasoning)


def evaluate(expression: str) -> int:
    first, *rest = re.findall(r"(?<!\d)-?\d+|[+*/%-]", expression)
    value = int(first)
    for op, n in zip(rest[::2], map(int, rest[1::2])):
        value = {"+": value + n, "-": value - n, "*": value * n, "/": n and value // n, "%": n and value % n}[op]
    return value


@pytest.mark.parametrize("level", LEVELS)
def test_running_totals_stay_in_bounds(level):
    task = next(t for t in TASKS if t.name == "chain_sum")
    for index in range(200):
        it = draw((task,), 0, index, "train", (level,))
        totals = [int(line.split("=")[1]) for line in it.reasoning.splitlines()]
        assert all(0 <= total <= CHAIN_BOUND[level - 1] for total in totals)
        assert str(totals[-1]) == it.answer
