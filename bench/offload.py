"""Models larger than the memory: ours under `--memory`, llama.cpp mapping the same numbers, each in as much memory.

    python -m bench.offload [--quick] [--parts lite,v3]      LLAMA_CPP names the folder of llama-server

`lite`: V2-Lite's shape (15.7B, random weights of 4 bits, 8 GiB of files) answers with 6 GiB for everything. Each side
is a server in a memory control group of that size, so its page cache counts too, on both sides; rounds alternate. What
is resident of ours is read from outside the whole time. Decoding counts, from the first token to the last.

`v3`: layers of V3's true width (a dense one and mixtures of 256 experts) under a budget that holds a part of them:
tokens a second, and what they make of all 61 layers. Each round of both is held against what `shoal plan fit` foretells
from the hit rate and the disk's rate that the round saw, and the memory's rate just before it. What the disk gives at
random places is measured beside them, and is less, since a virtual machine's host keeps what is read again and again.

Control groups need version 1 of them and the right to make one; without, ours is measured alone and it says so.
"""

import argparse
import asyncio
import os
import re
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from threading import Event, Thread

from bench import models
from bench import offload_models as drawn
from bench.peers import llama
from bench.record import emit
from bench.servers import Server, together
from bench.shape import THREADS
from bench.sides import Ratio, turned
from bench.table import show
from shoal.model.config import ModelConfig
from shoal.model.presets import PRESETS
from shoal.plan import fit
from shoal.plan.fit import Hardware
from shoal.plan.memory import gib
from shoal.runtime import disk_bytes_per_s, idle_cores, read_bytes_per_s

LIMIT = 1.5  # times llama.cpp
AGREES = (1 - 0.2, 1 / (1 - 0.2))  # measured over foretold: how far a prediction may be off, either way
PROMPT, CONTEXT = 16, 4096
CGROUPS = Path("/sys/fs/cgroup/memory")


@dataclass(frozen=True)
class Case:
    model: str
    memory: int
    tokens: int  # decoded in a round
    warm: int  # in the round before
    rounds: int


CASES = {
    "lite": Case("lite", 6 << 30, 32, 96, 7),
    "lite quick": Case("lite-quick", 1750 << 20, 12, 24, 2),
    "v3": Case("v3-layers", 5 << 30, 24, 96, 5),
    "v3 quick": Case("v3-layers-quick", 3 << 30, 8, 24, 2),
}


class Group:
    """A memory control group below our own, with this limit, for one process."""

    def __init__(self, name: str, limit: int):
        self.path = own_group() / f"shoal-{os.getpid()}-{name}"
        self.path.mkdir()
        (self.path / "memory.limit_in_bytes").write_text(str(limit))

    def command(self, words: list[str]) -> list[str]:
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *words]

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_) -> None:
        self.path.rmdir()


def own_group() -> Path:
    (line,) = re.findall(r"^\d+:memory:(.*)$", Path("/proc/self/cgroup").read_text(), re.M) or [""]
    return CGROUPS / line.lstrip("/")


def no_groups() -> str | None:
    """Why there can be none."""
    if not (own_group() / "memory.limit_in_bytes").exists():
        return "no memory control groups of version 1"
    try:
        probe = own_group() / f"shoal-{os.getpid()}-probe"
        probe.mkdir()
        probe.rmdir()
    except OSError as e:
        return f"no right to make a control group: {e.strerror}"
    return None


class Watch:
    """The most memory a process had, page cache aside: anonymous and shared pages, looked at from outside."""

    def __init__(self, pid: int):
        self.file, self.most, self._ended = Path(f"/proc/{pid}/status"), 0, Event()
        self._thread = Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.02):
            with suppress(OSError):
                found = re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB$", self.file.read_text(), re.M)
                self.most = max(self.most, 1024 * sum(map(int, found)))

    def close(self) -> int:
        self._ended.set()
        self._thread.join()
        return self.most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer layers, less memory, two rounds")
    parser.add_argument("--parts", default="lite,v3", help="default lite,v3")
    args = parser.parse_args()
    if (idle := idle_cores(1.0)) < THREADS:
        print(f"{idle} idle cores for {THREADS} threads: others work here, the seconds below are not this machine's")
    results = {part: measure(CASES[part + " quick" * args.quick]) for part in args.parts.split(",")}
    report(results)


