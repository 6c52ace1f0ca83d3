"""/v1/embeddings through the official client: vectors, what they cost, and what is refused."""

import base64
import struct

import openai
import pytest

from shoal.server.fields import MAX_INPUTS
from tests.server.fake import FakeEngine
from tests.server.running import NAME, PRICES, Running, assert_refused, until

PATH = "/v1/embeddings"


def embed(s: Running, **fields):
    return s.http.post(PATH, json={"model": NAME, "input": "abc"} | fields)


def test_vectors_of_every_kind_of_input(served):
    create = served.client().embeddings.create
    third = pytest.approx([3**-0.5] * 3 + [0], abs=1e-7)
    assert create(model=NAME, input="abc").data[0].embedding == third, "base64, which the client asks for by itself"
    assert create(model=NAME, input="abc", encoding_format="float").data[0].embedding == third
    assert create(model=NAME, input=[97, 98, 99]).data[0].embedding == third
    several = create(model=NAME, input=["aab", "d", "zz"]).data
    assert [e.index for e in several] == [0, 1, 2]
    assert several[0].embedding == pytest.approx([0.8**0.5, 0.2**0.5, 0, 0], abs=1e-7)
    assert several[1].embedding == [0, 0, 0, 1] and several[2].embedding == [0, 0, 0, 0]
    assert create(model=NAME, input=[[97], [98, 97]]).data[0].embedding == [1, 0, 0, 0]
    raw = embed(served, encoding_format="base64").json()["data"][0]["embedding"]
    assert list(struct.unpack("<4f", base64.b64decode(raw))) == third
    assert len(create(model=NAME, input=["a"] * MAX_INPUTS).data) == MAX_INPUTS


def test_they_are_billed_as_prompts_alone(served):
    before = len(served.rows())
    answer = embed(served, input=["abc", "d"]).json()
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 6
    row = served.rows()[before]
    assert (row["route"], row["prompt"], row["cached"], row["completion"]) == (PATH, 6, 0, 0)
    assert answer["usage"]["cost_usd"] == pytest.approx(6 * PRICES.miss / 1e9) and len(served.rows()) == before + 1


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": ["a"] * (MAX_INPUTS + 1)}, "input"),
        ({"input": [260]}, "input"),
        ({"input": [-1]}, "input[0][0]"),
        ({"input": [1.5]}, "input[0]"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": "x" * 5000}, "input"),
        ({"input": "x" * 200_000}, "input"),
        ({"dimensions": 2}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"stream": True}, "stream"),
    ],
)
def test_embeddings_that_are_refused(served, fields, param):
    n = len(served.engine.requests)
    error = assert_refused(embed(served, **fields), 400)
    assert error["param"].startswith(param), error
    assert len(served.engine.requests) == n


@pytest.mark.slow
def test_keys_models_rates_and_budgets_hold_for_them_too(tmp_path):
    with Running(tmp_path, FakeEngine()) as s:
        assert_refused(s.http.post(PATH, json={}, headers={"Authorization": ""}), 401)
        assert_refused(embed(s, model="other"), 404)
        poor = s.ledger.new_key("poor", token_budget=6, requests_per_minute=2)
        until(lambda: poor.id in s.service.keys.rows)
        client = s.client(poor.secret)
        assert client.embeddings.create(model=NAME, input="abc").usage.total_tokens == 4
        s.rows()
        with pytest.raises(openai.APIStatusError) as e:
            client.embeddings.create(model=NAME, input="abc")
        assert e.value.status_code == 402
        with pytest.raises(openai.RateLimitError):
            client.embeddings.create(model=NAME, input="a")
