"""Answers through OpenAI's own client: streams, thinking, tools, JSON fields, usage, errors; and the other routes."""

import json
import time

import openai
import pytest
from sqlalchemy.exc import OperationalError

from shoal.server.protocol import CHAT, REASONER
from tests.server.fake import CALL, END, THINK_END, FakeEngine
from tests.server.running import NAME, PRICES, Running, assert_refused, until

SAY_HI = [{"role": "user", "content": "hi"}]
TEXT = "Hello, world."


def test_a_whole_answer(served):
    answer = served.client().chat.completions.create(model=CHAT, messages=SAY_HI)
    choice = answer.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", TEXT, "stop")
    assert answer.model == CHAT and answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    usage = answer.usage
    assert usage.prompt_tokens == 3 and usage.completion_tokens == len(TEXT) + 1 and usage.total_tokens == 17
    assert usage.prompt_cache_hit_tokens + usage.prompt_cache_miss_tokens == usage.prompt_tokens
    assert usage.cost_usd == pytest.approx((3 * PRICES.miss + 14 * PRICES.out) / 1e9)


@pytest.mark.parametrize("include_usage", [True, False])
def test_a_stream_says_the_same_with_usage_at_its_end(served, include_usage):
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = list(served.client().chat.completions.create(model=CHAT, messages=SAY_HI, stream=True, **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == TEXT
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == 14 and all(c.usage is None for c in chunks[:-1])
    assert (chunks[-1].choices == []) == include_usage
    assert len({c.id for c in chunks}) == 1


def test_the_reasoner_thinks_beside_its_answer(tmp_path):
    engine = FakeEngine(lambda _: [*b"Hmm.", THINK_END, *b"Yes.", END])
    with Running(tmp_path, engine) as s:
        answer = s.client().chat.completions.create(model=REASONER, messages=SAY_HI)
        message = answer.choices[0].message
        assert (message.content, message.reasoning_content) == ("Yes.", "Hmm.")
        assert answer.usage.completion_tokens_details.reasoning_tokens == 4
        chunks = list(s.client().chat.completions.create(model=REASONER, messages=SAY_HI, stream=True))
        said = [c.choices[0].delta for c in chunks if c.choices]
        assert "".join(getattr(d, "reasoning_content", None) or "" for d in said) == "Hmm."
        assert "".join(d.content or "" for d in said) == "Yes."
        assert [row["reasoning"] for row in s.rows()] == [4, 4]


def test_40_tool_calls_are_text_whole_and_streamed(tmp_path):
    hostile = '{"path": "$(rm -rf /)", "code": "__import__(\'os\').system(\'id\')"}'
    engine = FakeEngine(lambda _: [CALL, *hostile.encode(), END])
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    with Running(tmp_path, engine) as s:
        asked = {"model": CHAT, "messages": SAY_HI, "tools": tools}
        choice = s.client().chat.completions.create(**asked).choices[0]
        call = choice.message.tool_calls[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert (call.id, call.function.name, call.function.arguments) == ("call_1", "look", hostile)
        pieces = [c.choices[0].delta.tool_calls for c in s.client().chat.completions.create(**asked, stream=True)]
        calls = [piece[0] for piece in pieces if piece]
        assert calls[0].function.name == "look" and calls[0].id == "call_1"
        assert "".join(c.function.arguments for c in calls) == hostile


def test_n_choices_share_one_prompt_on_the_bill(served):
    before = len(served.rows())
    answer = served.client().chat.completions.create(model=CHAT, messages=SAY_HI, n=3, seed=7)
    assert [c.index for c in answer.choices] == [0, 1, 2]
    assert {c.message.content for c in answer.choices} == {TEXT}
    assert answer.usage.prompt_tokens == 3 and answer.usage.completion_tokens == 42
    row = served.rows()[before:]
    assert [(r["prompt"], r["completion"]) for r in row] == [(3, 42)]
    seeds = [r.sampling.seed for r in served.engine.requests[-3:]]
    assert seeds[0] == 7 and len(set(seeds)) == 3


def test_streamed_choices_each_come_whole(served):
    said: dict[int, str] = {}
    finishes = {}
    for chunk in served.client().chat.completions.create(model=CHAT, messages=SAY_HI, n=2, stream=True):
        for choice in chunk.choices:
            said[choice.index] = said.get(choice.index, "") + (choice.delta.content or "")
            finishes[choice.index] = choice.finish_reason or finishes.get(choice.index)
    assert said == {0: TEXT, 1: TEXT} and finishes == {0: "stop", 1: "stop"}


def test_logprobs_of_both_kinds(served):
    asked = {"model": CHAT, "messages": SAY_HI, "logprobs": True, "top_logprobs": 2}
    content = served.client().chat.completions.create(**asked).choices[0].logprobs.content
    assert "".join(t.token for t in content) == TEXT and content[0].bytes == [ord("H")]
    assert [len(t.top_logprobs) for t in content] == [2] * len(TEXT) and content[0].logprob == -0.5
    plain = served.client().completions.create(model=NAME, prompt="x", logprobs=1).choices[0].logprobs
    assert "".join(plain.tokens) == TEXT and plain.text_offset == list(range(len(TEXT)))
    assert plain.top_logprobs[0] == {"H": -0.5}


def test_an_echo_has_the_prompt_its_scores_and_every_token_drawn(served):
    asked = {"model": NAME, "prompt": list(b"abc"), "max_tokens": 1, "logprobs": 1, "echo": True, "temperature": 0}
    choice = served.client().completions.create(**asked).choices[0]
    assert choice.text == "abcH" and choice.logprobs.tokens == ["a", "b", "c", "H"]
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.25, -0.5]
    assert choice.logprobs.top_logprobs == [None, {"b": -0.25}, {"c": -0.25}, {"H": -0.5}]
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    several = served.client().completions.create(**asked | {"prompt": [list(b"ab"), list(b"cd")]}).choices
    assert [c.text for c in several] == ["abH", "cdH"] and [len(c.logprobs.tokens) for c in several] == [3, 3]


def test_an_echo_counts_the_token_that_ended_it(tmp_path):
    """lm-evaluation-harness takes the last token for the one drawn, and it may show nothing."""
    asked = {"model": NAME, "prompt": "ab", "max_tokens": 1, "logprobs": 1, "echo": True}
    with Running(tmp_path, FakeEngine(lambda _: [END])) as s:
        choice = s.client().completions.create(**asked).choices[0]
    assert choice.text == "ab" and choice.logprobs.tokens == ["", "a", "b", ""]
    assert choice.logprobs.token_logprobs == [None, -0.25, -0.25, -0.5]


@pytest.mark.parametrize("fields", [{"logprobs": None}, {"stream": True}, {"suffix": "x"}, {"n": 2}])
def test_an_echo_alone(served, fields):
    asked = {"model": NAME, "prompt": "abc", "logprobs": 1, "echo": True} | fields
    assert served.http.post("/v1/completions", json=asked).status_code == 400


def test_completions_fill_the_middle_and_take_token_ids_and_lists(served):
    client = served.client()
    assert client.completions.create(model=NAME, prompt="def f(", suffix="return").choices[0].text == TEXT
    assert served.engine.requests[-1].tokens == (256, *b"return", *b"def f(")
    client.completions.create(model=NAME, prompt=[72, 105])
    assert served.engine.requests[-1].tokens == (72, 105)
    answer = client.completions.create(model=NAME, prompt=["a", "bb"], n=2)
    assert [c.index for c in answer.choices] == [0, 1, 2, 3] and answer.usage.prompt_tokens == 2 + 3
    text = "".join(c.choices[0].text for c in client.completions.create(model=NAME, prompt="a", stream=True))
    assert text == TEXT


def test_max_tokens_ends_with_length(served):
    answer = served.client().chat.completions.create(model=CHAT, messages=SAY_HI, max_tokens=5)
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.content == "Hello"


def test_characters_of_several_tokens_are_never_cut(tmp_path):
    text = "größer 漢字 🙂"
    with Running(tmp_path, FakeEngine(lambda _: [*text.encode(), END])) as s:
        chunks = s.client().chat.completions.create(model=CHAT, messages=SAY_HI, stream=True)
        said = [c.choices[0].delta.content or "" for c in chunks]
        assert "".join(said) == text and "�" not in "".join(said)


def test_sampling_reaches_the_engine(served):
    extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1}
    served.client().chat.completions.create(
        model=CHAT, messages=SAY_HI, temperature=0.3, top_p=0.9, logit_bias={"65": -1}, presence_penalty=0.5,
        extra_body=extra,
    )  # fmt: skip
    sampling = served.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.3, 0.9, 7, 0.1)
    assert (sampling.repetition_penalty, sampling.presence_penalty, dict(sampling.logit_bias)) == (1.1, 0.5, {65: -1})


