"""Decoding, one stream, no speculation: tokens a second of ours, of llama.cpp and of transformers, in bf16.

    python -m bench.decode [--quick]        LLAMA_CPP names the folder of llama-bench and llama-server

128 tokens after a short prompt, greedy, on the 107.5M shape and on one of 1.39B parameters. A token reads every weight
it is multiplied with once, so memory says what is possible at most:

    share of the bandwidth = bytes of the active weights · tokens a second / best rate of reading memory

The small model's is not a bound: a part of it stays in caches from token to token. The cache of 144 tokens (under 1%)
isn't counted. The better of transformers' experts implementations counts; whether llama.cpp computes the same model is
`bench.agreement`'s question.
"""

import argparse
from collections.abc import Mapping, Sequence
from statistics import median

from bench import models
from bench.peers import llama
from bench.record import emit
from bench.shape import THREADS
from bench.sides import Ratio, interleave, start
from bench.table import show
from shoal.model.counts import count_parameters
from shoal.plan.memory import numbers

SIDES = [
    ("engine", "decode small", False),
    ("with_llama", "decode small", False),
    ("with_generate", "grouped_mm small"),
    ("with_generate", "eager small"),
    ("engine", "decode large", False),
    ("with_llama", "decode large", False),
    ("reading", "", False),
]
LIMITS = {"with_llama": 1.0, "with_generate": 8.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of seven")
    rounds = 2 if parser.parse_args().quick else 7
    models.prepare("small", "large")
    llama.prepare("small", "large")
    sides = start(*SIDES)
    answers = interleave(sides, rounds, warmup=1)
    for side in sides:
        side.close()
    report(answers, rounds)


def report(answers: dict[str, list[dict]], rounds: int) -> None:
    bandwidth = max(answer["bytes_per_s"] for answer in answers.pop("reading"))
    rates = {name: [models.DECODE / a["seconds"] for a in found] for name, found in answers.items()}
    shares = {name: active_bytes(name.split()[-1]) * median(r) / bandwidth for name, r in rates.items()}
    show(
        ["tokens/s", "median", "least", "most", f"of {bandwidth / 1e9:.1f} GB/s"],
        [[name, median(r), min(r), max(r), f"{shares[name]:.0%}"] for name, r in rates.items()],
    )
    compared = {}
    for model in models.SHAPES:
        for adapter in LIMITS:
            peers = [n for n in rates if n.startswith(adapter) and n.endswith(model)]
            if peers:
                best = max(peers, key=lambda name: median(rates[name]))
                compared[best] = (rates[f"engine decode {model}"], rates[best])
    limits = [LIMITS[name.split()[0]] for name in compared]
    record("decode", compared, limits, rates, rounds, bandwidth=bandwidth, share_of_bandwidth=shares)


def record(
    name: str,
    compared: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    limits: Sequence[float | None],
    rates: dict[str, list[float]],
    rounds: int,
    **more,
) -> None:
    """Print and keep the ratios of tokens a second, ours to each peer's, of the same rounds."""
    ratios = [Ratio.of(ours, theirs) for ours, theirs in compared.values()]
    show(
        ["ratio to", "median", "least", "most", "limit"],
        [[peer, r.median, *r.spread, limit] for peer, r, limit in zip(compared, ratios, limits)],
    )
    emit(
        name,
        rows=list(compared),
        ratio=[r.median for r in ratios],
        ours=[median(ours) for ours, _ in compared.values()],
        peer=[median(theirs) for _, theirs in compared.values()],
        spread=[r.spread for r in ratios],
        limit=list(limits),
        units="tokens/s",
        tokens_per_second={side: median(rate) for side, rate in rates.items()},
        peer_version=llama.version(),
        rounds=rounds,
        threads=THREADS,
        **more,
    )


def active_bytes(model: str) -> int:
    """What a token reads of the weights: matrices in bf16; norms and routers, which every token meets, in fp32."""
    config = models.SHAPES[model]
    return 2 * count_parameters(config).active + 2 * numbers(config).vectors


if __name__ == "__main__":
    main()
