"""Files and batches through the official client; what a stop interrupts goes on, answered once and billed once."""

import json

import openai
import pytest
from sqlalchemy import insert, select

from shoal.engine.request import Step
from shoal.server import generation
from shoal.server.batch import MAX_LINES, TRIES
from shoal.server.ledger import BATCHES
from tests.server.fake import END, FakeEngine
from tests.server.running import NAME, Running, assert_refused, until

pytestmark = pytest.mark.slow  # each waits for clocks

ENDPOINT = "/v1/chat/completions"


def line(custom_id: str, **fields) -> str:
    body = {"model": NAME, "messages": [{"role": "user", "content": custom_id}], "thinking": {"type": "disabled"}}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": body | fields})


def uploaded(s: Running, *lines: str) -> str:
    content = "\n".join(lines).encode()
    return s.client().files.create(file=("in.jsonl", content), purpose="batch").id


def finished(s: Running, batch_id: str):
    until(lambda: s.client().batches.retrieve(batch_id).status in ("completed", "cancelled", "failed"), 30)
    return s.client().batches.retrieve(batch_id)


def answers(s: Running, file_id: str) -> dict[str, dict]:
    rows = map(json.loads, s.client().files.content(file_id).text.splitlines())
    return {row["custom_id"]: row for row in rows}


def test_a_batch_from_file_to_file(served):
    before = len(served.rows())
    lines = [line(f"q{i}") for i in range(12)] + [line("bad", temperature=9), line("stream", stream=True)]
    batch = served.client().batches.create(
        input_file_id=uploaded(served, *lines), endpoint=ENDPOINT, completion_window="24h", metadata={"a": "b"}
    )
    assert batch.status == "in_progress" and batch.metadata == {"a": "b"}
    batch = finished(served, batch.id)
    counts = batch.request_counts
    assert (batch.status, counts.total, counts.completed, counts.failed) == ("completed", 14, 12, 2)
    good, bad = answers(served, batch.output_file_id), answers(served, batch.error_file_id)
    assert list(good) == [f"q{i}" for i in range(12)]
    body = good["q3"]["response"]["body"]
    assert body["choices"][0]["message"]["content"] == "Hello, world." and body["usage"]["completion_tokens"] == 14
    assert {k: v["response"]["status_code"] for k, v in bad.items()} == {"bad": 400, "stream": 400}
    assert "temperature" in bad["bad"]["error"]["message"]
    assert len(served.rows()) == before + 12
    assert {r.priority for r in served.engine.requests[-12:]} == {10}
    assert batch.id in [b.id for b in served.client().batches.list()]


