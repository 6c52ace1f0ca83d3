import itertools
import re

import pytest

from shoal.tasks.puzzles import ENDS, LEVELS, OPPOSITE, TASKS, Listed, Makes
from shoal.tasks.task import Item, draw

BY_NAME = {task.name: task for task in TASKS}
levels = pytest.mark.parametrize("level", LEVELS)


def items(name: str, level: int, count: int = 60) -> list[Item]:
    return [draw((BY_NAME[name],), 5, i, "train", (level,)) for i in range(count)]


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
        ("(" * 25 + "7" + ")" * 25, False),
        ("-" * 55 + "7", False),
        ("(8 - 3) * 7 " + " " * 100, False),
        ("__import__('os')", False),
        ("8(3)(7)", False),
        ("(8 - 3) * 7,", False),
        ("(8-3)*7\n", False),
        ("(8-3)*07", False),
        ("(８-3)*7", False),
        ("9" * 60, False),
        ("True", False),
        ("", False),
    ],
)
def test_countdown_accepts_expressions_and_nothing_else(answer, right):
    assert Makes((3, 7, 8), 35)(answer) is right


@levels
def test_sorted_answers_are_sorted_and_no_other_order_passes(level):
    for it in items("sorting", level):
        numbers = list(map(int, it.content.split(" ", 1)[1].split(", ")))
        answer = list(map(int, it.answer.split(", ")))
        assert answer == sorted(numbers, reverse=it.content.startswith("down"))
        if answer != answer[::-1]:
            assert it.check(", ".join(map(str, answer[::-1]))) is False


def test_a_list_may_have_commas_or_spaces_and_nothing_else():
    check = Listed("1, 20, 3")
    assert all(check(a) for a in ("1, 20, 3", "1 20 3", "1,20,3", "1,  20 3"))
    assert not any(
        check(a) for a in ("1, 20", "1, 20, 3, 4", "1; 20; 3", "[1, 20, 3]", "1, 20, 03", "1,,20,3", "١, 20, 3")
    )


@levels
def test_letters_are_counted_where_they_stand(level):
    for it in items("letter_count", level):
        letter, text = it.content.split(" in ", 1)
        assert it.answer == str(text.count(letter))
        assert re.sub(r"[\d ]", "", it.reasoning.replace("\n", "_")) == text.replace(" ", "_")
        assert re.findall(r"\d+", it.reasoning) == [str(n + 1) for n in range(text.count(letter))]


@levels
def test_expressions_have_python_s_value_and_true_steps(level):
    for it in items("truth", level):
        assert str(eval(it.content)) == it.answer  # our own generator's text
        assert all(str(eval(left)) == right for left, right in (x.split("=") for x in it.reasoning.splitlines()))


@levels
def test_a_chain_has_one_order_that_fits_what_is_told(level):
    more, less = {m: m for m in ENDS}, OPPOSITE
    for it in items("comparison_chain", min(level, 3), 10):
        told = re.findall(r"(\w+) is (\w+) than (\w+)\.", it.prompt)
        names = sorted({n for a, _, b in told for n in (a, b)})
        fits = [
            order
            for order in itertools.permutations(names)
            if all((order.index(a) < order.index(b)) == (word in more) for a, word, b in told)
        ]
        assert len(fits) == 1 and len(told) == len(names) - 1
        asked = re.search(r"Who is the (\w+)\?", it.prompt)
        assert asked
        first = asked[1] in {end for end, _ in ENDS.values()}
        assert it.answer == fits[0][0 if first else -1]
        assert {word in more or word in less.values() for _, word, _ in told} == {True}
