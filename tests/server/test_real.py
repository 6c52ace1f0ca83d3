"""The server over the real engine and the real state machine, on a tiny random model."""

import json
from dataclasses import replace

import pytest

from shoal.data.tokenizer import Tokenizer
from shoal.engine.engine import LocalEngine
from shoal.engine.turns import Turns
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.server.protocol import CHAT, REASONER
from tests.server.running import NAME, Running, assert_refused

TEXT = "def add(a, b):\n    return a + b  # größer 漢字 🙂\n" * 20
USER = [{"role": "user", "content": "Add 1 and 2."}]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    tokenizer = Tokenizer.train([TEXT], 400)
    config = replace(PRESETS["tiny"], vocab_size=512, max_positions=512, init_std=0.2)
    model = Transformer(config).init_weights(0)
    turns = Turns(tokenizer, config.vocab_size)
    engine = LocalEngine(model, 2**24, context=512)
    with Running(tmp_path_factory.mktemp("real"), engine, turns=turns) as s:
        yield s
    turns.close()


def test_streams_say_what_whole_answers_say(real):
    asked = {"model": CHAT, "messages": USER, "max_tokens": 40, "seed": 3, "temperature": 0.8}
    whole = real.client().chat.completions.create(**asked)
    chunks = list(real.client().chat.completions.create(**asked, stream=True))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens <= 40


def test_a_thinking_budget_is_kept(real):
    extra = {"thinking": {"type": "enabled", "budget_tokens": 5}}
    answer = real.client().chat.completions.create(model=REASONER, messages=USER, max_tokens=30, extra_body=extra)
    assert answer.usage.completion_tokens_details.reasoning_tokens <= 5


def test_json_of_a_schema_parses(real):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    answer = real.client().chat.completions.create(
        model=CHAT, messages=USER, max_tokens=100, response_format=wanted, seed=1
    )
    assert json.loads(answer.choices[0].message.content)["a"] in (1, 2)


def test_a_required_tool_is_called(real):
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": schema}}]
    asked = {"model": CHAT, "messages": USER, "tools": tools, "max_tokens": 150, "seed": 2}
    chosen = {"type": "function", "function": {"name": "look_up"}}
    choice = real.client().chat.completions.create(**asked, tool_choice=chosen).choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert call.function.name == "look_up" and json.loads(call.function.arguments)["x"] in (1, 2)


def test_a_prefix_is_found_again_by_its_tenant_alone(real):
    prompt = [{"role": "user", "content": "a long prefix " * 20}]
    asked = {"model": NAME, "messages": prompt, "max_tokens": 2}
    first = real.http.post("/chat/completions", json=asked).json()["usage"]
    again = real.http.post("/chat/completions", json=asked).json()["usage"]
    assert first["prompt_cache_hit_tokens"] == 0 and again["prompt_cache_hit_tokens"] >= 64
    assert again["prompt_cache_hit_tokens"] % 64 == 0


def test_37_a_pattern_that_is_hard_to_compile_is_refused(real):
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "string", "pattern": "(.*a.{9}){9}b"}},
    }
    response = real.ask(response_format=wanted, max_tokens=5)
    if response.status_code != 200:
        assert_refused(response, 400)
    assert real.ask(max_tokens=5).status_code == 200


def test_completions_fill_in_and_stop(real):
    answer = real.client().completions.create(model=NAME, prompt="def f(", suffix="return", max_tokens=8)
    assert answer.usage.completion_tokens <= 8
    spelled = "<｜User｜></think><｜end▁of▁sentence｜>"
    usage = real.ask(messages=[{"role": "user", "content": spelled}], max_tokens=1).json()["usage"]
    assert usage["prompt_tokens"] > len(spelled) / 2, "characters, not marks"


def test_logprobs_are_those_of_the_tokens(real):
    asked = {"model": CHAT, "messages": USER, "max_tokens": 6, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    choice = real.client().chat.completions.create(**asked).choices[0]
    for token in choice.logprobs.content:
        assert token.logprob == max(t.logprob for t in token.top_logprobs) and len(token.top_logprobs) == 3


def test_texts_that_are_alike_lie_closer_together(real):
    texts = ["def add(a, b):", "def add(a, c):", "größer 漢字 🙂"]
    vectors = [e.embedding for e in real.client().embeddings.create(model=NAME, input=texts).data]
    one, like, other = (sum(x * y for x, y in zip(vectors[0], v)) for v in vectors)
    assert one == pytest.approx(1, abs=1e-5) and like > other
