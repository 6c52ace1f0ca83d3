"""Whatever fits the served OpenAPI, or just doesn't, is answered or refused in our shape; nothing makes a 5xx."""

from contextlib import suppress

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from tests.server.fake import FakeEngine
from tests.server.running import NAME, Running

schemathesis = pytest.importorskip("schemathesis")
EXAMPLES = 40  # an operation and mode
GOOD = {
    "/v1/chat/completions": {"model": NAME, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"model": NAME, "prompt": "hi"},
    "/v1/embeddings": {"model": NAME, "input": "hi"},
}
MODES = ("positive", "negative")


@pytest.mark.slow
def test_no_request_makes_a_5xx(tmp_path):
    with Running(tmp_path, FakeEngine()) as s:
        schema = schemathesis.openapi.from_dict(s.http.get("/openapi.json").json())
        operations = [result.ok() for result in schema.get_all_operations()]
        assert {"/v1/chat/completions", "/v1/files", "/health"} <= {o.path for o in operations}
        tried = {(o.method.upper(), o.path, mode): sent(s, o, mode) for o in operations for mode in MODES}
        for path, taken in (
            ("chat/completions", 200),
            ("completions", 200),
            ("embeddings", 200),
            ("files", 200),
            ("batches", 404),
        ):
            assert taken in tried["POST", f"/v1/{path}", "positive"], path
            assert tried["POST", f"/v1/{path}", "negative"].count(400) >= EXAMPLES / 4, path
        assert s.ask().status_code == 200


def sent(s: Running, operation, mode: str) -> list[int]:
    """The status of each answer to requests that fit an operation, or don't."""
    found: list[int] = []

    @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode(mode)))
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    def each(case):
        if operation.path in GOOD and isinstance(case.body, dict):
            fields = sorted(case.body.items())
            first = len(found) % max(len(fields), 1)
            case.body = GOOD[operation.path] | dict(fields[first : first + 2])  # so that some are right as a whole
        response = case.call(base_url=s.url, headers={"Authorization": f"Bearer {s.key}"}, timeout=20)
        assert response.status_code < 500, (case.as_curl_command(), response.status_code, response.text)
        if response.status_code >= 400:
            assert response.json()["error"]["request_id"] == response.headers["x-request-id"][0]
        found.append(response.status_code)

    with suppress(Unsatisfiable, pytest.skip.Exception):  # nothing can be wrong with a request that has no part
        each()
    return found
