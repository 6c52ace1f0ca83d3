"""Weights in 8 and 4 bits on a CPU: ours against llama.cpp's q8_0 and q4_0, and fp8, which it lacks, against our bf16.

    python -m bench.quant_speed [--quick] [--parts decode,prefill,streams]

LLAMA_CPP names the folder of llama-bench and llama-server.

The 1.39B shape with random weights. Decoding 128 tokens, one stream; reading a prompt of 512; and 16 streams of 256 in
and 256 out over HTTP (as bench.streams does it). Integers have a scale for 128 inputs; q8_0 and q4_0 one for 32. Ours
keeps the latents' up-projection in bf16; heads are in 8 bits on both sides. A token must read what it is multiplied
with once:

    share of the bandwidth = bytes of its codes, scales and other weights · tokens a second / best rate of reading
"""

import argparse
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from bench import models, streams
from bench.decode import record
from bench.peers import llama
from bench.sides import interleave, start
from bench.table import show
from shoal.model.layers import Linear, RMSNorm
from shoal.model.moe import Experts, MoE, Router
from shoal.precision import weights
from shoal.precision.weights import QuantisedExperts, QuantisedLinear

PEERS = {"int8": "q8_0", "int4": "q4_0"}
FORMS = ("int8", "int4", "fp8")
LIMITS = {"decode": 1.2, "prefill": 3.0, "streams": 2.0}
TOKENS = {"decode": models.DECODE, "prefill": models.PREFILL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round instead of seven, no streams")
    parser.add_argument("--parts", default=",".join(LIMITS), help=f"default {','.join(LIMITS)}")
    args = parser.parse_args()
    quick, parts = args.quick, set(args.parts.split(","))
    rounds = 1 if quick else 7
    models.prepare("large", *(f"large-{form}" for form in FORMS))
    llama.prepare(*(f"large-{form}" for form in PEERS.values()))
    rates: dict[str, list[float]] = {}
    (memory,) = start(("reading", "", False))
    for what in [what for what in TOKENS if what in parts]:
        ours = [("engine", f"{what} {name}", False) for name in (*(f"large-{form}" for form in FORMS), "large")]
        sides = start(*ours, *(("with_llama", f"{what} large-{q}") for q in PEERS.values()))
        for name, found in interleave(sides, rounds, warmup=1).items():
            rates[name] = [TOKENS[what] / answer["seconds"] for answer in found]
        for side in sides:
            side.close()
    bandwidth = max(memory.ask("step", i)["bytes_per_s"] for i in range(3))
    memory.close()
    for form in PEERS if "streams" in parts and not quick else ():
        rates |= in_streams(form, rounds=5)
    report(rates, rounds, bandwidth)


def in_streams(form: str, rounds: int) -> dict[str, list[float]]:
    """Output tokens a second of 16 streams, ours and theirs."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        names = [f"engine streams large-{form}", f"with_llama streams large-{PEERS[form]}"]
        servers = [stack.enter_context(streams.ours(f"large-{form}", scratch))]
        if not llama.missing():
            servers.append(stack.enter_context(streams.theirs(f"large-{PEERS[form]}")))
        found = streams.measure(servers, rounds)
    return {
        name: [streams.STREAMS * streams.OUT / seconds for seconds, _ in taken]
        for name, taken in zip(names, found.values())
    }


def report(rates: dict[str, list[float]], rounds: int, bandwidth: float) -> None:
    needed = {f"large-{form}": active_bytes(f"large-{form}") for form in FORMS} | {"large": active_bytes("large")}
    shares = {
        name: needed[name.split()[-1]] * median(r) / bandwidth
        for name, r in rates.items()
        if name.startswith("engine decode")
    }
    show(
        ["tokens/s", "median", "least", "most", f"of {bandwidth / 1e9:.1f} GB/s"],
        [
            [name, median(r), min(r), max(r), f"{shares[name]:.0%}" if name in shares else "-"]
            for name, r in rates.items()
        ],
    )
    compared, limits = {}, []
    for what, limit in LIMITS.items():
        for form in FORMS:
            ours = f"engine {what} large-{form}"
            peer = f"with_llama {what} large-{PEERS[form]}" if form in PEERS else f"engine {what} large"
            if ours in rates and peer in rates:
                compared[f"{what} {form} / {peer.split()[-1].removeprefix('large-')}"] = (rates[ours], rates[peer])
                limits.append(limit if form in PEERS else None)
    more = {"bandwidth": bandwidth, "share_of_bandwidth": shares, "active_bytes": needed}
    record("quant_speed", compared, limits, rates, rounds, **more)


def active_bytes(name: str) -> int:
    """What a token reads of the weights."""
    model, n_bytes = weights.load(models.folder(name)), 0
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            n_bytes += module.weight.nbytes
        elif isinstance(module, Linear | RMSNorm | Router):
            n_bytes += sum(p.nbytes for p in module.parameters(recurse=False))
        elif isinstance(module, MoE):
            n_bytes += of_experts(module.experts) * module.router.config.n_activated // len(module.experts.down)
    return n_bytes


def of_experts(experts: Experts | QuantisedExperts) -> int:
    if isinstance(experts, Experts):
        return sum(p.nbytes for p in experts.parameters())
    return sum(matrix.nbytes for matrices in (experts.gate, experts.up, experts.down) for matrix in matrices)


if __name__ == "__main__":
    main()
