"""Reading a prompt of 512 random tokens: ours, from the request to its first token, against llama-bench's pp512.

    python -m bench.prefill [--quick]        LLAMA_CPP names the folder of llama-bench and llama-server

One stream, bf16, on the 107.5M shape and on one of 1.39B parameters; no prompt is seen twice. Beside the rates stands
the share of the machine's best bf16 product that ours gets (`shoal.plan.flops` of a token, keys rebuilt).
"""

import argparse
from statistics import median

from bench import models
from bench.decode import record
from bench.peers import llama
from bench.sides import interleave, start
from bench.table import show
from shoal.plan import flops

SIDES = [
    ("engine", "prefill small", False),
    ("with_llama", "prefill small", False),
    ("engine", "prefill large", False),
    ("with_llama", "prefill large", False),
    ("gemm", "bfloat16", False),
]
LIMIT = 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of nine")
    rounds = 2 if parser.parse_args().quick else 9
    models.prepare("small", "large")
    llama.prepare("small", "large")
    sides = start(*SIDES)
    answers = interleave(sides, rounds, warmup=1)
    for side in sides:
        side.close()
    report(answers, rounds)


def report(answers: dict[str, list[dict]], rounds: int) -> None:
    peak = max(answer["flops"] for answer in answers.pop("gemm bfloat16"))
    rates = {name: [models.PREFILL / a["seconds"] for a in found] for name, found in answers.items()}
    shares = {name: flops_of(name.split()[-1]) * median(r) / peak for name, r in rates.items()}
    show(
        ["tokens/s", "median", "least", "most", f"of {peak / 1e9:.0f} GFLOP/s"],
        [[name, median(r), min(r), max(r), f"{shares[name]:.0%}"] for name, r in rates.items()],
    )
    peers = [name for name in rates if name.startswith("with_llama")]
    compared = {name: (rates[name.replace("with_llama", "engine")], rates[name]) for name in peers}
    record("prefill", compared, [LIMIT] * len(peers), rates, rounds, peak_flops=peak, share_of_peak=shares)


def flops_of(model: str) -> float:
    return flops.forward(models.SHAPES[model], models.PREFILL).total


if __name__ == "__main__":
    main()
