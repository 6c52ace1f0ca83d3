"""What is kept of a teacher's answers: every answer has one verdict, and the verdicts add up."""

from functools import partial

import pytest

from shoal.post.answers import Answer
from shoal.post.config import KeepConfig
from shoal.post.selection import Prompt, final_answer, select
from shoal.tasks.grading import Graders
from shoal.tasks.task import Exactly, Item

BROKEN = partial(divmod, 0)  # a check that raises


def item(prompt: str, check=None) -> Item:
    return Item("sums", 1, prompt, "", "4", check or Exactly("4"), prompt)


def said(content: str, reasoning: str = "two and two", sample: int = 0, prompt: str = "2 + 2", finish: str = "stop"):
    return Answer(prompt, sample, reasoning, content, finish)


CONFIG = KeepConfig(per_prompt=2, repeats=3, characters=80, language="prompt")


def test_every_answer_has_its_verdict():
    answers = [
        said("4"),
        said("so <answer>4</answer>", "another way"),
        said("4"),
        said("5"),
        said("4", "zwei und zwei: 둘 더하기 둘 더하기 둘 더하기"),
        said("4", "again\n" * 4),
        said("4", "x" * 90),
        said("4", finish="length"),
        said("", finish="refused"),
        said("4", "a third way"),
        said("4", prompt="broken"),
        said("anything", prompt="free"),
    ]
    prompts = [Prompt("2 + 2", item("2 + 2")), Prompt("broken", item("broken", BROKEN)), Prompt("free")]
    with Graders() as graders:
        found = select(prompts, answers, graders, CONFIG)
    assert found.counts.total() == len(answers)
    assert found.counts == {
        "kept": 3, "duplicate": 1, "wrong": 1, "language": 1, "repeats": 1, "long": 1, "cut off": 1, "refused": 1,
        "surplus": 1, "failed": 1,
    }  # fmt: skip
    lessons = [(m.reasoning, m.content) for talk in found.conversations for m in talk.messages[1:]]
    assert lessons == [("two and two", "4"), ("another way", "4"), ("two and two", "anything")]
    assert "3 kept" in str(found) and "1 failed" in str(found)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("4", ("", "4")),
        ("So it is\n<answer> 4 </answer>", ("So it is", "4")),
        (r"Hence \boxed{\frac{1}{2}}.", ("Hence", r"\frac{1}{2}")),
        (r"Hence \boxed{4", ("Hence", None)),
        ("  ", ("", None)),
    ],
)
def test_final_answers(content, expected):
    assert final_answer(content) == expected


def test_prose_before_an_answer_is_reasoning_where_none_was_shown():
    with Graders() as graders:
        found = select([Prompt("2 + 2", item("2 + 2"))], [said("Two twice: \\boxed{4}", "")], graders, CONFIG)
    ((_, turn),) = (talk.messages for talk in found.conversations)
    assert (turn.reasoning, turn.content) == ("Two twice:", "4")
