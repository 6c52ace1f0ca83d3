"""Training speed: tokens a second of whole steps, ours against peers at one shape, and our share of the machine's peak.

    python -m bench.train_speed [--quick]

Rows: ours against transformers (the better of its two experts implementations), ours against litgpt (the better of
eager and compiled), and MFU: our tokens a second times the FLOPs of a token (`shoal.plan.flops`: six a matrix number,
attention counted under the causal mask only) over the best bf16 product measured in the same rounds.
"""

import argparse
from statistics import median

from bench.record import emit
from bench.shape import CONTEXT, SHAPE, STEP_TOKENS, THREADS, prepare_batches
from bench.sides import Ratio, Side, SideFailed, interleave, start
from bench.table import show
from shoal.plan import flops

SIDES = [
    ("ours", "", False),
    ("with_transformers", "grouped_mm"),
    ("with_transformers", "eager"),
    ("with_litgpt", "eager"),
    ("with_litgpt", "compiled"),
    ("gemm", "bfloat16", False),
]
LIMITS = {"with_transformers": 4.0, "with_litgpt": None, "mfu": 0.30}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of seven")
    rounds = 2 if parser.parse_args().quick else 7
    prepare_batches()
    sides = ready(start(*SIDES))
    answers = interleave(sides, rounds, warmup=2)
    for side in sides:
        side.close()
    report(answers, rounds)


def ready(sides: list[Side]) -> list[Side]:
    """Build and compile outside the rounds; a peer that can't is named and left out, ours must."""
    able = []
    for side in sides:
        try:
            side.ask("build")
            print(f"{side.name:28} first step {side.ask('step', 0)['seconds']:.1f} s", flush=True)
            able.append(side)
        except SideFailed as failure:
            if side.name == "ours":
                raise
            print(f"{failure}\n{side.name}: left out")
    return able


def report(answers: dict[str, list[dict]], rounds: int) -> None:
    rates = {name: [STEP_TOKENS / a["seconds"] for a in found] for name, found in answers.items() if name[:4] != "gemm"}
    show(
        ["tokens/s", "median", "least", "most", "last loss"],
        [[n, median(r), min(r), max(r), answers[n][-1]["loss"]] for n, r in rates.items()],
    )
    ours = rates["ours"]
    per_token = flops.training(SHAPE, CONTEXT).total
    rows, ratios, left, right = [], [], [], []
    for adapter in ("with_transformers", "with_litgpt"):
        variants = {n: r for n, r in rates.items() if n.startswith(adapter)}
        if variants:
            best = max(variants, key=lambda n: median(variants[n]))
            rows.append(best)
            ratios.append(Ratio.of(ours, variants[best]))
            left.append(median(ours))
            right.append(median(variants[best]))
    peak = max(a["flops"] for a in answers["gemm bfloat16"])
    rows.append("mfu")
    ratios.append(Ratio.of([per_token * r for r in ours], [peak] * rounds))
    left.append(per_token * median(ours))
    right.append(peak)
    limits = [LIMITS[name.split()[0]] for name in rows]
    show(
        ["row", "ratio", "least", "most", "limit"],
        [[n, r.median, *r.spread, x] for n, r, x in zip(rows, ratios, limits)],
    )
    emit(
        "train_speed",
        rows=rows,
        ratio=[r.median for r in ratios],
        ours=left,
        peer=right,
        spread=[r.spread for r in ratios],
        limit=limits,
        units=["tokens/s"] * (len(rows) - 1) + ["FLOP/s"],
        tokens_per_second={name: median(r) for name, r in rates.items()},
        flops_per_token=per_token,
        rounds=rounds,
        threads=THREADS,
    )


if __name__ == "__main__":
    main()
