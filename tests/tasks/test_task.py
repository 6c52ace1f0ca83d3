import pickle
import subprocess
import sys
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import ConfigError, DataError
from shoal.tasks.catalog import GENERATORS, TASKS, resolve
from shoal.tasks.task import HELD_OUT_ONE_IN, Item, Made, Task, draw, extract_answer

ALL = tuple(TASKS.values())
QUICK = tuple(task for task in ALL if not task.seconds)  # the others run code: test_snippets.py
EASY = TASKS["addition"]


def test_a_draw_stands_alone_and_seeds_do_not_overlap():
    assert draw(ALL, 1, 5, "train") == draw(ALL, 1, 5, "train")
    prompts = [{draw((EASY,), seed, i, "train", (5,)).content for i in range(100)} for seed in (1, 2)]
    assert len(prompts[0] & prompts[1]) < 10
    assert draw((EASY,), 1, 1, "train", (5,)) != draw((EASY,), 2, 0, "train", (5,))


def test_tasks_and_levels_come_evenly():
    items = [draw(ALL, 0, i, "train") for i in range(3000)]
    for task in ALL:
        assert abs(sum(it.task == task.name for it in items) / len(items) - 1 / len(ALL)) < 0.03
    assert {it.level for it in items if it.task == EASY.name} == set(EASY.levels)


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_every_level_has_problems_of_both_splits(task):
    for level in task.levels:
        train = {draw((task,), 0, i, "train", (level,)).content for i in range(30)}
        held_out = {draw((task,), 0, i, "held_out", (level,)).content for i in range(10)}
        assert not train & held_out
        assert len(held_out) > 1


def test_the_split_is_the_content_s_and_no_phrasing_s():
    items = [draw((EASY,), seed, i, "held_out", (1,)) for seed in (1, 2) for i in range(200)]
    held_out = {it.content for it in items}
    assert len({it.prompt for it in items}) > len(held_out)  # the same problems in other words
    assert not held_out & {draw((EASY,), 3, i, "train", (1,)).content for i in range(500)}
    one, other = (Item("t", 1, prompt, "", "", bool, "same") for prompt in ("a", "b"))
    assert one.split == other.split
    share = sum(Item("t", 1, "", "", "", bool, str(i)).split == "held_out" for i in range(4000)) / 4000
    assert abs(share - 1 / HELD_OUT_ONE_IN) < 0.02


def one_problem(rng: Random, level: int) -> Made:
    return Made("p", "r", "a", "the only one")


def test_a_split_or_level_without_problems_is_refused():
    task = Task("single", (1, 2), one_problem)
    there = task.item(1, one_problem(Random(), 1)).split
    assert draw((task,), 0, 0, there).answer == "a"
    with pytest.raises(DataError, match="single, level [12], without a problem"):
        draw((task,), 0, 0, "train" if there == "held_out" else "held_out")
    with pytest.raises(DataError, match="some of 1, 2"):
        draw((task,), 0, 0, there, (3,))


def test_names_resolve_in_order_and_typing_errors_meet_the_nearest_name():
    assert [t.name for t in resolve(" countdown,addition, ")] == ["countdown", "addition"]
    with pytest.raises(ConfigError, match="did you mean countdown"):
        resolve("countdwon")
    with pytest.raises(ConfigError, match="no task"):
        resolve(" , ")


@given(st.integers(0, 2**63), st.integers(0, 2**63))
def test_the_worked_answer_and_no_other_is_accepted(seed, index):
    it = draw(QUICK, seed, index, "train")
    assert it.check(it.answer) is True
    for wrong in ("", "0" + it.answer, it.answer + "0", "-" + it.answer, it.answer + ".0", "+" + it.answer, "x"):
        assert it.check(wrong) is False, (it, wrong)


@pytest.mark.parametrize("task", ALL, ids=lambda task: task.name)
def test_items_travel_between_processes(task):
    it = draw((task,), 0, 3, "held_out")
    there = pickle.loads(pickle.dumps(it))
    assert there == it and there.split == "held_out"


def test_worked_text_has_training_items_only_and_equal_problems_equal_solutions():
    solutions = {}
    for prompt, reasoning, answer in GENERATORS["worked-tasks"](5000):
        assert solutions.setdefault(prompt, (reasoning, answer)) == (reasoning, answer)
    assert len(solutions) < 5000  # there were equal prompts to compare
    held_out = {draw((EASY,), 0, i, "held_out").prompt for i in range(300)}
    trained_on = {prompt for prompt, _, _ in GENERATORS["worked-addition"](1000)}
    assert not held_out & trained_on


def test_the_corpus_source_s_stamp_follows_every_file_of_the_room(tmp_path):
    """A corpus is made again when a file that shapes its items has changed."""
    (tmp_path / "made.py").write_text("from other import word\ndef items(count):\n    yield word, '', ''\n")
    stamps = []
    for word in "ab":
        (tmp_path / "other.py").write_text(f"word = {word!r}\n")
        code = (
            "from functools import partial; import made; from shoal.data.sources import resolve;"
            "print(resolve('made:1', {'made': partial(made.items)}).stamp)"
        )
        env = {"PYTHONPATH": f"{tmp_path}:{':'.join(p for p in sys.path if p)}"}
        stamps.append(subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True).stdout)
    assert stamps[0] != stamps[1]


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
        "a</think><answer><think>4</answer>",
        "",
    ],
)
def test_an_answer_in_another_form_is_none(completion):
    assert extract_answer(completion) is None


def test_an_answer_may_be_code():
    assert extract_answer("a</think>\n<answer>4</answer>\n") == "4"
    assert extract_answer("</think><answer>\nif a < b > c:\n  x\n</answer>") == "\nif a < b > c:\n  x\n"