def measure(case: Case) -> dict:
    """Tokens a second of both sides (only ours for V3's layers), and what was seen of ours."""
    folder = drawn.prepare(case.model)
    why = no_groups()
    peer = case.model.startswith("lite") and why is None and llama.missing() is None
    if why or not peer:
        print(
            f"{case.model}: no llama.cpp beside it: {why or llama.missing() or 'plan fit is what it is held against'}"
        )
    with ExitStack() as stack:
        groups = (
            [] if why else [stack.enter_context(Group(side, case.memory)) for side in ("ours", "theirs")[: 1 + peer]]
        )
        forget([*folder.glob("*.safetensors"), *([drawn.prepare_gguf(case.model)] if peer else [])])
        servers = [stack.enter_context(ours(case, stack.enter_context(tempfile.TemporaryDirectory()), groups))]
        watch = Watch(servers[0].process.pid)
        stack.callback(watch.close)
        if peer:
            servers.append(stack.enter_context(theirs(case, groups[1])))
        rates, seen = take_rounds(case, servers, next(folder.glob("*.safetensors")))
        print(servers[0].log.read_text()[:600].partition("chat page")[0])
        resident = watch.close()
    assert resident <= case.memory, f"{resident:,} bytes were resident, {case.memory:,} were allowed"
    config = drawn.SHAPES[case.model]
    foretold = [fit.fit(config, "int4", machine(case, s), PROMPT + case.tokens, s["hit_rate"]) for s in seen]
    usual = {name: median(s[name] for s in seen) for name in seen[0]}
    plan = [f.tokens_per_s for f in foretold]
    return {"case": case, "rates": rates, "seen": usual, "resident": resident, "plan": plan}


def machine(case: Case, seen: dict[str, float]) -> Hardware:
    return Hardware(case.memory, seen["ram_bytes_per_s"], seen["disk_bytes_per_s"])


def forget(files: Iterable[Path]) -> None:
    """Let none of them be in the page cache: pages that are there already count in nobody's control group."""
    for file in files:
        with file.open("rb") as f:
            os.fsync(f.fileno())
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ours(case: Case, scratch: str, groups: list[Group]) -> Server:
    flags = ["--threads", str(THREADS), "--memory", str(case.memory), "--context", str(CONTEXT), "--cache", "128MiB"]
    words = [sys.executable, "-m", "shoal.cli.main", "serve", str(drawn.folder(case.model)), *flags]
    words += ["--db", f"sqlite:///{scratch}/ledger.db"]
    return Server(f"ours {case.model}", groups[0].command(words) if groups else words)


def theirs(case: Case, group: Group) -> Server:
    flags = ["-t", str(THREADS), "--no-ui", "--no-cache-prompt", "--cache-ram", "0", "--host", "127.0.0.1"]
    flags += ["--no-repack"]  # a second copy of all weights, in memory of its own: it would be killed
    flags += ["-np", "1", "-c", str(CONTEXT), "-fa", "on", "-m", str(drawn.prepare_gguf(case.model))]
    return Server(f"llama-server {case.model}", group.command([str(llama.program("llama-server")), *flags]))


def take_rounds(case: Case, servers: list[Server], file: Path) -> tuple[dict[str, list[float]], list[dict[str, float]]]:
    """Tokens a second of each server's rounds, and what was seen in ours. The first round warms up: experts that are
    used find their places. Memory and disk, which others use too, are measured before every round."""
    rates: dict[str, list[float]] = {server.name: [] for server in servers}
    seen: list[dict[str, float]] = []
    for i in range(1 + case.rounds):
        before = {"at_random": disk_bytes_per_s(file), "ram_bytes_per_s": read_bytes_per_s()}
        for server in turned(servers, i):
            n, counts = case.tokens if i else case.warm, i > 0 and server is servers[0]
            begun = metrics(server) if counts else {}
            seconds, (streamed,) = asyncio.run(together(server, [body(case, i, n)]))
            assert streamed.tokens == n, f"{server.name}: {streamed}"
            rate = (n - 1) / (seconds - streamed.first)
            print(f"  {f'round {i}' if i else 'warm-up'}  {server.name:28} {rate:.3f} tokens/s", flush=True)
            if i:
                rates[server.name].append(rate)
            if counts:
                seen.append(before | difference(begun, metrics(server), n))
    return rates, seen


def body(case: Case, seed: int, n: int) -> dict:
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    name = drawn.folder(case.model).name
    return {"model": name, "prompt": models.prompt(seed, PROMPT), "max_tokens": n, "temperature": 0, **usage}


def metrics(server: Server) -> dict[str, float]:
    """The server looks at its engine once a second."""
    time.sleep(1.5)
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics") as answer:
        text = answer.read().decode()
    return {name: float(n) for name, n in re.findall(r"^shoal_engine_experts_(\w+)_total (\S+)$", text, re.M)}


