"""Asking a teacher: what is sent and read, what is tried again, and that nothing is asked twice."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from shoal.engine.engine import LocalEngine
from shoal.errors import ConfigError, DataError, ResourceError, RunError
from shoal.post import teacher as module
from shoal.post.answers import Answer, Answers, parted
from shoal.post.config import DistillConfig, EndpointConfig, SamplingConfig
from shoal.post.distill import collect, cost_of, prompts_of
from shoal.post.selection import Prompt
from shoal.post.teacher import Endpoint, LocalTeacher
from tests.post.scripted import says, server
from tests.post.talks import model, tokenizer

PROMPTS = [Prompt(f"{n} + {n} = ?") for n in range(3)]
SAMPLING = SamplingConfig(temperature=0.5, max_tokens=8)


def endpoint(url: str, **more) -> Endpoint:
    return Endpoint(url, replace(EndpointConfig(model="oracle", concurrency=2, timeout_seconds=5.0), **more), SAMPLING)


@pytest.fixture
def hurried(monkeypatch):
    """Nobody waits between two tries."""
    monkeypatch.setattr(module, "LONGEST_WAIT", 0.0)


def asked_of(teacher, path, samples=2) -> list[Answer]:
    with Answers(path, teacher.name, teacher.settings) as answers:
        assert collect(teacher, PROMPTS, samples, answers, say=lambda words: None)
        return answers.of([p.text for p in PROMPTS], samples)


def test_both_ways_of_showing_reasoning_are_read():
    replies = [says("4", "two and two"), says("<think>\ntwo and two\n</think>\n\n4"), says("4")]
    with server(lambda body, number: replies[number]) as asked:
        found = list(endpoint(asked.url, concurrency=1).ask([("2 + 2", 0), ("2 + 2", 1), ("2 + 2", 2)]))
    assert [(a.reasoning, a.content) for a in found] == [("two and two", "4")] * 2 + [("", "4")]
    assert found[0] == Answer("2 + 2", 0, "two and two", "4", "stop", 10, 20)
    body, key, path = asked[0]
    assert path == "/v1/chat/completions" and key is None
    message = {"role": "user", "content": "2 + 2"}
    assert body == {"model": "oracle", "messages": [message], "temperature": 0.5, "top_p": 0.95, "max_tokens": 8}


def test_nothing_is_asked_twice(tmp_path):
    path = tmp_path / "samples.jsonl"
    with server(lambda body, number: says(str(number))) as asked:
        first = asked_of(endpoint(asked.url), path)
        assert len(asked) == 6 and asked_of(endpoint(asked.url), path) == first and len(asked) == 6
        asked_of(endpoint(asked.url), path, samples=3)
        assert len(asked) == 9
        warmer = Endpoint(asked.url, EndpointConfig(model="oracle"), replace(SAMPLING, temperature=0.9))
        asked_of(warmer, path)
        assert len(asked) == 15
        asked_of(endpoint(asked.url, model="another"), path)
        assert len(asked) == 21


def test_a_torn_line_is_asked_again(tmp_path):
    path = tmp_path / "samples.jsonl"
    with server(lambda body, number: says("x")) as asked:
        asked_of(endpoint(asked.url), path)
        path.write_bytes(path.read_bytes()[:-5])
        asked_of(endpoint(asked.url), path)
        assert len(asked) == 7
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 6


def test_a_damaged_line_is_named_and_a_file_has_one_owner(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"key": "a"}\n')
    with pytest.raises(DataError, match="line 1 is damaged"), Answers(path, "t", {}):
        pass
    path.unlink()
    with Answers(path, "t", {}), pytest.raises(RunError, match="in use"), Answers(path, "t", {}):
        pass


def test_who_is_busy_or_broken_is_asked_again(hurried):
    replies = [(429, {}), (503, {}), (200, b'{"choices": ['), (200, {"choices": []}), says("at last")]
    with server(lambda body, number: replies[number]) as asked:
        (answer,) = endpoint(asked.url).ask([("?", 0)])
    assert answer.content == "at last" and len(asked) == 5


def test_pauses_grow_and_heed_the_other_side():
    assert [module.pause(n, 0.0) for n in range(8)] == [0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 60.0, 60.0]
    assert module.pause(0, 20.0) == 20 and module.pause(0, 1e9) == 60


def test_who_never_answers_is_given_up(hurried):
    with server(lambda body, number: (500, {})) as asked:
        with pytest.raises(ResourceError, match="failed 3 times, at last with: status 500"):
            list(endpoint(asked.url, tries=3).ask([("?", 0)]))
        assert len(asked) == 3
    with pytest.raises(ResourceError, match="run it again"):
        list(endpoint(asked.url, tries=2).ask([("?", 0)]))  # nobody is there any more


def test_refusals():
    with server(lambda body, number: (401, {"error": "bad key"})) as asked:
        with pytest.raises(ConfigError, match="status 401"):
            list(endpoint(asked.url).ask([("?", 0)]))
        assert len(asked) == 1
    with server(lambda body, number: (400, {})) as asked:
        (answer,) = endpoint(asked.url).ask([("?", 0)])
        assert answer.finish == "refused"
    with pytest.raises(ConfigError, match=r"without a model"):
        endpoint("http://127.0.0.1:9", model="")


def test_the_key_comes_from_the_environment_and_stays_out_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("ORACLE_KEY", "sk-secret")
    with server(lambda body, number: says("x")) as asked:
        asked_of(endpoint(asked.url, key_env="ORACLE_KEY"), tmp_path / "samples.jsonl")
    assert {key for _, key, _ in asked} == {"Bearer sk-secret"}
    assert "sk-secret" not in (tmp_path / "samples.jsonl").read_text()
    with pytest.raises(ConfigError, match="no OTHER_KEY in the environment"):
        endpoint(asked.url, key_env="OTHER_KEY")


def test_a_model_here_is_a_teacher(folder):
    teacher = LocalTeacher(model(), tokenizer(), folder, SAMPLING)
    wanted = [(p.text, s) for p in PROMPTS for s in range(2)]
    found = sorted(teacher.ask(wanted), key=lambda a: wanted.index((a.prompt, a.sample)))
    assert [(a.prompt, a.sample) for a in found] == wanted
    assert all(1 <= a.completion_tokens <= 8 and a.prompt_tokens > 3 for a in found)
    again = sorted(teacher.ask(wanted[::-1]), key=lambda a: wanted.index((a.prompt, a.sample)))
    assert [a.completion_tokens for a in again] == [a.completion_tokens for a in found]
    assert LocalTeacher(model(), tokenizer(), folder, SAMPLING).name == teacher.name


@pytest.mark.parametrize("takes", [True, False])
def test_answers_here_depend_on_nobody_beside_them_where_that_is_cheap(folder, monkeypatch, takes):
    class Engine(LocalEngine):
        def __init__(self, *args, deterministic: bool, **more):
            asked.append(deterministic)
            super().__init__(*args, **more)

    asked: list[bool] = []
    monkeypatch.setattr(module, "LocalEngine", Engine)
    monkeypatch.setattr(module, "native", SimpleNamespace(takes=lambda model: takes))
    assert len(list(LocalTeacher(model(), tokenizer(), folder, SAMPLING).ask([("?", 0)]))) == 1 and asked == [takes]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>\na\n</think>\n\nb", ("a", "b")),
        ("a</think><answer>b</answer>", ("a", "<answer>b</answer>")),
        ("<think>never ends", ("never ends", "")),
        ("no thought at all", ("", "no thought at all")),
    ],
)
def test_reasoning_and_content_are_parted(text, expected):
    assert parted(text) == expected


def test_prompts_and_cost(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"messages": [{"role": "user", "content": "b"}]}\n{"prompt": "a"}\n')
    assert prompts_of(str(path), 0) == [Prompt("a"), Prompt("b")]
    path.write_text('{"prompt": "a"}\n{"text": "b"}\n')
    with pytest.raises(DataError, match="line 2: no prompt"):
        prompts_of(str(path), 0)
    graded = prompts_of("addition:5", 0)
    assert len(graded) == 5 and all(p.item and p.item.prompt == p.text for p in graded)
    config = DistillConfig(endpoint=EndpointConfig(usd_in=1.0, usd_out=2.0))
    assert str(cost_of([Answer("a", 0, "", "b", "stop", 500_000, 1_000_000)] * 2, config)).endswith("$5.00")
