import json
from importlib.util import find_spec

import pytest

from shoal.errors import ConfigError, DataError
from shoal.tasks.catalog import resolve
from shoal.tasks.grading import Graders
from shoal.tasks.mathematics import SameNumber, Verified, boxed, number
from shoal.tasks.task import draw

GSM8K = {"question": "6 times 7?", "answer": "6*7=<<6*7=42>>42\n#### 42"}
MATH = {"problem": "Half?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "level": "Level 3", "type": "Algebra"}
PLAIN = {"problem": "How many?", "answer": 1200}
MMLU = {"question": "Which?", "choices": ["one", "two", "three", "four"], "answer": 2}
ARC = {"question": "What?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "2"}
HUMANEVAL = {
    "task_id": "T/0",
    "prompt": 'def helper(x):\n    return x + 1\n\n\ndef twice(x):\n    """Two times x."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    for i in range(3):\n        assert candidate(helper(i)) == 2 * (i + 1)\n",
}
MBPP = {
    "text": "Write a function to find what two lists share.",
    "code": "def share(a, b):\n    return tuple(set(a) & set(b))",
    "test_setup_code": "import math",
    "test_list": ["assert set(share([1, 2], [2, 3])) == set([2])", "assert math.isclose(len(share([1], [2])), 0)"],
}


@pytest.fixture
def task(tmp_path):
    def made(kind, *rows):
        file = tmp_path / "some.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        [found] = resolve(f"{kind}:{file}")
        return found

    return made


def test_mathematics_in_three_forms(task):
    found = task("math", GSM8K, MATH, PLAIN)
    assert (found.name, found.levels) == ("math:some", (1, 3))
    assert [(it.level, it.answer) for it in found.items] == [(1, "42"), (3, r"\frac{1}{2}"), (1, "1200")]
    assert found.items[0].reasoning == "6*7=<<6*7=42>>42"
    assert {it.split for it in found.items} <= {"train", "held_out"}
    split = found.items[1].split
    assert draw((found,), 0, 0, split, (3,)) == found.items[1]


RESULTS = [
    ("42", "42", True),
    ("42", " 42.0", True),
    ("42", "$42$", True),
    ("42", r"\boxed{42}", True),
    ("1200", "1,200", True),
    ("-3", "-3.", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\frac{1}{2}", "2/4", True),
    (r"\frac{1}{2}", r"\dfrac{1}{2}", True),
    ("x+1", "x + 1", True),
    ("42", "43", False),
    ("42", "41, 42", False),
    ("42", "41 42", False),
    ("42", "42 or 41", False),
    ("42", "41=42", False),
    ("42", "0=1=42", False),
    ("42", r"\boxed{41} \boxed{42}", False),
    ("42", "", False),
    ("42", "9**9**9**9", False),
    ("42", "9^" * 140 + "9", False),
    ("42", "__import__('os')._exit(0)", False),
    ("42", "4" * 5000, False),
    ("0", "1/0", False),
    ("(1,2)", "(1, 2)", True),
    ("(1,2)", "(2,1)", False),
]


@pytest.mark.parametrize(("expected", "answer", "right"), RESULTS)
def test_results_without_math_verify(expected, answer, right):
    assert SameNumber(expected)(answer.strip()) is right


@pytest.mark.skipif(not find_spec("math_verify"), reason="needs the extra rl: pip install 'shoal-lm[rl]'")
def test_results_by_math_verify(task):
    more = [("x+1", "1+x", True), ("42", "x = 42", True), (r"\sqrt{2}", r"\frac{2}{\sqrt{2}}", True)]
    found = task("math", *({"problem": f"{i}?", "answer": gold} for i, (gold, _, _) in enumerate(RESULTS + more)))
    assert isinstance(found.items[0].check, Verified)
    with Graders() as graders:
        outcomes = graders.grade([(it, answer) for it, (_, answer, _) in zip(found.items, RESULTS + more)])
    for (gold, answer, right), outcome in zip(RESULTS + more, outcomes):
        assert (outcome == "right") is right, (gold, answer, outcome)


def test_numbers_are_read_exactly_or_not_at_all():
    assert number("0.1") == number("1/10") and number("1,234,567") == 1234567
    assert [number(t) for t in ("1,23", "1e3", "٣", "1/0", "--1", "", "0x1", "1_000", "NaN")] == [None] * 9
    assert boxed(r"a \boxed{1} b \boxed{\frac{2}{3}} c") == r"\frac{2}{3}"
    assert boxed(r"\boxed{1") is None


def test_choices_are_answered_by_our_letters(task):
    mmlu, arc = task("choice", MMLU, ARC).items
    assert (mmlu.answer, arc.answer) == ("C", "B")
    assert "C. three" in mmlu.prompt
    assert all(mmlu.check(a) is True for a in ("C", "c", "(C)", "C.", "C)"))
    assert all(mmlu.check(a) is False for a in ("A", "CC", "C D", "three", "C or D", "ABCD", "", "(c", "C\nD", "С")[:6])
    letters = task("choice", MMLU | {"answer": "D"}).items[0]
    assert letters.answer == "D"


def test_code_is_judged_by_tests_it_never_sees(task):
    humaneval, mbpp = task("code", HUMANEVAL, MBPP).items
    assert humaneval.check(humaneval.answer) is True
    assert humaneval.check("    return x + x\n") is True
    assert humaneval.check("def twice(x):\n    return helper(x) + x - 1") is True  # written anew
    assert humaneval.check("def twice(x):\n    return x") is False
    assert "assert" not in humaneval.prompt
    assert mbpp.check(mbpp.answer) is True
    assert mbpp.check("def share(a, b):\n    return (2,)") is False
    assert MBPP["test_list"][0] in mbpp.prompt and MBPP["test_list"][1] not in mbpp.prompt


@pytest.mark.parametrize(
    ("kind", "line", "says"),
    [
        ("math", "{", "line 2"),
        ("math", "[1]", "line 2: a list"),
        ("math", "[" * 100_000, "line 2"),
        ("math", '{"question": "q"}', "line 2: no answer"),
        ("math", '{"answer": "1"}', "no problem or question"),
        ("math", '{"question": "q", "answer": "#### "}', "empty answer"),
        ("math", '{"problem": "q", "solution": "so"}', "without a result"),
        ("choice", '{"question": "q", "choices": ["a"], "answer": 0}', "choices"),
        ("choice", '{"question": "q", "choices": ["a", "b"], "answer": 2}', "answer 2"),
        ("choice", '{"question": "q", "choices": ["a", "b"], "answer": true}', "answer True"),
        ("choice", '{"question": "q", "choices": ["a", "b"], "answer": "Z"}', "answer 'Z'"),
        ("choice", '{"question": "q", "choices": ["a", "b"]}', "answer None"),
        ("code", '{"prompt": "p", "entry_point": "f"}', "no test"),
        ("code", '{"prompt": "p q", "entry_point": "f", "test": "x"}', "no Python"),
        ("code", '{"text": "p", "test_list": "assert f(1)"}', "test_list"),
        ("code", '{"text": "p", "test_list": ["assert len([])"]}', "call nothing"),
        ("code", '{"text": "p", "test_list": ["assert f("]}', "no Python"),
    ],
)
def test_a_bad_line_is_named(tmp_path, kind, line, says):
    good = {"math": GSM8K, "choice": MMLU, "code": MBPP}[kind]
    file = tmp_path / "some.jsonl"
    file.write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(DataError, match=f"some.jsonl.*{says}"):
        resolve(f"{kind}:{file}")


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        resolve(f"math:{tmp_path}/none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="without problems"):
        resolve(f"math:{tmp_path}/empty.jsonl")
    with pytest.raises(ConfigError, match="task 'maths:x'"):
        resolve("maths:x")


@pytest.mark.skipif(bool(find_spec("reasoning_gym")), reason="reasoning-gym is here")
def test_reasoning_gym_is_asked_for_where_it_is_missing():
    with pytest.raises(ConfigError, match=r"shoal-lm\[rl\]"):
        resolve("reasoning-gym:gcd")


@pytest.mark.skipif(not find_spec("reasoning_gym"), reason="needs the extra rl: pip install 'shoal-lm[rl]'")
def test_reasoning_gym_gives_tasks_that_only_the_whole_answer_solves():
    tasks = resolve("reasoning-gym:gcd,reasoning-gym:spell_backward,reasoning-gym:leg_counting")
    items = [draw(tasks, 0, i, "train") for i in range(12)]
    assert items == [draw(tasks, 0, i, "train") for i in range(12)]
    assert len({it.content for it in items}) == 12
    with Graders() as graders:
        assert graders.grade([(it, it.answer) for it in items]) == ["right"] * 12
        for wrong in ("", "{0} or so", "The answer is {0}.", None):
            answers = [(it, wrong and wrong.format(it.answer)) for it in items]
            assert graders.grade(answers) == ["wrong"] * 12, wrong
    with pytest.raises(ConfigError, match="did you mean reasoning-gym:gcd"):
        resolve("reasoning-gym:gdc")


@pytest.mark.skipif(not find_spec("reasoning_gym"), reason="needs the extra rl: pip install 'shoal-lm[rl]'")
@pytest.mark.parametrize("name", ["countdown", "n_queens", "codeio", "puzzle24", "simple_integration"])
def test_scorers_that_evaluate_answers_are_refused(name):
    with pytest.raises(ConfigError, match="evaluates"):
        resolve(f"reasoning-gym:{name}")