def difference(before: dict[str, float], after: dict[str, float], tokens: int) -> dict[str, float]:
    """What happened between: prompts of 16 tokens are a step each, and are counted with the tokens."""
    d = {name: after[name] - before[name] for name in after}
    return {
        "hit_rate": d["found"] / d["chosen"],
        "foretold": d["foretold"] / d["chosen"],
        "precision": d["right"] / max(1.0, d["guessed"]),
        "bytes_per_token": d["bytes_read"] / tokens,
        "disk_bytes_per_s": d["bytes_read"] / max(1e-9, d["seconds_reading"]),
    }


def report(results: dict[str, dict]) -> None:
    rows, ratios, limits = [], [], []
    for part, r in results.items():
        (name, rates), *peers = r["rates"].items()
        case, seen, plan = r["case"], r["seen"], r["plan"]
        speeds = [[n, median(x), min(x), max(x)] for n, x in r["rates"].items()]
        show(["tokens/s", "median", "least", "most"], speeds)
        found = f"{seen['hit_rate']:.0%} of experts found, {seen['foretold']:.0%} foretold"
        print(f"{case.model}: {gib(r['resident'])} resident of {gib(case.memory)}; {found}")
        read = f"{seen['bytes_per_token'] / 1e6:.0f} MB a token at {seen['disk_bytes_per_s'] / 1e9:.2f} GB/s"
        print(f"precision {seen['precision']:.0%}; {read}, at random {seen['at_random'] / 1e9:.2f}")
        print(f"plan fit foretells {median(plan):.2f} tokens/s ({min(plan):.2f} to {max(plan):.2f}) of these rounds")
        if peers:
            ratio = Ratio.of(rates, peers[0][1])
            print(f"{ratio.median:.2f} times llama.cpp ({ratio.spread[0]:.2f} to {ratio.spread[1]:.2f}), limit {LIMIT}")
            rows, ratios, limits = [*rows, f"{part} llama.cpp"], [*ratios, ratio], [*limits, LIMIT]
        agreed = Ratio.of(rates, plan)
        verdict = "agrees" if agrees(agreed.median) else "does NOT agree"
        print(f"{agreed.median:.2f} times plan fit ({agreed.spread[0]:.2f} to {agreed.spread[1]:.2f}): it {verdict}")
        rows, ratios, limits = [*rows, f"{part} plan fit"], [*ratios, agreed], [*limits, AGREES]
        if part == "v3":
            r["whole"] = extrapolated(drawn.SHAPES[case.model], median(rates), r)
            whole = r["whole"]
            print(f"all 61 layers: {whole['measured']:.3f} tokens/s by these, {whole['plan']:.3f} by plan fit")
    emit(
        "offload",
        rows=rows,
        ratio=[ratio.median for ratio in ratios],
        ours=[median(next(iter(results[row.split()[0]]["rates"].values()))) for row in rows],
        peer=[peer_of(results[row.split()[0]], row) for row in rows],
        spread=[ratio.spread for ratio in ratios],
        limit=limits,
        units="tokens/s",
        resident={part: r["resident"] for part, r in results.items()},
        memory={part: r["case"].memory for part, r in results.items()},
        seen={part: r["seen"] for part, r in results.items()},
        whole_model={part: r["whole"] for part, r in results.items() if "whole" in r},
        peer_version=llama.version(),
        threads=THREADS,
    )


def agrees(ratio: float) -> bool:
    """Of what was measured over what was foretold: too much is as wrong as too little."""
    return AGREES[0] <= ratio <= AGREES[1]


def peer_of(result: dict, row: str) -> float:
    return median(result["plan"] if row.endswith("fit") else [*result["rates"].values()][1])


def extrapolated(config: ModelConfig, rate: float, r: dict) -> dict[str, float]:
    """All of V3 at the same hit rate: the seconds of a mixture layer as measured, dense layers and head by the bytes
    that they have; and what plan fit says of the whole."""
    hardware, hit_rate, moe = machine(r["case"], r["seen"]), r["seen"]["hit_rate"], config.moe
    assert moe
    mixtures = config.n_layers - moe.n_dense_layers
    without = fit.weights(drawn.slice_of(config, 0), "int4").near / hardware.ram_rate
    each = (1 / rate - without) / mixtures
    v3 = PRESETS["v3-671b"]
    assert v3.moe
    dense = fit.weights(drawn.slice_of(v3, 0), "int4").near / hardware.ram_rate
    budget = replace(hardware, ram_bytes=fit.fit(v3, "int4", hardware, PROMPT).smallest)
    plan = fit.fit(v3, "int4", budget, PROMPT, hit_rate).tokens_per_s
    return {"measured": 1 / (dense + (v3.n_layers - v3.moe.n_dense_layers) * each), "plan": plan}


if __name__ == "__main__":
    main()
