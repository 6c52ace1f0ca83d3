import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.tasks.arithmetic import LEVELS, TASKS, extract_answer, item, makes_target, worked

seeds, indices = st.integers(0, 2**63), st.integers(0, 2**63)
COMPLETION = "{0.reasoning}</think> <answer>{0.answer}</answer>"


@given(seeds, indices)
def test_the_worked_answer_and_no_other_is_accepted(seed, index):
    it = item(seed, index)
    assert it.grade(it.answer) == it.grade(f" {it.answer}\n") == it.reward(COMPLETION.format(it)) == 1.0
    for wrong in (None, "", "0" + it.answer, it.answer + "0", "-" + it.answer, it.answer + ".0", "+" + it.answer, "x"):
        assert it.grade(wrong) == 0.0, (it, wrong)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_line_of_reasoning_is_true(task, level):
    for index in range(40):
        it = item(7, index, (task,), (level,))
        assert (it.task, it.level) == (task, level)
        for claim in claims(it.reasoning):
            left, right = claim
            assert evaluate(left) == int(right), (it, claim)


def claims(reasoning: str):
    """Each `expression = number` over whole numbers in the text."""
    import re

    pattern = r"(-?\d+(?: (?:[+*/-]|mod) \d+)+) = (-?\d+)"
    return re.findall(pattern, reasoning)


def evaluate(expression: str) -> int:
    first, *rest = expression.split()
    value = int(first)
    for op, n in zip(rest[::2], map(int, rest[1::2])):
        value = {"+": value + n, "-": value - n, "*": value * n, "/": n and value // n, "mod": n and value % n}[op]
    return value


def test_an_item_stands_alone_and_seeds_do_not_overlap():
    assert item(1, 5).prompt == item(1, 5).prompt
    prompts = [{item(seed, i, levels=(5,)).prompt for i in range(200)} for seed in (1, 2)]
    assert len(prompts[0] & prompts[1]) < 10
    assert item(1, 1, levels=(5,)).prompt != item(2, 0, levels=(5,)).prompt


def test_equal_prompts_have_equal_solutions():
    solutions = {}
    for prompt, reasoning, answer in worked(5000):
        assert solutions.setdefault(prompt, (reasoning, answer)) == (reasoning, answer)
    assert len(solutions) < 5000  # there were equal prompts to compare


def test_tasks_and_levels_come_evenly():
    items = [item(0, i) for i in range(2000)]
    for wanted, share in [(set(TASKS), 1 / len(TASKS)), (set(LEVELS), 1 / len(LEVELS))]:
        counts = {w: sum(w in (it.task, it.level) for it in items) / len(items) for w in wanted}
        assert all(abs(c - share) < 0.03 for c in counts.values()), counts


def test_items_travel_between_processes():
    it = item(0, 3)
    assert pickle.loads(pickle.dumps(it)).grade(it.answer) == 1.0


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


@pytest.mark.parametrize(
    "completion",
    [
        "<answer>4</answer>",
        "2 + 2 = 4</think>4",
        "a</think><answer>4",
        "<answer>4</answer></think>",
        "a</think><answer>4</answer><answer>4</answer>",
        "a</think></think><answer>4</answer>",
        "<answer>4</answer></think><answer>4</answer>",
        "a</think><answer>4</answer> and more",
    ],
)
def test_an_answer_in_another_form_is_none(completion):
    assert extract_answer(completion) is None
    assert extract_answer("a</think>\n<answer>4</answer>\n") == "4"
