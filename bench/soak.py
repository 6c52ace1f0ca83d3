"""Does a server stay what it was? Clients come, stall and vanish; then memory, descriptors and cache are counted.

    python -m bench.soak [--minutes 10] [--quick]

`shoal serve` runs in a process of its own with a tiny random model and a cache that is too small for everyone at once.
Each client does one thing after another, drawn by its own seed: a whole answer, a stream read to its end, a stream
left at a random byte, a stream that is not read for a while, half a request, a body that is none, an embedding, an
answer in JSON. Memory is the process's, in quiet moments: clients rest while it is measured, so that work under way
doesn't count. Weights are fp32: for bf16, oneDNN compiles and keeps a kernel for each length of a prompt, some hundred
megabytes that would hide what we lose. There is no peer; the reference is the server itself after WARM of the time.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import re
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from bench.record import emit
from bench.table import show

CLIENTS = 32
HOST, NAME = "127.0.0.1", "soak"
WORDS = "def add(a, b):\n    return a + b  # größer 漢字 🙂\n"
STALL_SECONDS = 40.0  # at most; a server gives up on a reader after 30
ROUNDS = 20  # quiet moments
WARM = 0.2  # of the time
LIMIT = 1.05  # memory at the end, of what it was


@dataclass
class Seen:
    """What clients and the quiet moments saw."""

    statuses: Counter[int] = field(default_factory=Counter)
    did: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)  # answers that ended in an error
    memory: list[int] = field(default_factory=list)  # bytes
    descriptors: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)  # of the cache, in use

    @property
    def growth(self) -> float:
        """Memory at the end, as a ratio of what it was after the warm-up."""
        return self.memory[-1] / self.memory[self.warm]

    @property
    def warm(self) -> int:
        return round(WARM * len(self.memory)) - 1

    @property
    def failures(self) -> int:
        return len(self.broken) + sum(n for status, n in self.statuses.items() if status >= 500)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--quick", action="store_true", help="half a minute")
    args = parser.parse_args()
    minutes = 0.5 if args.quick else args.minutes
    seen = soak(60 * minutes)
    show(["", "times"], sorted(seen.did.items()))
    show(["status", "times"], sorted(seen.statuses.items()))
    rows = ["memory", "descriptors", "pages in use", "5xx and broken answers"]
    first = seen.warm
    before = [seen.memory[first] / 2**20, seen.descriptors[first], seen.pages[first], 0]
    after = [seen.memory[-1] / 2**20, seen.descriptors[-1], seen.pages[-1], seen.failures]
    show(["", "warm", "at the end"], [list(row) for row in zip(rows, before, after)])
    print(*seen.broken[:5], sep="\n")
    emit(
        "soak",
        rows=rows,
        ratio=[seen.growth, seen.descriptors[-1] / seen.descriptors[first], None, None],
        ours=after,
        peer=before,
        spread=[(max(seen.memory[first:]) - min(seen.memory[first:])) / seen.memory[first], None, None, None],
        limit=[LIMIT, 1.0, 0, 0],
        minutes=minutes,
        clients=CLIENTS,
        requests=sum(seen.did.values()),
    )


def soak(seconds: float, clients: int = CLIENTS, rounds: int = ROUNDS) -> Seen:
    seen, stop, calm = Seen(), threading.Event(), threading.Event()
    calm.set()
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as (port, server):
        threads = [
            threading.Thread(target=live, args=(port, random.Random(i), seen, calm, stop, seconds / rounds))
            for i in range(clients)
        ]
        for thread in threads:
            thread.start()
        for _ in range(rounds):
            time.sleep(seconds / rounds)
            calm.clear()
            seen.pages.append(quiet(port, server))
            seen.memory.append(server.memory_info().rss)
            seen.descriptors.append(descriptors(server))
            calm.set()
        stop.set()
        for thread in threads:
            thread.join()
    return seen


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, psutil.Process]]:
    make_model(folder / "model")
    port = free_port()
    flags = f"--name {NAME} --port {port} --threads 1 --cache 1MiB --dtype float32 --db sqlite:///{folder}/ledger.db"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = open(folder / "log", "wb")
    argv = [sys.executable, "-m", "shoal.cli.main", "serve", str(folder / "model"), *flags.split()]
    process = subprocess.Popen(argv, stdout=log, stderr=log, env=env)
    try:
        while not (ready := status(port, "/ready")) or ready != 200:
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            time.sleep(0.1)
        yield port, psutil.Process(process.pid)
        assert process.poll() is None, (folder / "log").read_text()[-2000:]
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def make_model(folder: Path) -> None:
    from shoal.data.tokenizer import Tokenizer
    from shoal.model import hf
    from shoal.model.presets import PRESETS
    from shoal.model.transformer import Transformer

    tokenizer = Tokenizer.train([WORDS * 20], 400)
    model = Transformer(replace(PRESETS["tiny"], vocab_size=512, max_positions=512, init_std=0.2)).init_weights(0)
    hf.save(model, folder, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    tokenizer.save(folder)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def status(port: int, path: str) -> int | None:
    try:
        return request(port, "GET", path)[0]
    except OSError:
        return None


def request(port: int, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(HOST, port, timeout=120)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body else {})
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def quiet(port: int, server: psutil.Process, seconds: float = 90.0) -> int:
    """Wait until nothing runs, waits or is connected. Pages that the engine has in use then."""
    end = time.monotonic() + seconds
    while True:
        numbers = dict(re.findall(r"^shoal_engine_(\w+) (\S+)$", request(port, "GET", "/metrics")[1].decode(), re.M))
        running, waiting, used = (float(numbers[name]) for name in ("running", "waiting", "pages_used"))
        connected = sum(c.status == psutil.CONN_ESTABLISHED for c in server.net_connections("tcp"))
        if not running and not waiting and not used and not connected:
            return 0
        if time.monotonic() > end:
            return int(used)
        time.sleep(0.3)


def descriptors(server: psutil.Process) -> int:
    """Without the ledger's, whose pool of connections grows when two threads need one at a time, and stays."""
    return server.num_fds() - sum("ledger.db" in file.path for file in server.open_files())


