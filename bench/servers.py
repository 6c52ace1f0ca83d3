"""Servers under test: processes that listen on a free port of this machine, and the requests that are put to them.

The client takes the same two cores as the servers do, so it does as little as it can: sockets, lines, and no look into
an event once the first piece of text is there.
"""

import asyncio
import json
import os
import socket
import subprocess
import time
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.sides import LOGS, SideFailed

START_SECONDS = 120
OPENMP = ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")  # a peer's are its own business


class Server:
    """`command` with `--port N` behind it. Ready once its /health says so."""

    def __init__(self, name: str, command: list[str]):
        LOGS.mkdir(parents=True, exist_ok=True)
        self.name, self.log, self.port = name, LOGS / f"{name.replace(' ', '-')}.log", free_port()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)], stdout=log, stderr=log, env=environment()
            )
        self.wait()

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        self.process.terminate()
        self.process.wait()

    def wait(self) -> None:
        end = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < end:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health"):
                return
            time.sleep(0.05)
        self.process.kill()
        raise SideFailed(f"{self.name} isn't ready:\n{tail(self.log)}")

    def post(self, path: str, body: dict) -> Any:
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OPENMP}


def tail(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Streamed:
    """Seconds until the first text, and how many tokens came in all."""

    first: float
    tokens: int


async def together(server: Server, bodies: list[dict]) -> tuple[float, list[Streamed]]:
    """All requests at once. Seconds until the last of them had ended, and how it went with each."""
    began = time.perf_counter()
    streams = await asyncio.gather(*(stream(server, body) for body in bodies))
    return time.perf_counter() - began, streams


async def stream(server: Server, body: dict) -> Streamed:
    """One streamed /v1/completions; `body` must ask for the usage, which comes in the last event."""
    data = json.dumps(body).encode()
    began, first, last = time.perf_counter(), None, b""
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port, limit=2**20)
    head = ["POST /v1/completions HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    writer.write("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
    status = await reader.readline()
    if b" 200 " not in status:
        raise SideFailed(f"{server.name}: {status.decode().strip()}: {(await reader.read(2000)).decode()}")
    async for line in reader:
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            break
        last = line[6:]
        if first is None and any(choice["text"] for choice in json.loads(last)["choices"]):
            first = time.perf_counter() - began
    writer.close()
    assert first is not None, f"{server.name} ended without text: {last[:500]}"
    return Streamed(first, json.loads(last)["usage"]["completion_tokens"])
