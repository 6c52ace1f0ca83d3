"""Faults 16 to 20: engines and servers that die, clients that vanish, too much of everything, disks that are full."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from sqlalchemy import event, select

from shoal.engine.engine import LocalEngine
from shoal.engine.runner import Runner
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.server import journal
from shoal.server.clerk import recover
from shoal.server.ledger import USAGE, Ledger
from tests.server.fake import END, FakeEngine
from tests.server.running import CHAT, NAME, Running, assert_refused, request_bytes, until

pytestmark = pytest.mark.slow  # each waits for clocks

ROOT = Path(__file__).parents[2]
STREAM = {
    "model": NAME,
    "messages": [{"role": "user", "content": "hi"}],
    "thinking": {"type": "disabled"},
    "stream": True,
}


def slow_text(n: int = 200, pause: float = 0.01, slots: int = 8) -> FakeEngine:
    return FakeEngine(lambda _: [*b"x" * n, END], pause=pause, slots=slots)


class Reader(threading.Thread):
    """Reads a stream until it ends, in whatever way."""

    def __init__(self, url: str, key: str, fields: dict | None = None):
        super().__init__(daemon=True)
        self.url, self.key, self.body = url, key, STREAM | (fields or {})
        self.text, self.events, self.request_id, self.failed = "", [], "", None
        self.start()

    def run(self) -> None:
        headers = {"Authorization": f"Bearer {self.key}"}
        try:
            with httpx.stream("POST", self.url + CHAT, json=self.body, headers=headers, timeout=30) as response:
                self.request_id = response.headers["x-request-id"]
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.take(line.removeprefix("data: "))
        except httpx.HTTPError as e:
            self.failed = e

    def take(self, data: str) -> None:
        self.events.append(data)
        if data != "[DONE]":
            for choice in json.loads(data).get("choices", ()):
                self.text += choice["delta"].get("content") or ""

    @property
    def whole(self) -> bool:
        return self.events[-1:] == ["[DONE]"]

    @property
    def error(self) -> dict | None:
        return json.loads(self.events[-1]).get("error") if self.events and not self.whole else None


def test_16_an_engine_that_dies_ends_its_streams_with_an_error(tmp_path):
    with Running(tmp_path, slow_text(10_000)) as s:
        readers = [Reader(s.url, s.key) for _ in range(4)]
        until(lambda: all(len(r.text) > 3 for r in readers))
        s.engine.die()
        for reader in readers:
            reader.join(5)
            assert not reader.is_alive() and reader.error and reader.error["code"] == "engine_failed"
        assert s.http.get("/ready").status_code == 503 and s.http.get("/health").status_code == 503
        assert_refused(s.ask(), 503)
        assert [r["finish"] for r in s.rows()] == ["error"] * 4
        s.engine.dead = False
        until(lambda: s.http.get("/ready").status_code == 200 == s.http.get("/health").status_code)


def test_16_a_model_that_fails_under_load_comes_back_by_itself(tmp_path, monkeypatch):
    config = replace(PRESETS["tiny"], vocab_size=512, max_positions=8192)
    engine = LocalEngine(Transformer(config).init_weights(0), 2**24, context=4096)
    with Running(tmp_path, engine) as s:
        readers = [Reader(s.url, s.key, {"max_tokens": 3000, "logit_bias": {"120": 100}}) for _ in range(4)]
        until(lambda: all(len(r.text) > 3 for r in readers))
        with monkeypatch.context() as fault:
            fault.setattr(Runner, "run", lambda *_: 1 / 0)
            for reader in readers:
                reader.join(5)
                assert not reader.is_alive() and reader.error and reader.error["code"] == "engine_failed"
            for _ in range(3):
                assert_refused(s.ask(), 503)
            until(lambda: s.http.get("/health").status_code == 503)
            assert s.http.get("/ready").status_code == 503
        until(lambda: s.http.get("/ready").status_code == 200 == s.http.get("/health").status_code)
        assert s.ask(max_tokens=5, logit_bias={"120": 100}).status_code == 200
        rows = s.rows()
        assert [row["finish"] for row in rows[:4]] == ["error"] * 4 and rows[-1]["completion"] == 5


def test_16_a_step_that_hangs_is_told_by_health_and_ends_its_streams(tmp_path, monkeypatch):
    config = replace(PRESETS["tiny"], vocab_size=512, max_positions=8192)
    engine = LocalEngine(Transformer(config).init_weights(0), 2**24, context=4096)
    run, go_on = Runner.run, threading.Event()
    with Running(tmp_path, engine, stuck_seconds=1.0) as s:
        readers = [Reader(s.url, s.key, {"max_tokens": 3000, "logit_bias": {"120": 100}}) for _ in range(4)]
        until(lambda: all(len(r.text) > 3 for r in readers))
        with monkeypatch.context() as fault:
            fault.setattr(Runner, "run", lambda *given: (go_on.wait(20), run(*given))[1])
            for reader in readers:
                reader.join(10)
                assert not reader.is_alive() and reader.error and reader.error["code"] == "engine_failed"
            for path in ("/health", "/ready"):
                answer = s.http.get(path)
                assert answer.status_code == 503 and "stuck" in answer.json()["status"]
            assert_refused(s.ask(), 503, "stuck")
        told = sorted(len(reader.text) for reader in readers)
        go_on.set()
        until(lambda: s.http.get("/ready").status_code == 200 == s.http.get("/health").status_code)
        assert s.ask(max_tokens=5, logit_bias={"120": 100}).status_code == 200
        until(lambda: not engine.stats().running and not engine.stats().pages_used)
        rows = s.rows()
        assert [row["finish"] for row in rows[:4]] == ["error"] * 4 and len(rows) == 5
        assert sorted(row["completion"] for row in rows[:4]) == told, "what came late is billed, or what was read isn't"


def test_16_a_long_step_that_reads_its_experts_is_not_stuck(tmp_path):
    class Reading(FakeEngine):
        def stats(self):
            self.read = getattr(self, "read", 0) + 1
            return replace(super().stats(), experts_bytes_read=self.read)

    engine = Reading(lambda _: [*b"x", END], pause=2.5)
    with Running(tmp_path, engine, stuck_seconds=0.5) as s:
        assert s.ask().json()["choices"][0]["message"]["content"] == "x"
        assert s.http.get("/health").status_code == 200


def started(folder: Path) -> tuple[subprocess.Popen, str, str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.server.killed", str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    port, key = process.stdout.readline().split()
    return process, f"http://127.0.0.1:{port}", key


def killed_once(folder: Path, after: float) -> None:
    """Kill a server under load; hold journal, ledger and what clients read against each other."""
    process, url, key = started(folder)
    readers = [Reader(url, key) for _ in range(6)]
    time.sleep(after)
    process.kill()
    process.wait()
    for reader in readers:
        reader.join(10)
    ledger = Ledger(f"sqlite:///{folder}/ledger.db")
    texts = [path.read_text() for path in (folder / "journals").glob("*.journal")]
    journaled = {left.row["id"]: left.counts for text in texts for left in journal.read(text)}
    recover(ledger, folder / "journals")
    with ledger.engine.connect() as db:
        rows = {row["id"]: row for row in db.execute(select(USAGE)).mappings()}
    for request_id, counts in journaled.items():
        row = rows[request_id]
        assert (row["prompt"], row["cached"], row["completion"]) == counts
    for reader in readers:
        if reader.request_id:
            row = rows[reader.request_id]
            assert len(reader.text) <= row["completion"], "sent and not written down"
            assert row["completion"] - len(reader.text) <= 60, "written down and never sent"
            assert not reader.whole or row["completion"] == len(reader.text) + 1
    ledger.close()


def test_17_after_a_kill_the_ledger_equals_the_journal(tmp_path):
    killed_once(tmp_path, 0.6)


@pytest.mark.multiprocess
def test_17_after_many_kills_the_ledger_equals_the_journal(tmp_path):
    draw = random.Random(0)
    for i in range(25):
        killed_once(tmp_path / str(i), draw.uniform(0.0, 1.5))


def vanished(s: Running, n: int, at_once: int) -> None:
    draw = random.Random(1)

    def visit(at: int) -> float:
        sock = s.raw(request_bytes(s.key, stream=True, max_tokens=3000))
        read = 0
        while read < at:
            read += len(sock.recv(4096))
        sock.close()
        return time.monotonic()

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(visit, [draw.randrange(200, 20_000) for _ in range(n)]))
    until(lambda: s.engine.idle and not s.service.generations, 20)
    rows = s.rows()
    assert len(rows) == n and {row["finish"] for row in rows} == {"gone"}
    assert all(row["completion"] < 3000 for row in rows)
    assert s.service.relay.steps == type(s.service.relay.steps)() and not s.service.journal.open


def test_18_clients_that_vanish_are_cancelled_and_have_one_row_each(tmp_path):
    with Running(tmp_path, slow_text(3000, 0.001, 16)) as s:
        vanished(s, 16, 16)


@pytest.mark.slow
def test_18_a_thousand_clients_that_vanish(tmp_path):
    with Running(tmp_path, slow_text(3000, 0.001, 64)) as s:
        s.ask(max_tokens=1)
        with s.ledger.engine.begin() as db:
            until(lambda: not s.service.promised)
            db.execute(USAGE.delete())
        files = len(os.listdir("/proc/self/fd"))
        vanished(s, 1000, 64)
        until(lambda: len(os.listdir("/proc/self/fd")) <= files + 8)


def test_18_the_engine_hears_of_a_lost_client_at_once(tmp_path):
    with Running(tmp_path, slow_text(4000, 0.005)) as s:
        for fields in ({"stream": True}, {}):
            sock = s.raw(request_bytes(s.key, max_tokens=3000, **fields))
            until(lambda: not s.engine.idle)
            n = len(s.engine.cancelled)
            gone = time.monotonic()
            sock.close()
            until(lambda n=n: len(s.engine.cancelled) > n)
            assert s.engine.cancelled[n] - gone < 1
            until(lambda: s.engine.idle)


def test_19_a_term_drains(tmp_path):
    with Running(tmp_path, slow_text(100)) as s:
        readers = [Reader(s.url, s.key) for _ in range(3)]
        until(lambda: all(len(r.text) > 3 for r in readers))
        s.server.handle_exit(signal.SIGTERM, None)
        assert s.http.get("/ready").status_code == 503
        refused = s.ask()
        assert_refused(refused, 503, "shutting down")
        assert int(refused.headers["retry-after"]) > 0
        for reader in readers:
            reader.join(20)
            assert reader.whole and reader.text == "x" * 100
        s.thread.join(10)
        assert not s.thread.is_alive()
    assert Ledger(f"sqlite:///{tmp_path}/ledger.db").usage("model")[0]["requests"] == 3
    assert list((tmp_path / "journals").iterdir()) == []


def test_19_what_outlasts_the_drain_is_told_and_billed(tmp_path):
    with Running(tmp_path, slow_text(4000), drain_seconds=0.3) as s:
        reader = Reader(s.url, s.key)
        until(lambda: len(reader.text) > 3)
        s.server.handle_exit(signal.SIGTERM, None)
        s.thread.join(15)
        assert not s.thread.is_alive()
        reader.join(5)
        assert reader.error and reader.error["code"] == "shutdown"
    used = Ledger(f"sqlite:///{tmp_path}/ledger.db").usage("model")[0]
    assert used["requests"] == 1 and len(reader.text) <= used["completion"] < 4000


@pytest.mark.multiprocess
def test_19_a_real_term_ends_the_process_well(tmp_path):
    process, url, key = started(tmp_path)
    readers = [Reader(url, key) for _ in range(4)]
    until(lambda: all(r.text for r in readers))
    process.terminate()
    for reader in readers:
        reader.join(20)
    assert all(reader.whole for reader in readers) and process.wait(20) == 0


def test_20_ten_times_too_many_requests(tmp_path):
    with Running(tmp_path, slow_text(20, 0.01, slots=1), queue=4) as s, ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(lambda _: s.ask(), range(50)))
        statuses = [a.status_code for a in answers]
        assert set(statuses) == {200, 503} and statuses.count(200) >= 4
        for answer in answers:
            if answer.status_code == 503:
                assert_refused(answer, 503)
                assert int(answer.headers["retry-after"]) > 0
        assert len(s.rows()) == statuses.count(200)
        assert s.ask().status_code == 200


def test_20_a_full_disk_under_the_journal_closes_the_server(tmp_path):
    with Running(tmp_path, slow_text(5000)) as s:
        reader = Reader(s.url, s.key)
        until(lambda: len(reader.text) > 5)
        file = s.service.journal.file
        kept, full = os.dup(file), os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, file)
        reader.join(5)
        assert reader.error and reader.error["code"] == "unavailable"
        assert_refused(s.ask(), 503, "can't be recorded")
        assert s.http.get("/ready").status_code == 503
        os.dup2(kept, file)
        until(lambda: s.http.get("/ready").status_code == 200)
        assert s.ask(max_tokens=5).status_code == 200
        row = s.rows()[0]
        assert row["id"] == reader.request_id and row["completion"] == len(reader.text)


def test_20_a_full_disk_under_the_ledger_closes_the_server_and_bills_later(tmp_path):
    with Running(tmp_path) as s:
        limit = [s.ledger.engine.raw_connection().execute("PRAGMA page_count").fetchone()[0]]
        event.listen(s.ledger.engine, "connect", lambda c, _: c.execute(f"PRAGMA max_page_count={limit[0]}"))
        s.ledger.engine.dispose()
        served = 0
        while s.service.clerk.closed is None:
            served += s.ask(n=1, user="u").status_code == 200
            assert served < 2000
        assert "full" in s.service.clerk.closed
        assert_refused(s.ask(), 503, "can't be recorded")
        assert s.service.journal.open, "what is owed stays written down"
        limit[0] = 2**30
        s.ledger.engine.dispose()
        until(lambda: s.http.get("/ready").status_code == 200)
        assert len(s.rows()) == served and not s.service.journal.open