def live(
    port: int, rng: random.Random, seen: Seen, calm: threading.Event, stop: threading.Event, at_most: float
) -> None:
    """A client's life."""
    kinds = [whole, streamed, vanishing, vanishing, stalling, half_a_request, no_request, embedding, in_json]
    while not stop.is_set():
        if not calm.wait(0.1):
            continue
        kind = rng.choice(kinds)
        seen.did[kind.__name__.replace("_", " ")] += 1
        with contextlib.suppress(ConnectionError, http.client.HTTPException, TimeoutError):
            kind(port, rng, seen, min(STALL_SECONDS, at_most))
        stop.wait(rng.random() * 0.2)


def chat(rng: random.Random, **fields) -> bytes:
    text = WORDS * rng.randint(1, 3) if rng.random() < 0.5 else str(rng.random())
    body = {"model": NAME, "messages": [{"role": "user", "content": text}], "max_tokens": rng.randint(1, 64)}
    body |= {"temperature": 1, "thinking": {"type": rng.choice(["enabled", "disabled"])}}
    return json.dumps(body | fields).encode()


def told(seen: Seen, code: int, body: bytes) -> None:
    seen.statuses[code] += 1
    if b'"error":' in body and code == 200:
        seen.broken.append(body[-300:].decode(errors="replace"))


def whole(port: int, rng: random.Random, seen: Seen, _: float) -> None:
    told(seen, *request(port, "POST", "/v1/chat/completions", chat(rng, n=rng.randint(1, 3))))


def streamed(port: int, rng: random.Random, seen: Seen, _: float) -> None:
    told(seen, *request(port, "POST", "/v1/chat/completions", chat(rng, stream=True)))


def embedding(port: int, rng: random.Random, seen: Seen, _: float) -> None:
    body = json.dumps({"model": NAME, "input": [WORDS] * rng.randint(1, 4)}).encode()
    told(seen, *request(port, "POST", "/v1/embeddings", body))


def in_json(port: int, rng: random.Random, seen: Seen, _: float) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    told(seen, *request(port, "POST", "/v1/chat/completions", chat(rng, response_format=wanted)))


def no_request(port: int, rng: random.Random, seen: Seen, _: float) -> None:
    body = rng.choice([b"{", b"[]", b'{"model": 1}', chat(rng, temperature=-1), chat(rng, max_tokens=10**6)])
    told(seen, *request(port, "POST", "/v1/chat/completions", body))


def vanishing(port: int, rng: random.Random, seen: Seen, _: float) -> None:
    with opened(port, chat(rng, stream=True)) as sock:
        for _ in range(rng.randint(0, 20)):
            if not sock.recv(rng.randint(1, 2000)):
                return


def stalling(port: int, rng: random.Random, seen: Seen, at_most: float) -> None:
    with opened(port, chat(rng, stream=True)) as sock:
        sock.recv(100)
        time.sleep(rng.random() * at_most)


def half_a_request(port: int, rng: random.Random, seen: Seen, at_most: float) -> None:
    with opened(port, b"") as sock:
        sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: local"[: rng.randint(1, 60)])
        time.sleep(rng.random() * min(at_most, 5.0))


@contextmanager
def opened(port: int, body: bytes) -> Iterator[socket.socket]:
    """A connection that has asked, and ends as a process does that is killed."""
    with socket.create_connection((HOST, port), timeout=120) as sock:
        if body:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        yield sock
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


if __name__ == "__main__":
    main()
