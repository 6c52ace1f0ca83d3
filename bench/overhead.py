"""What the API adds to an engine: milliseconds a request, microseconds a token.

    python -m bench.overhead [--quick]

The engine (`bench.scripted`) has no model. It is asked in turns in this process, and through a server in another one:
HTTP, key, JSON, chat template, tokenizer, journal, ledger, streaming. What is above the engine is the difference of the
medians over a round's requests.

    a request        of one token, from the first byte sent to the last one read, over one open connection
    a token          how much longer a stream takes for each token more, the engine giving them at once
    a spaced token   one every 2 ms, which shares no wake-up, write or packet with another: processor time of the
                     server's process. Most of it is the system's, for waking a loop that sleeps; there is no limit.
"""

import argparse
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from bench.record import emit
from bench.scripted import NAME, PHRASE, VOCAB, ScriptedEngine, tokenizer
from bench.table import show
from shoal.engine.request import Form, Request, Step
from shoal.engine.turns import Turns

TOKENS = 512
SPACED_TOKENS, SPACED_SECONDS = 256, 0.002
LIMITS = {"a request, ms": 2.0, "a token, µs": 50.0, "a spaced token, µs": None}
MESSAGES = [{"role": "user", "content": "Write a function that finds the longest common prefix of a list of strings."}]
END = b"0\r\n\r\n"


class Served:
    """A server on a scripted engine in a process of its own, and one connection to it."""

    def __init__(self, pause: float):
        Path("build/bench").mkdir(parents=True, exist_ok=True)
        words = [sys.executable, "-m", "bench.scripted", str(pause)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        said = json.loads(self.line())
        self.key = said["key"]
        self.socket = socket.create_connection(("127.0.0.1", said["port"]))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def cpu(self) -> float:
        """Seconds of processor time that the server has used."""
        assert self.process.stdin
        print(file=self.process.stdin, flush=True)
        return float(self.line())

    def seconds(self, tokens: int) -> float:
        """One streamed answer of so many tokens."""
        request = self.request(tokens)
        began = time.perf_counter()
        self.socket.sendall(request)
        answer = b""
        while not answer.endswith(END):
            answer += self.socket.recv(65536)
        seconds = time.perf_counter() - began
        assert answer.startswith(b"HTTP/1.1 200 ") and answer.count(b'"content": "') >= tokens, answer[:500]
        return seconds

    def request(self, tokens: int) -> bytes:
        asked = {"model": NAME, "messages": MESSAGES, "max_tokens": tokens, "stream": True}
        body = json.dumps(asked | {"thinking": {"type": "disabled"}}).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {self.key}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    def close(self) -> None:
        assert self.process.stdin
        self.socket.close()
        self.process.stdin.close()
        self.process.wait()


class InProcess:
    """The same engine and the same token state machine, and nothing around them."""

    def __init__(self, pause: float):
        words = tokenizer()
        self.turns = Turns(words, VOCAB)
        self.engine = ScriptedEngine(words.encode(PHRASE), pause)
        self.prompt = self.turns.render(MESSAGES, Form())

    def cpu(self) -> float:
        return time.process_time()

    def seconds(self, tokens: int) -> float:
        output, done = self.turns.output(Form(), True, self.prompt), threading.Event()

        def sink(step: Step) -> None:
            if step.finish:
                done.set()

        request = Request(tuple(self.prompt), tokens, sink, guide=output, stop_tokens=self.turns.stop_tokens)
        began = time.perf_counter()
        self.engine.submit(request)
        done.wait()
        return time.perf_counter() - began

    def close(self) -> None:
        self.engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds of ten requests instead of nine of forty")
    rounds, requests = (2, 10) if parser.parse_args().quick else (9, 40)
    free, spaced = ((Served(pause), InProcess(pause)) for pause in (0.0, SPACED_SECONDS))
    measures: dict[str, Callable[[Served | InProcess], float]] = {
        "a request, ms": lambda side: 1e3 * median(side.seconds(1) for _ in range(requests)),
        "a token, µs": lambda side: 1e6 * a_token(side, requests),
        "a spaced token, µs": lambda side: 1e6 * cpu_of_a_token(side, max(2, requests // 10)),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in measures}
    for i in range(1 + rounds):  # the first warms up
        for name, measure in measures.items():
            served, alone = spaced if "spaced" in name else free
            pair = measure(served), measure(alone)
            if i:
                found[name].append(pair)
                print(f"  round {i}  {name:20} {pair[0]:8.3f} through the API {pair[1]:8.3f} in process", flush=True)
    for side in (*free, *spaced):
        side.close()
    report(found, rounds, requests)


def a_token(side: Served | InProcess, requests: int) -> float:
    long, short = (median(side.seconds(n) for _ in range(requests)) for n in (TOKENS, 1))
    return (long - short) / (TOKENS - 1)


def cpu_of_a_token(side: Served | InProcess, requests: int) -> float:
    def used(tokens: int) -> float:
        began = side.cpu()
        for _ in range(requests):
            side.seconds(tokens)
        return side.cpu() - began

    return (used(SPACED_TOKENS) - used(1)) / (SPACED_TOKENS - 1) / requests


def report(found: dict[str, list[tuple[float, float]]], rounds: int, requests: int) -> None:
    added = {name: [ours - alone for ours, alone in pairs] for name, pairs in found.items()}
    show(
        ["above the engine", "median", "least", "most", "limit"],
        [[name, median(a), min(a), max(a), LIMITS[name]] for name, a in added.items()],
    )
    emit(
        "overhead",
        rows=list(added),
        ratio=[limit and median(added[name]) / limit for name, limit in LIMITS.items()],  # of the limit: at most 1
        ours=[median(a for a, _ in pairs) for pairs in found.values()],
        peer=[median(b for _, b in pairs) for pairs in found.values()],
        spread=[[min(a), max(a)] for a in added.values()],
        limit=list(LIMITS.values()),
        added=[median(a) for a in added.values()],
        rounds=rounds,
        requests=requests,
        tokens=TOKENS,
    )


if __name__ == "__main__":
    main()