def test_models_and_paths_without_v1(served):
    assert [m.id for m in served.client().models.list()] == [NAME, CHAT, REASONER]
    assert served.client().models.retrieve(NAME).id == NAME
    assert served.http.get("/models").json() == served.http.get("/v1/models").json()
    asked = {"model": CHAT, "messages": SAY_HI}
    for path in ("/chat/completions", "/beta/chat/completions"):
        assert served.http.post(path, json=asked).json()["choices"][0]["message"]["content"] == TEXT
    answer = served.ask("/beta/completions", prompt="a", suffix="b")
    assert answer.json()["choices"][0]["text"] == TEXT and served.rows()[-1]["route"] == "/v1/completions"


def test_errors_are_those_of_the_official_client(served):
    with pytest.raises(openai.NotFoundError, match="no such model"):
        served.client().chat.completions.create(model="other", messages=SAY_HI)
    with pytest.raises(openai.AuthenticationError):
        served.client("sk-000000000000-wrong").models.list()
    with pytest.raises(openai.BadRequestError) as e:
        served.client().chat.completions.create(model=CHAT, messages=SAY_HI, temperature=3)
    assert e.value.param == "temperature" and str(e.value.request_id).startswith("req-")


def test_an_engine_that_fails_on_a_request(tmp_path):
    class Failing(FakeEngine):
        def step(self, run):
            from shoal.engine.request import Step

            return super().step(run) if run.at < 3 else Step((), "error", run.usage, "/secret/path broke")

    with Running(tmp_path, Failing()) as s:
        assert_refused(s.ask(), 503, "the engine failed")
        with pytest.raises(openai.APIError, match="the engine failed"):
            list(s.client().chat.completions.create(model=CHAT, messages=SAY_HI, stream=True))
        assert [(row["finish"], row["completion"]) for row in s.rows()] == [("error", 3)] * 2


