import subprocess
import sys

import pytest

from shoal.tasks.programs import Passes, Returns, code_of, same
from shoal.tasks.snippets import LEVELS, TASKS
from shoal.tasks.task import draw

PREDICT, WRITE = TASKS


def test_what_programs_print_is_what_python_prints():
    items = [draw((PREDICT,), 1, i, "train", (level,)) for level in LEVELS for i in range(20)]
    whole = "\n".join(it.content for it in items)  # our own text
    printed = subprocess.run([sys.executable, "-ISc", whole], capture_output=True, text=True, check=True).stdout
    assert printed.split() == [it.answer for it in items]
    assert all(it.content in it.prompt for it in items)


@pytest.mark.parametrize("level", [1, *(pytest.param(level, marks=pytest.mark.slow) for level in LEVELS[1:])])
def test_the_shown_function_passes_and_a_constant_one_does_not(level):
    it = draw((WRITE,), 2, level, "held_out", (level,))
    assert it.check(it.answer) is True
    assert it.check(f"```python\n{it.answer}\n```") is True
    assert it.check("def f(*args):\n    return 1") is False


def test_every_kind_of_function_is_tried_with_values_that_differ():
    for level in LEVELS:
        for i in range(30):
            check = draw((WRITE,), 3, i, "train", (level,)).check
            assert isinstance(check, Returns)
            assert len(set(map(repr, check.expected))) > 2, check


def test_equal_problems_have_equal_examples_and_tests():
    items = [draw((WRITE,), 4, i, "train", (1,)) for i in range(300)]
    seen = {}
    for it in items:
        assert seen.setdefault(it.content, (it.reasoning, it.answer, it.check)) == (it.reasoning, it.answer, it.check)
    assert len(seen) < len(items)


@pytest.mark.parametrize(
    ("found", "expected", "equal"),
    [
        (1, 1, True),
        (1, True, False),
        (1.0, 1, False),
        ([1, [2]], [1, [2]], True),
        ([1], (1,), False),
        ([True], [1], False),
        ({"a": 1}, {"a": 1}, True),
        ({"a": True}, {"a": 1}, False),
        ("", None, False),
    ],
)
def test_values_are_the_same_where_their_types_are(found, expected, equal):
    assert same(found, expected) is equal


def test_tests_that_are_code_run_apart_from_what_they_test():
    loop = "    for i in range(20):\n        assert candidate(i) == helper(i)\n"
    tests = f"def check(candidate):\n{loop}    assert candidate(2) < 9\n"
    before = "def helper(x):\n    return x * x\ndef f(x):\n    '''The square.'''\n"
    check = Passes(f"{before}\n{tests}\ncheck(candidate)", ("candidate",), "f", before)
    assert check("    return helper(x)\n") is True  # it goes on after the prompt, as HumanEval's answers do
    assert check("def f(x):\n    return x ** 2") is True
    assert check("def f(x):\n    return 4") is False
    assert check("def g(x):\n    return x ** 2") is False


def test_arguments_that_can_not_leave_their_process_are_the_grader_s_failure():
    with pytest.raises(ValueError, match="not plain"):
        Passes("assert f(lambda: 1) == 1", ("f",))("def f(g):\n    return g()")


def test_code_is_taken_out_of_a_fence_and_left_alone_otherwise():
    assert code_of("```python\nx = 1\n```") == "x = 1"
    assert code_of("x = 1\n") == "x = 1\n"
    assert code_of("see ```x```") == "see ```x```"
