import re

import pytest

from shoal.tasks.arithmetic import LEVELS, TASKS, makes_target
from shoal.tasks.task import draw


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
@pytest.mark.parametrize("level", LEVELS)
def test_every_line_of_reasoning_is_true(task, level):
    for index in range(40):
        it = draw((task,), 7, index, "train", (level,))
        assert (it.task, it.level) == (task.name, level)
        for claim in claims(it.reasoning):
            left, right = claim
            assert evaluate(left) == int(right), (it, claim)


def claims(reasoning: str):
    """Each `expression = number` over whole numbers in the text."""
    pattern = r"(-?\d+(?: (?:[+*/-]|mod) \d+)+) = (-?\d+)"
    return re.findall(pattern, reasoning)


def evaluate(expression: str) -> int:
    first, *rest = expression.split()
    value = int(first)
    for op, n in zip(rest[::2], map(int, rest[1::2])):
        value = {"+": value + n, "-": value - n, "*": value * n, "/": n and value // n, "mod": n and value % n}[op]
    return value


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("(8 - 3) * 7", True),
        ("7*(8-3)", True),
        ("7 * 8 - 7 * 3", False),  # 7 twice
        ("35", False),
        ("(8 - 3) * 7 * 1", False),
        ("(8-3)**7", False),
        ("9**9**9**9", False),
        ("8 // 3 * 7", False),
        ("8 / (3 - 3)", False),
        ("(" * 50, False),
        ("(8 - 3) * 7 " + " " * 100, False),
        ("__import__('os')", False),
        ("8(3)(7)", False),
        ("(8 - 3) * 7,", False),
        ("", False),
    ],
)
def test_countdown_accepts_expressions_and_nothing_else(answer, right):
    assert makes_target((3, 7, 8), 35, answer) is right
