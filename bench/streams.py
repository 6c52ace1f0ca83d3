"""Sixteen streams of 256 tokens in and 256 out at once: `shoal serve` against llama-server, by one client over HTTP.

    python -m bench.streams [--quick]        LLAMA_CPP names the folder of llama-bench and llama-server

The 107.5M shape in bf16, two threads each, /v1/completions with `stream`, prompts of random ids that are new in every
round, greedy; nothing ends a stream but its length, and every stream is held to its 256 tokens. What counts is output
tokens a second from the first request to the last token, prompts included. Time to first token beside it: how long a
stream waited for its first piece of text, over all streams of all rounds. Our server does its books meanwhile: every
token is journaled, every request billed.
"""

import argparse
import asyncio
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median, quantiles

from bench import models
from bench.peers import llama
from bench.record import emit
from bench.servers import Server, Streamed, together
from bench.shape import THREADS
from bench.sides import Ratio, turned
from bench.table import show
from shoal.runtime import idle_cores

STREAMS, IN, OUT = 16, 256, 256
LIMIT = 3.0
MODEL = "measured"  # its name over HTTP


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round instead of seven")
    rounds = 1 if parser.parse_args().quick else 7
    models.prepare("small")
    llama.prepare("small")
    if (idle := idle_cores(1.0)) < THREADS:
        print(f"{idle} idle cores for {THREADS} threads: others work here, the seconds below are not this machine's")
    with ExitStack() as stack:
        servers = [stack.enter_context(ours("small", Path(stack.enter_context(tempfile.TemporaryDirectory()))))]
        if (what := llama.missing()) is None:
            servers.append(stack.enter_context(theirs("small")))
        else:
            print(f"llama.cpp: missing: {what}")
        found = measure(servers, rounds)
    report(found, rounds)


def ours(name: str, scratch: Path) -> Server:
    where = [
        str(models.folder(name)),
        "--name",
        MODEL,
        "--threads",
        str(THREADS),
        "--db",
        f"sqlite:///{scratch}/ledger.db",
    ]
    return Server("shoal serve", [sys.executable, "-m", "shoal.cli.main", "serve", *where])


def theirs(name: str) -> Server:
    """At its best settings: ubatches of 256 and 2048 took the same time, one cache for all slots or no flash attention
    more. `-c` is what all slots have together, twice what they need."""
    slots = ["-np", str(STREAMS), "-c", str(STREAMS * 2 * (IN + OUT)), "--cont-batching"]
    return llama.serve(llama.file(name), *slots, "-fa", "on", "-ub", "512")


def measure(servers: list[Server], rounds: int) -> dict[str, list[tuple[float, list[Streamed]]]]:
    """Per server and round: seconds in all, and each stream. A short round warms up."""
    found: dict[str, list[tuple[float, list[Streamed]]]] = {server.name: [] for server in servers}
    for i in range(1 + rounds):
        for server in turned(servers, i):
            n = OUT if i else 16
            seconds, streams = asyncio.run(together(server, [body(i * STREAMS + k, n) for k in range(STREAMS)]))
            assert all(stream.tokens == n for stream in streams), f"{server.name}: {streams}"
            print(f"  {f'round {i}' if i else 'warm-up'}  {server.name:14} {seconds:.2f} s", flush=True)
            if i:
                found[server.name].append((seconds, streams))
    return found


def body(seed: int, n: int) -> dict:
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    return {"model": MODEL, "prompt": models.prompt(seed, IN), "max_tokens": n, "temperature": 0, **usage}


def report(found: dict[str, list[tuple[float, list[Streamed]]]], rounds: int) -> None:
    rates = {name: [STREAMS * OUT / seconds for seconds, _ in taken] for name, taken in found.items()}
    firsts = {name: waits([s.first for _, streams in taken for s in streams]) for name, taken in found.items()}
    show(
        ["output tokens/s", "median", "least", "most", "first token p50, s", "p99, s"],
        [[name, median(r), min(r), max(r), *firsts[name]] for name, r in rates.items()],
    )
    us, *peers = rates
    ratio = Ratio.of(rates[us], rates[peers[0]]) if peers else None
    if ratio:
        print(f"{ratio.median:.2f} times llama-server ({ratio.spread[0]:.2f} to {ratio.spread[1]:.2f}), limit {LIMIT}")
    emit(
        "streams",
        rows=["llama-server"],
        ratio=[ratio and ratio.median],
        ours=[median(rates[us])],
        peer=[median(rates[peers[0]]) if peers else None],
        spread=[ratio and ratio.spread],
        limit=[LIMIT],
        units="output tokens/s",
        first_token_seconds={name: {"p50": p50, "p99": p99} for name, (p50, p99) in firsts.items()},
        streams=STREAMS,
        tokens_in=IN,
        tokens_out=OUT,
        peer_version=llama.version(),
        rounds=rounds,
        threads=THREADS,
    )


def waits(seconds: list[float]) -> tuple[float, float]:
    """p50 and p99."""
    return median(seconds), quantiles(seconds, n=100, method="inclusive")[98]


if __name__ == "__main__":
    main()