def test_files_belong_to_their_tenant(served):
    file_id = uploaded(served, line("a"))
    facts = served.client().files.retrieve(file_id)
    assert (facts.filename, facts.purpose, facts.bytes) == ("in.jsonl", "batch", len(line("a")))
    other = served.ledger.new_key("someone else")
    until(lambda: other.id in served.service.keys.rows)
    client = served.client(other.secret)
    assert client.files.list().data == []
    for act in (client.files.retrieve, client.files.content, client.files.delete, client.batches.retrieve):
        with pytest.raises(openai.NotFoundError):
            act(file_id)
    with pytest.raises(openai.NotFoundError):
        client.batches.create(input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h")
    assert served.client().files.delete(file_id).deleted
    with pytest.raises(openai.NotFoundError):
        served.client().files.retrieve(file_id)


@pytest.mark.parametrize(
    "lines, says",
    [
        (["{"], "line 1"),
        ([line("a"), "[]"], "line 2"),
        ([line("a"), line("a")], "line 2"),
        ([json.dumps({"custom_id": "a", "method": "GET", "url": ENDPOINT, "body": {}})], "line 1"),
        ([json.dumps({"custom_id": "a", "method": "POST", "url": "http://x/", "body": {}})], "line 1"),
        ([line("a").replace('"body"', '"custom_id": "b", "body"')], "twice"),
        (["\n\n"], "without requests"),
    ],
)
def test_files_that_are_no_batches(served, lines, says):
    file_id = uploaded(served, *lines)
    assert_refused(served.http.post("/v1/batches", json={"input_file_id": file_id, "endpoint": ENDPOINT}), 400, says)
    assert MAX_LINES == 50_000


def test_uploads_that_are_none(served):
    def post(**fields):
        return served.http.post("/v1/files", **fields)

    assert_refused(post(files={"file": b"x"}, data={"purpose": "fine-tune"}), 400, "purpose")
    assert_refused(post(files={"file": b"x"}), 400)
    assert_refused(post(data={"purpose": "batch"}), (400, 415))
    assert_refused(post(files={"file": b"x", "file2": b"y"}, data={"purpose": "batch"}), 400)
    header = {"Content-Type": "multipart/form-data"}
    assert_refused(post(content=b"x", headers=header), 400)
    assert_refused(post(content=b"--b\r\nnonsense", headers={"Content-Type": "multipart/form-data; boundary=b"}), 400)
    assert_refused(post(content=b"{}", headers={"Content-Type": "application/json"}), 415)


def test_a_batch_goes_on_after_a_stop_and_bills_each_line_once(tmp_path, database):
    engine = FakeEngine(lambda _: [*b"x" * 20, END], pause=0.01, slots=2)
    with Running(tmp_path, engine, url=database) as s:
        file_id = uploaded(s, *(line(f"q{i}") for i in range(30)))
        batch = s.client().batches.create(input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h")
        until(lambda: s.client().batches.retrieve(batch.id).request_counts.completed >= 3, 30)
        key = s.key
    with Running(tmp_path, url=database) as s:
        s.key = key
        done = finished(s, batch.id)
        assert (done.status, done.request_counts.completed) == ("completed", 30)
        texts = [
            a["response"]["body"]["choices"][0]["message"]["content"] for a in answers(s, done.output_file_id).values()
        ]
        assert texts.count("x" * 20) >= 3 and texts.count("Hello, world.") >= 1 and len(texts) == 30
        rows = s.rows()
        assert len(rows) == 30 and {r["completion"] for r in rows} == {21, 14}


def test_a_cancelled_batch_ends_with_what_it_has(tmp_path, database):
    with Running(tmp_path, FakeEngine(lambda _: [*b"x" * 20, END], pause=0.01, slots=1), url=database) as s:
        file_id = uploaded(s, *(line(f"q{i}") for i in range(40)))
        batch = s.client().batches.create(input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h")
        until(lambda: s.client().batches.retrieve(batch.id).request_counts.completed >= 1, 30)
        assert s.client().batches.cancel(batch.id).status == "cancelling"
        done = finished(s, batch.id)
        assert done.status == "cancelled" and 1 <= done.request_counts.completed < 40
        kept = answers(s, done.output_file_id)
        assert len(kept) == done.request_counts.completed == len(s.rows()) and done.error_file_id is None
        assert all(a["response"]["body"]["choices"][0]["message"]["content"] == "x" * 20 for a in kept.values())


def test_a_key_that_is_revoked_in_the_middle_of_a_batch(tmp_path, database):
    """What was answered stands and is billed; no other line runs, and each says why."""
    with Running(tmp_path, FakeEngine(lambda _: [*b"x" * 20, END], pause=0.01, slots=1), url=database) as s:
        other = s.ledger.new_key("a colleague", tenant=s.service.keys.who(f"Bearer {s.key}").tenant)
        until(lambda: other.id in s.service.keys.rows)
        file_id = uploaded(s, *(line(f"q{i}") for i in range(60)))
        batch = s.client().batches.create(input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h")
        until(lambda: s.client().batches.retrieve(batch.id).request_counts.completed >= 1, 30)
        s.ledger.revoke(s.key_id)
        s.key = other.secret
        done = finished(s, batch.id)
        counts = done.request_counts
        assert done.status == "completed" and counts.completed >= 1 and counts.failed >= 1
        assert counts.completed + counts.failed == 60 and counts.completed == len(s.rows())
        failed = answers(s, done.error_file_id).values()
        assert {(a["response"]["status_code"], a["error"]["code"]) for a in failed} == {(401, "invalid_api_key")}


def test_what_a_tenant_may_store_and_have_under_way_is_bounded(tmp_path):
    engine = FakeEngine(lambda _: [*b"x" * 500, END], pause=0.01, slots=1)
    with Running(tmp_path, engine, stored_bytes=400, live_batches=1) as s:
        file_id = uploaded(s, line("a"))
        s.client().batches.create(input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h")
        again = s.http.post("/v1/batches", json={"input_file_id": file_id, "endpoint": ENDPOINT})
        assert_refused(again, 429, "under way already")
        many = {"file": "\n".join(line(f"q{i}") for i in range(3)).encode()}
        assert_refused(s.http.post("/v1/files", files=many, data={"purpose": "batch"}), 400, "delete some")


def test_two_servers_of_one_ledger_share_no_batch_until_one_is_silent(tmp_path):
    url = f"sqlite:///{tmp_path}/shared.db"
    with Running(tmp_path / "a", FakeEngine(lambda _: [*b"x" * 20, END], pause=0.01), url=url) as a:
        file_id = uploaded(a, *(line(f"q{i}") for i in range(6)))
        with Running(tmp_path / "b", url=url, lease_seconds=0.3) as b:
            batch = a.client().batches.create(input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h")
            assert finished(a, batch.id).request_counts.completed == 6 and not b.engine.requests
            with a.ledger.engine.begin() as db:  # as one that was killed leaves it
                lost = dict(db.execute(select(BATCHES)).mappings().one())
                db.execute(
                    insert(BATCHES).values(lost | {"id": "x", "status": "in_progress", "lease": 1, "model": "y"})
                )
                db.execute(insert(BATCHES).values(lost | {"id": "z", "status": "in_progress", "lease": 1}))
            until(lambda: len(b.engine.requests) == 6)
            assert b.client(a.key).batches.retrieve("x").status == "in_progress", "another model's is left alone"


def test_a_line_that_breaks_the_engine_is_given_up_and_holds_nobody_up(tmp_path, monkeypatch):
    class Failing(FakeEngine):
        def step(self, run):
            bad = b"poison" in bytes(t for t in run.request.tokens if t < 256)
            return Step((), "error", run.usage, "broke") if bad else super().step(run)

    monkeypatch.setattr(generation, "RETRY_SECONDS", 1)
    with Running(tmp_path, Failing()) as s:
        lines = [*(line(f"poison{i}") for i in range(4)), *(line(f"q{i}") for i in range(4))]
        batch = s.client().batches.create(input_file_id=uploaded(s, *lines), endpoint=ENDPOINT, completion_window="24h")
        done = finished(s, batch.id)
        assert (done.request_counts.completed, done.request_counts.failed) == (4, 4)
        assert {a["response"]["status_code"] for a in answers(s, done.error_file_id).values()} == {503}
        assert len(s.engine.requests) == 4 * TRIES + 4 and len(s.rows()) == 4


def test_a_batch_has_no_slow_reader(tmp_path):
    with Running(tmp_path, FakeEngine(lambda _: [*b"x" * 50, END]), buffered_deltas=10) as s:
        batch = s.client().batches.create(
            input_file_id=uploaded(s, line("a")), endpoint=ENDPOINT, completion_window="24h"
        )
        answer = answers(s, finished(s, batch.id).output_file_id)["a"]["response"]["body"]["choices"][0]
        assert (answer["message"]["content"], answer["finish_reason"]) == ("x" * 50, "stop")


def test_interactive_requests_go_first(tmp_path):
    engine = FakeEngine(lambda _: [*b"x" * 30, END], pause=0.01, slots=1)
    with Running(tmp_path, engine) as s:
        file_id = uploaded(s, *(line(f"q{i}") for i in range(8)))
        s.client().batches.create(input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h")
        until(lambda: len(engine.requests) >= 3)
        assert s.ask().status_code == 200
        ours = next(r for r in engine.requests if r.priority == 0)
        assert engine.started.index(ours) < engine.requests.index(ours), "it overtook lines that came before it"
