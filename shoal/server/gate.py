"""Every request passes here first: its head is checked, its key, then its body is read within limits.

    one body length · header size · Host · Origin → (health, readiness, page: public) → key → path → type · body → rate

What comes out on the other side has `state.key`, `state.body` and `state.request_id`. Every answer carries the id, and
every request leaves one line in the log: JSON, so that nothing a client sends can forge another line.
"""

import asyncio
import json
import logging
import re
import time
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shoal.server.auth import LOCAL, Key, Keys
from shoal.server.limits import Limits
from shoal.server.metrics import Metrics
from shoal.server.problem import Problem, new_id
from shoal.server.wire import alone

PUBLIC = {"/health", "/ready"}
PAGE = re.compile(
    r"/(page/[a-z0-9_-]+\.[a-z]+)?\Z"
)  # the chat page's own files: the same for everyone, no data in them
LOOPBACK = {"localhost", "127.0.0.1", "[::1]"}
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:\d{1,5})?\Z")
BODY_RATE = 64 * 1024  # bytes that buy a second more

log = logging.getLogger("shoal.server")


class Gate:
    """ASGI middleware. `hosts` are the names this server goes by where keys are off, against DNS rebinding."""

    def __init__(self, app: ASGIApp, keys: Keys, limits: Limits, metrics: Metrics, hosts: frozenset[str]):
        self.app, self.keys, self.limits, self.metrics = app, keys, limits, metrics
        self.hosts = hosts | LOOPBACK

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        visit = Visit(scope, send)
        try:
            key = self.check_head(scope)
            body = await self.read(scope, receive)
            self.keys.request(key)
            scope["state"] = scope.get("state", {}) | {"key": key, "body": body, "request_id": visit.id, "visit": visit}
            visit.facts["key"] = key.id
            await self.app(scope, again(body, receive), visit.send)
        except Problem as problem:
            await visit.answer(problem)
        except Exception:
            log.exception("request %s", visit.id)
            if visit.status is None:
                await visit.answer(Problem(500, "an error of ours; the log has it by this request id", code="internal"))
        finally:
            self.leave(scope, visit)

    def leave(self, scope: Scope, visit: "Visit") -> None:
        route = getattr(scope.get("route"), "path", "none")
        self.metrics.requests.labels(route, str(visit.status or 499)).inc()
        log.info("%s", json.dumps(visit.line(scope)))

    def check_head(self, scope: Scope) -> Key:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if not alone(headers):
            raise Problem(400, "Content-Length and Transfer-Encoding together", code="invalid_http", close=True)
        size = sum(len(name) + len(value) + 4 for name, value in headers) + len(scope["raw_path"])
        if size > self.limits.header_bytes or len(headers) > self.limits.headers:
            raise Problem(431, "request headers too long", code="headers_too_long", close=True)
        found = dict(headers)
        host = found.get(b"host", b"").decode("latin-1")
        self.check_host(host)
        if not self.keys.required and scope["method"] not in ("GET", "HEAD", "OPTIONS"):
            check_origin(found, host)
        path = unquote_to_bytes(scope["raw_path"])
        if scope["path"] in PUBLIC or (scope["method"] in ("GET", "HEAD") and PAGE.match(scope["path"])):
            return LOCAL
        key = self.keys.who(found.get(b"authorization", b"").decode("latin-1"))
        if b"\0" in path or b"\\" in path or b".." in path.split(b"/") or b"//" in path:
            raise Problem(404, "no such path", code="not_found")
        return key

    def check_host(self, host: str) -> None:
        """Any proper name where a key proves who asks; only our own where it is enough to reach us."""
        match = HOST.match(host)
        if not match or (not self.keys.required and match[1].lower() not in self.hosts):
            raise Problem(400, "a Host header that isn't this server's name", code="invalid_host", close=True)

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, refused by its declared size before any of it, by its real size as soon as it is too much."""
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return b""
        headers = dict(scope["headers"])
        files = scope["path"].removeprefix("/v1") == "/files"
        check_kind(headers, b"multipart/form-data" if files else b"application/json")
        most = self.limits.file_bytes if files else self.limits.body_bytes
        too_large = Problem(413, f"a body of more than {most:,} bytes", code="body_too_large", close=True)
        declared = headers.get(b"content-length", b"0")
        if int(declared) > most:
            raise too_large
        body, loop = bytearray(), asyncio.get_running_loop()
        start = loop.time()
        try:
            async with asyncio.timeout(self.limits.body_seconds) as limit:
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Problem(400, "the client left", code="gone", close=True)
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > most:
                        raise too_large
                    limit.reschedule(start + self.limits.body_seconds + len(body) / BODY_RATE)
        except TimeoutError:
            raise Problem(408, "the body took too long", code="timeout", close=True) from None
        return bytes(body)


def check_origin(headers: dict[bytes, bytes], host: str) -> None:
    """Where no key proves who asks, no page of another site may: a form can be posted without asking us first."""
    origin = headers.get(b"origin")
    ours = origin is None or origin.decode("latin-1").partition("://")[2].lower() == host.lower()
    if not ours or headers.get(b"sec-fetch-site", b"none").lower() not in (b"none", b"same-origin"):
        raise Problem(403, "a request from another site's page", code="cross_origin", close=True)


def check_kind(headers: dict[bytes, bytes], wanted: bytes) -> None:
    """A JSON type is asked for, but for files: what else stands in a body is not what our routes read."""
    encoding = headers.get(b"content-encoding", b"identity").strip().lower()
    if encoding != b"identity":
        raise Problem(415, "compressed bodies are not taken", code="unsupported_encoding", close=True)
    if headers.get(b"content-length") == b"0":
        return
    if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != wanted:
        message = f"the Content-Type has to be {wanted.decode()}"
        raise Problem(415, message, code="unsupported_media_type", close=True)


def again(body: bytes, receive: Receive) -> Receive:
    """The body once more, for a route that reads it itself, and then what really comes: the client leaving."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class Visit:
    """One request's id, status and log line."""

    def __init__(self, scope: Scope, send: Send):
        self.id, self.raw_send = new_id("req"), send
        self.status: int | None = None
        self.started = time.perf_counter()
        self.facts: dict[str, Any] = {}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [h for h in message.get("headers", ()) if h[0] != b"x-request-id"]
            headers += [(b"x-request-id", self.id.encode()), (b"x-content-type-options", b"nosniff")]
            message = {**message, "headers": headers}
        await self.raw_send(message)

    async def answer(self, problem: Problem) -> None:
        body = problem.body(self.id)
        headers = [*problem.headers(self.id), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    def line(self, scope: Scope) -> dict[str, Any]:
        ms = round(1000 * (time.perf_counter() - self.started), 1)
        path = scope["path"][:200]
        return {"id": self.id, "method": scope["method"], "path": path, "status": self.status, "ms": ms} | self.facts
