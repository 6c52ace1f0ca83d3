"""Checks 1 to 18: heads, keys and bodies that no honest client sends. Each is refused, and the next request served."""

import gzip
import json
import logging
import re
import time

import pytest

from tests.server.fake import END, FakeEngine
from tests.server.running import CHAT, Running, answer_of, assert_refused, request_bytes, until

pytestmark = pytest.mark.slow  # each waits for clocks


@pytest.fixture(autouse=True)
def serves_on(request):
    """After each case the same engine answers the next good request, and the bad one was not billed."""
    if "served" not in request.fixturenames:
        yield
        return
    s = request.getfixturevalue("served")
    engine, before = s.engine.thread.ident, len(s.rows()) - len(s.engine.requests)
    yield
    assert s.ask().status_code == 200
    assert s.engine.thread.ident == engine and len(s.rows()) - len(s.engine.requests) == before


def no_key(served, path, method="GET", host="localhost"):
    return served.http.request(method, path, headers={"Authorization": "", "Host": host})


@pytest.mark.parametrize("host", ["evil.example", "a b", "x" * 300, "127.0.0.1:99999999", "[::1", "%00", "a@b"])
def test_01_an_odd_host_without_a_key(served, host):
    assert_refused(no_key(served, "/v1/models", host=host), (400, 401))


def test_01_where_keys_are_off_only_our_own_names_are_served(tmp_path):
    """A page of another site that points its own name at 127.0.0.1 (DNS rebinding) gets nothing."""
    with Running(tmp_path, keys=False) as s:
        assert_refused(no_key(s, "/v1/models", host="evil.example"), 400)
        for host in ("localhost", f"127.0.0.1:{s.port}", "[::1]:80"):
            assert no_key(s, "/v1/models", host=host).status_code == 200


def test_02_every_route_wants_a_key(served):
    spec = served.http.get("/openapi.json").json()
    paths = [(p.replace("{", "").replace("}", ""), m) for p, methods in spec["paths"].items() for m in methods]
    assert len(paths) > 12
    hidden = [("/openapi.json", "get"), ("/chat/completions", "post"), ("/nothing/here", "get"), ("/v1/batches", "put")]
    hidden += [("/beta/completions", "post")]
    for path, method in paths + hidden:
        response = no_key(served, path, method.upper())
        if path in ("/health", "/ready"):
            assert response.status_code == 200
        else:
            assert_refused(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "given",
    ["Bearer", "Basic eDp5", "Bearer sk-", "Bearer sk-x-y", "Bearer " + "k" * 5000, "Bearer sk-{id}-wrong"],
)
def test_02_keys_that_are_none(served, given):
    header = {"Authorization": given.replace("{id}", served.key_id)}
    assert_refused(served.http.get("/v1/models", headers=header), 401)


def test_02_a_revoked_key_is_refused_within_a_second_and_a_new_one_served(served):
    key_id, secret = served.ledger.new_key("other")
    header = {"Authorization": f"Bearer {secret}"}
    until(lambda: served.http.get("/v1/models", headers=header).status_code == 200, 3)
    assert served.ledger.revoke(key_id) and not served.ledger.revoke(key_id)
    until(lambda: served.http.get("/v1/models", headers=header).status_code == 401, 3)


def test_03_keys_are_stored_hashed(served):
    files = b"".join(path.read_bytes() for path in served.folder.glob("ledger.db*"))
    assert served.key_id.encode() in files and served.key.split("-", 2)[2].encode() not in files


def test_04_a_header_of_a_mebibyte_and_ten_thousand_headers(served):
    key = f"Authorization: Bearer {served.key}\r\n"
    for headers in (
        "X-A: " + "a" * 2**20 + "\r\n",
        "".join(f"X-{i}: 1\r\n" for i in range(10_000)),
        "X-B: 1\r\n" * 200,
    ):
        head = f"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n{key}{headers}\r\n"
        status, data = answer_of(served.raw(head.encode()))
        assert status == 431 and json.loads(data.partition(b"\r\n\r\n")[2])["error"]["request_id"]


@pytest.mark.parametrize(
    "framing",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: -1\r\n",
        "Content-Length: 9" + "9" * 30 + "\r\n",
        "Transfer-Encoding: chunked, identity\r\n",
    ],
)
def test_05_a_body_with_two_lengths(served, framing):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {served.key}\r\n{framing}\r\n"
    smuggled = b"0\r\n\r\nGET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
    status, data = answer_of(served.raw(head.encode() + smuggled))
    assert status in (400, 501) and data.count(b"HTTP/1.1") == 1


