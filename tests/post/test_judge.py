"""Preferences: rules, and a judge that is asked once, believed only where it says a number, and never a silent 0."""

from types import SimpleNamespace
from typing import Any

import pytest

from shoal.errors import ConfigError
from shoal.post.judge import Judge, Rules, preference, score, shares
from shoal.post.rewards import RewardConfig
from shoal.post.rl import preferred
from shoal.post.rl_config import JudgeConfig
from tests.post.scripted import Script, says, server

PAIRS = [("1 + 1 = ?", "One and one.</think><answer>2</answer>"), ("2 + 2 = ?", "Two.</think><answer>4</answer>")]


def scores(script: Script, path, pairs=PAIRS, **more) -> tuple[list[float | None], int]:
    with server(script) as asked:
        config = JudgeConfig(asked.url, "judge", concurrency=2, timeout_seconds=5, tries=1, **more)
        with Judge(config, path) as judge:
            found = judge.scores(pairs)
    return found, len(asked)


def test_what_was_judged_is_not_asked_again(tmp_path):
    path, heard = tmp_path / "judged.jsonl", []

    def by_length(body, number):
        heard.append(body["messages"][0]["content"])
        return says("10" if "1 + 1" in heard[-1] else "1")

    with server(by_length) as asked:
        for _ in range(2):  # the second judge reads the first one's file
            with Judge(JudgeConfig(asked.url, "judge"), path) as judge:
                assert judge.scores([*PAIRS, PAIRS[0]]) == [1.0, 0.0, 1.0]
        assert len(asked) == 2
        with Judge(JudgeConfig(asked.url, "another"), path) as judge:
            judge.scores(PAIRS[:1])
        assert len(asked) == 3
    assert "One and one." in "".join(heard) and {body["temperature"] for body, _, _ in asked} == {0.0}


def test_of_what_was_judged_only_the_scores_stay_in_memory(tmp_path):
    with server(lambda body, number: says("10")) as asked:
        for _ in range(2):
            with Judge(JudgeConfig(asked.url, "judge"), tmp_path / "judged.jsonl") as judge:
                judge.scores(PAIRS)
                assert list(judge.known.values()) == [1.0, 1.0] and not judge.answers.found
    assert len(asked) == 2


@pytest.mark.parametrize("reply", [(500, b"busy"), says("I like it"), says(""), says("11"), (200, b"[]")])
def test_a_judge_that_fails_is_no_evidence(tmp_path, reply):
    found, _ = scores(lambda body, number: reply if "2 + 2" in str(body) else says("7"), tmp_path / "judged.jsonl")
    assert found == [pytest.approx(6 / 9), None]
    again, asked = scores(lambda body, number: says("4"), tmp_path / "judged.jsonl")
    assert None not in again and asked, "it is asked again: only what was said is kept"


def test_a_judge_that_is_gone_is_no_evidence_and_a_refused_key_is_an_error(tmp_path):
    gone = JudgeConfig("http://127.0.0.1:9/v1", "judge", tries=1)
    with Judge(gone, tmp_path / "a.jsonl") as judge:
        assert judge.scores(PAIRS) == [None, None]
    with pytest.raises(ConfigError, match="401"):
        scores(lambda body, number: (401, b"no"), tmp_path / "b.jsonl")
    with pytest.raises(ConfigError, match="without a model"):
        preference(JudgeConfig("http://127.0.0.1:9/v1"), tmp_path / "c.jsonl")


@pytest.mark.parametrize("said, value", [("1", 0.0), (" 10/10.", 1.0), ("0", None), ("8 of 10", None), ("1.5", None)])
def test_only_a_number_is_a_score(said, value):
    assert score(said) == value


def test_no_evidence_moves_nobody():
    assert shares([1.0, None, 0.5]) == [1.0, 0.75, 0.5]
    assert shares([None, None]) == [0.0, 0.0]


@pytest.mark.parametrize(
    "completion, kept",
    [
        ("1+1=2\nSo the answer is 2.</think><answer>2</answer>", 4),
        ("1+1=2</think><answer>2</answer>", 3),  # doesn't say so
        ("1+1=3\nSo the answer is 3.</think><answer>2</answer>", 3),  # says something else
        ("I know this one.</think><answer>2</answer>", 3),  # doesn't name it
        ("I know this one.</think><answer>Two of them.</answer>", 4),
        ("w b i t e r1 2.</think><answer>2</answer>", 3),  # no words
        ("So 所以 the answer is 2.</think><answer>2</answer>", 3),
        ("So the answer is 2.", 3),  # no form
        ("So it is 2.\n" * 4 + "</think><answer>2</answer>", 3),  # again and again
        ("</think><answer></answer>", 2),
    ],
)
def test_the_rules_count_what_makes_an_answer_readable(completion, kept):
    with preference(JudgeConfig(), None) as rules:  # type: ignore[arg-type]
        assert isinstance(rules, Rules) and rules.scores([("What is 1 + 1?", completion)]) == [kept / 4]


def test_the_loop_asks_only_where_preferences_count():
    texts, asked = {"a": ["x", "y"], "b": ["z", "w"]}, []
    said = {prompt: [SimpleNamespace(text=text) for text in its] for prompt, its in texts.items()}
    groups: Any = [SimpleNamespace(item=SimpleNamespace(prompt=prompt), samples=its) for prompt, its in said.items()]

    def scores(pairs):
        asked.append(pairs)
        return [1.0, None, None, None]

    taste = SimpleNamespace(scores=scores)
    for weight, found in ((0.0, [[0.0, 0.0], [0.0, 0.0]]), (0.5, [[1.0, 1.0], [0.0, 0.0]])):
        rewards = SimpleNamespace(rewards=RewardConfig(preference=weight))
        stage: Any = SimpleNamespace(config=rewards, taste=taste, scores=[])
        assert preferred(stage, groups) == found
        assert stage.scores == ([1.0, None, None, None] if weight else [])
    assert asked == [[("a", "x"), ("a", "y"), ("b", "z"), ("b", "w")]]
