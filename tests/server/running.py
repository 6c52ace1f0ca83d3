"""A server on a free port in a thread of its own, its ledger and journal in a folder, and a raw socket to abuse it."""

import json
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from sqlalchemy import select

from shoal.server.auth import Keys
from shoal.server.http import Server, build
from shoal.server.ledger import USAGE, Ledger, Prices
from shoal.server.limits import Limits
from shoal.server.service import Service
from tests.server.fake import Bytes, FakeEngine

NAME = "shoal-test"
CHAT = "/v1/chat/completions"
PRICES = Prices(70, 270, 1100)


class Running:
    """`with Running(tmp_path, …) as s:`. Keys are required; `s.key` is one. Limits by name."""

    def __init__(
        self,
        folder: Path,
        engine: Any = None,
        keys: bool = True,
        turns: Any = None,
        url: str | None = None,
        **limits: Any,
    ):
        self.folder, self.engine = folder, engine or FakeEngine()
        self.ledger = Ledger(url or f"sqlite:///{folder}/ledger.db")
        self.ledger.set_prices(NAME, PRICES)
        self.key_id, self.key = self.ledger.new_key("test")
        self.service = Service(
            self.engine,
            turns or Bytes(),  # type: ignore[arg-type]  # they are not of the engine, so that no test needs torch
            NAME,
            self.ledger,
            folder / "journals",
            Keys(required=keys),
            replace(Limits(), **limits),
        )
        self.server = Server(self.service, build(self.service), "127.0.0.1", 0)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self) -> "Running":
        self.thread.start()
        until(lambda: self.server.started)
        self.port = self.server.address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.http = httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.key}"}, timeout=20)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.server.should_exit = True
        self.thread.join(15)
        assert not self.thread.is_alive()
        self.engine.close()
        self.ledger.close()

    def client(self, key: str | None = None) -> Any:
        import openai  # two seconds, which a server that only waits to be killed needn't take

        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.key, max_retries=0)

    def ask(self, path: str = CHAT, headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
        """A chat with these fields, sent with whatever JSON makes of them."""
        body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "thinking": {"type": "disabled"}}
        if path.endswith("/completions") and "chat" not in path:
            body = {"model": NAME, "prompt": "hi"}
        return self.http.post(path, json={k: v for k, v in (body | fields).items() if v is not ...}, headers=headers)

    def raw(self, data: bytes = b"", timeout: float = 20.0) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=timeout)
        if data:
            sock.sendall(data)
        return sock

    def rows(self) -> list[dict[str, Any]]:
        """Every usage row, once the clerk has written what is due."""
        until(lambda: not self.service.generations and not self.service.promised)
        with self.ledger.engine.connect() as db:
            return [dict(row) for row in db.execute(select(USAGE).order_by(USAGE.c.at)).mappings()]


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.01)


def request_bytes(key: str, **fields: Any) -> bytes:
    """A chat as it goes over the wire."""
    asked = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "thinking": {"type": "disabled"}}
    body = json.dumps(asked | fields).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def answer_of(sock: socket.socket) -> tuple[int, bytes]:
    """Status and everything until the end of the connection."""
    data = b""
    while True:
        try:
            piece = sock.recv(65536)
        except ConnectionResetError:
            break
        if not piece:
            break
        data += piece
    status = int(data.split(b" ", 2)[1]) if data.startswith(b"HTTP/") else 0
    return status, data


def assert_refused(response: httpx.Response, status: int | tuple[int, ...], says: str = "") -> dict[str, Any]:
    """An error in OpenAI's shape with a request id, and nothing of our insides in it."""
    statuses = status if isinstance(status, tuple) else (status,)
    assert response.status_code in statuses, (response.status_code, response.text[:500])
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code", "request_id"}
    assert error["request_id"] == response.headers["x-request-id"]
    for inside in ("Traceback", "site-packages", ".py", "0x", "/work", "/home", "/tmp"):
        assert inside not in response.text
    assert says in response.text, response.text
    return error