def test_metrics_health_and_usage(served):
    served.ask()
    rows = served.rows()
    assert served.http.get("/health").json() == {"status": "ok"}
    assert served.http.get("/ready").json() == {"status": "ready"}
    text = served.http.get("/metrics").text
    assert 'shoal_requests_total{route="/chat/completions",status="200"}' in text
    assert f'shoal_billed_tokens_total{{kind="out"}} {float(sum(r["completion"] for r in rows))}' in text
    assert "shoal_engine_running 0.0" in text and "shoal_engine_draft_speedup 1.0" in text
    until(lambda: served.http.get("/usage?by=model").json()["data"][0]["requests"] >= len(rows))
    group = served.http.get("/v1/usage?by=model").json()["data"][0]
    assert group["group"] == NAME and group["cost_usd"] == pytest.approx(sum(r["cost"] for r in rows) / 1e9)


@pytest.mark.slow
def test_queued_requests_hear_their_place_and_then_keep_alives(tmp_path):
    engine = FakeEngine(lambda _: [*b"x" * 40, END], slots=1, pause=0.02)
    with Running(tmp_path, engine, queue_seconds=0.05, keep_alive_seconds=0.1) as s:
        first = s.client().chat.completions.create(model=CHAT, messages=SAY_HI, stream=True)
        next(first)
        body = {"model": CHAT, "messages": SAY_HI, "stream": True}
        with s.http.stream("POST", "/v1/chat/completions", json=body) as second:
            lines = [line for line in second.iter_lines() if line]
        assert ": queued 1" in lines and lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 41
        first.close()


def test_a_whole_answer_that_waits_is_kept_alive_by_blank_lines(tmp_path):
    with Running(tmp_path, FakeEngine(pause=0.05), keep_alive_seconds=0.1) as s:
        response = s.ask()
        assert response.text.startswith("\n") and response.json()["choices"][0]["message"]["content"] == TEXT


def test_the_openapi_tells_of_the_bodies(served):
    spec = served.http.get("/openapi.json").json()
    body = spec["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    assert spec["components"]["schemas"]["ChatRequest"]["properties"]["n"]


def test_an_idempotency_key_is_answered_once_and_billed_once(served):
    n, before = len(served.engine.requests), len(served.rows())
    for fields in ({}, {"stream": True}):
        header = {"Idempotency-Key": f"a{fields}"}
        one, two = served.ask(headers=header, **fields), served.ask(headers=header, **fields)
        assert one.content == two.content and two.headers["x-idempotent-replay"] == "true"
    assert len(served.engine.requests) == n + 2 and len(served.rows()) == before + 2


def test_a_failed_request_frees_its_idempotency_key(served):
    header = {"Idempotency-Key": "b"}
    assert served.ask(headers=header, model="nobody").status_code == 404
    assert served.ask(headers=header).status_code == 200


def test_the_page_and_its_markdown(served):
    page = served.http.get("/", headers={"Authorization": ""})
    assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
    answer = served.http.post("/page/markdown", json={"texts": ["**a** <script>x</script>"]})
    assert answer.json() == {"html": ["<p><strong>a</strong> &lt;script&gt;x&lt;/script&gt;</p>\n"]}
    assert served.http.post("/page/markdown", json={"texts": []}, headers={"Authorization": ""}).status_code == 401


def test_faults_of_ours_have_the_shape_of_errors(served, monkeypatch):
    fault: list[Exception] = [OperationalError("SELECT secret", {}, Exception("gone"))]

    def broken(*_):
        raise fault[0]

    monkeypatch.setattr(served.ledger, "usage", broken)
    assert "SELECT" not in assert_refused(served.http.get("/usage"), 503)["message"]
    fault[0] = KeyError("/secret")
    assert assert_refused(served.http.get("/usage"), 500)["code"] == "internal"
    asked = {"input_file_id": "a\0b", "endpoint": "/v1/completions"}
    assert assert_refused(served.http.post("/v1/batches", json=asked), 400)["param"] == "input_file_id"


def test_the_ledger_knows_a_route_by_one_name(served):
    served.ask("/chat/completions")
    served.ask("/v1/chat/completions")
    assert {row["route"] for row in served.rows()[-2:]} == {"/v1/chat/completions"}


def test_streams_come_as_they_are_made(tmp_path):
    with Running(tmp_path, FakeEngine(pause=0.03)) as s:
        times = []
        for _ in s.client().chat.completions.create(model=CHAT, messages=SAY_HI, stream=True):
            times.append(time.monotonic())
        assert times[-1] - times[0] > 0.2