def test_06_an_oversized_body_declared_or_chunked(served):
    most = served.service.limits.body_bytes
    assert_refused(served.http.post(CHAT, content=b"x" * (most + 1), headers={"Content-Type": "application/json"}), 413)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {served.key}"
    head += "\r\nContent-Type: application/json"
    sock = served.raw(f"{head}\r\nContent-Length: {10**12}\r\n\r\n".encode())
    assert answer_of(sock)[0] == 413
    sock = served.raw(f"{head}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    chunk = b"%x\r\n%s\r\n" % (2**16, b"a" * 2**16)
    sent = 0
    try:
        for _ in range(16 * most // 2**16):
            sock.sendall(chunk)
            sent += 2**16
    except OSError:
        assert sent > most
    assert answer_of(sock)[0] in (413, 0)  # 0: a reset, for a client that went on sending all the same


@pytest.mark.parametrize("encoding", ["gzip", "br", "gzip, identity"])
def test_07_a_compressed_body(served, encoding):
    headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
    assert_refused(served.http.post(CHAT, content=gzip.compress(b"{}"), headers=headers), 415)


def test_07_a_body_that_is_not_json_by_its_type(served):
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert_refused(served.http.post(CHAT, content=b"{}", headers={"Content-Type": kind}), 415)


@pytest.mark.parametrize("part", [b"", b"POST /v1/chat", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"])
def test_08_a_slow_head_is_closed(tmp_path, part):
    with Running(tmp_path, head_seconds=0.5, body_seconds=0.5) as s:
        sock = s.raw(part)
        for _ in range(20):
            time.sleep(0.1)
            try:
                sock.sendall(b"a" if part else b"")
            except OSError:
                break
        assert answer_of(sock)[0] == 0
        assert s.ask().status_code == 200


def test_08_a_slow_body_and_a_slow_second_request(tmp_path):
    with Running(tmp_path, head_seconds=0.5, body_seconds=0.5) as s:
        whole = request_bytes(s.key)
        assert answer_of(s.raw(whole[:-5]))[0] == 408
        sock = s.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /hea")
        status, data = answer_of(sock)
        assert status == 200 and data.count(b"HTTP/1.1") == 1


def test_08_the_limit_is_ten_seconds(served):
    assert served.service.limits.head_seconds <= 10 and served.service.limits.body_seconds <= 10


@pytest.mark.parametrize("limit", [{"stall_seconds": 0.5}, {"buffered_deltas": 2000}], ids=["by time", "by pieces"])
def test_09_a_reader_that_stalls_is_cancelled_and_billed(tmp_path, limit):
    endless = FakeEngine(lambda _: [120] * 10**6, per_step=200, pause=0.005, context=10**6 + 10)
    with Running(tmp_path, endless, **{"stall_seconds": 4.0, "buffered_deltas": 10**6} | limit) as s:
        sock = s.raw(request_bytes(s.key, stream=True, max_tokens=900_000))
        sock.recv(1000)
        waiting = [0]
        while not endless.cancelled:
            waiting += [generation.waiting for generation in list(s.service.generations.values())]
            time.sleep(0.01)
        assert max(waiting) < limit.get("buffered_deltas", 10**6) + 20_000  # what a busy loop takes in at once
        until(lambda: endless.idle)
        row = s.rows()[0]
        assert row["finish"] == "stalled" and 0 < row["completion"] < 900_000
        assert max((len(g.events) for g in s.service.generations.values()), default=0) == 0
        until(lambda: not s.server.server_state.connections - {None}, 10)
        sock.close()


@pytest.mark.parametrize("deep", ["[" * 100_000, '{"a":' * 100_000, '{"messages":' + "[" * 70 + "]" * 70 + "}"])
def test_10_deep_json(served, deep):
    assert_refused(served.http.post(CHAT, content=deep, headers={"Content-Type": "application/json"}), 400)


BODIES = {
    "11 not utf-8": b'{"model": "\xff\xfe"}',
    "11 a lone surrogate": b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "11 a lone surrogate as a key": b'{"\\uDFFF": 1}',
    "11 the bytes of a surrogate": b'{"model": "\xed\xa0\x80"}',
    "12 NaN": b'{"temperature": NaN}',
    "12 Infinity": b'{"temperature": -Infinity}',
    "12 1e400": b'{"temperature": 1e400}',
    "13 a million digits": b'{"seed": ' + b"9" * 10**6 + b"}",
    "13 a number of a million digits": b'{"seed": 0.' + b"9" * 10**6 + b"e9}",
    "14 a key twice": b'{"model": "a", "model": "b"}',
    "14 a key twice, deeper": b'{"messages": [{"role": "user", "role": "system"}]}',
    "an array": b"[]",
    "nothing": b"",
    "half": b'{"model": "a"',
    "a byte order mark": b'\xef\xbb\xbf{"model": "a"}',
    "two values": b"{} {}",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
def test_11_to_14_json_with_more_than_one_meaning(served, body):
    assert_refused(served.http.post(CHAT, content=body, headers={"Content-Type": "application/json"}), 400)


def test_11_a_pair_of_surrogates_is_a_character(served):
    body = json.dumps({"model": "shoal-test", "messages": [{"role": "user", "content": "🙂"}]})
    assert "\\ud83d\\ude42" in body
    assert served.http.post(CHAT, content=body, headers={"Content-Type": "application/json"}).status_code == 200
    assert served.engine.requests[-1].tokens == (256, *"🙂".encode())


PATHS = [
    "/v1/%2e%2e/%2e%2e/etc/passwd", "/v1/../models", "/v1/models/%2e%2e%2f%2e%2e", "/v1/models/a%00b", "//v1/models",
    "/v1/files/..%5c..%5cx", "/page/%2e%2e/%2e%2e/service.py", "/page/../../etc/passwd", "/page/%00",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_15_paths_that_climb(served, path):
    for key in (f"Authorization: Bearer {served.key}\r\n", ""):
        head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n{key}Connection: close\r\n\r\n"
        status, data = answer_of(served.raw(head.encode()))
        assert status == (404 if key else 401) and b"root:" not in data and b"import" not in data


def test_16_control_characters_of_a_user_are_escaped_in_the_log(served, caplog):
    caplog.set_level(logging.INFO, "shoal.server")
    user = 'x\n{"id": "req-forged"}\x1b[31m\x00\u2028'
    served.ask(user=user)
    until(lambda: any('"user"' in record.getMessage() for record in caplog.records))
    line = next(r.getMessage() for r in caplog.records if '"user"' in r.getMessage())
    assert json.loads(line)["user"] == user
    assert not re.search(r"[\x00-\x1f\x7f-\uffff]", line)


def test_17_a_flood_of_connections(tmp_path):
    with Running(tmp_path, FakeEngine(lambda _: [*b"x" * 200, END], pause=0.01), connections=8) as s:
        socks = [s.raw(request_bytes(s.key, stream=True)) for _ in range(8)]
        until(lambda: len(s.server.server_state.connections) == 8)
        status, data = answer_of(s.raw(request_bytes(s.key)))
        assert status == 503 and b"retry-after: " in data.lower() and b'"request_id"' in data
        for _ in range(200):
            s.raw().close()
        assert [answer_of(sock)[0] for sock in map(finished, socks)] == [200] * 8
        until(lambda: not s.server.server_state.connections, 10)
        assert s.ask().status_code == 200


def finished(sock):
    sock.shutdown(1)
    return sock


def test_18_an_idempotency_key_with_another_body(served):
    header = {"Idempotency-Key": "test 18"}
    assert served.ask(headers=header, max_tokens=3).status_code == 200
    assert_refused(served.ask(headers=header, max_tokens=4), 409, "another body")


def test_errors_of_the_wire_itself_have_the_same_shape(served):
    for nonsense in (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        status, data = answer_of(served.raw(nonsense + b"\r\n\r\n"))
        assert status == 400 and json.loads(data.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


def test_unknown_methods_and_paths(served):
    assert_refused(served.http.get(CHAT), 405)
    assert_refused(served.http.get("/v1/nothing"), 404)
    assert_refused(served.http.get("/docs"), 404)


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "{url}", "Sec-Fetch-Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_pages_of_other_sites_cannot_post_where_keys_are_off(tmp_path, headers, status):
    with Running(tmp_path, keys=False) as s:
        headers = {name: value.replace("{url}", s.url) for name, value in headers.items()}
        line = b'{"custom_id": "a"}'
        response = s.http.post("/v1/files", files={"file": line}, data={"purpose": "batch"}, headers=headers)
        assert response.status_code == status
        assert s.http.get("/", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 200
