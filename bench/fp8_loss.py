"""What 8-bit training costs in loss: the quickstart's base trained in bf16 and in fp8 on the same data and seeds.

    python -m bench.fp8_loss [--quick] [--steps 900] [--seeds 0,1,2] [--threads 2] [--control]

Runs go by steps, so that both sides do identical work. Two figures a seed: the held-out loss of the weights that came
out, read in bf16 as whoever opens the checkpoint reads them, and the training loss, mean of the last tenth, which the
8-bit side computes in 8 bits (DeepSeek-V3's 0.25%, section 3.3, is of the training loss). `ratio` is fp8 over bf16.

Two runs that differ in rounding alone part ways too, and end as far apart as chance has it. `--control` measures that:
bf16 once more, on another number of threads, which sums in another order. Without an FP8 unit this is about numerics,
not speed. Finished runs are kept under runs/bench/ and not made again while the code is the same.
"""

import argparse
from dataclasses import dataclass
from statistics import fmean, median

from bench.record import emit
from bench.table import show
from bench.training import ROOMS, code, flags, made, read
from shoal.run import Run

LIMIT = 1.0025
SOURCE = (*ROOMS, "precision/**/*")
SETTINGS = {"minutes": "none", "eval.times": "1", "eval.final_tokens": "500000"}
CONTROL = "bf16 again"


@dataclass(frozen=True)
class Losses:
    """`held_out` in bits per byte, `training` in nats a token."""

    held_out: float
    training: float


def main() -> None:
    args = arguments()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    sides = {"bf16": (args.threads, "plain"), "fp8": (args.threads, "fp8")}
    control = {CONTROL: (3 - min(args.threads, 2), "plain")} if args.control else {}
    found: dict[str, list[Losses]] = {side: [] for side in sides | control}
    for seed in seeds:
        for side, how in (sides | control).items():
            found[side].append(trained(seed, args.steps, *how))
    report(found, seeds, args.steps)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 steps: shows that it works")
    parser.add_argument("--steps", type=int, help="of a run, 900: ten minutes of two idle cores")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--control", action="store_true", help="bf16 once more, summed in another order")
    args = parser.parse_args()
    args.steps = args.steps or (60 if args.quick else 900)
    return args


def trained(seed: int, steps: int, threads: int, precision: str) -> Losses:
    settings = {"steps": steps, "seed": seed, "threads": threads, "precision": precision} | SETTINGS
    asked = ["pretrain", "quickstart", *flags({key: str(value) for key, value in settings.items()})]
    path = made(asked, f"fp8-loss-{precision}_{steps}steps_seed{seed}_{threads}threads", SOURCE)
    _, losses = Run.open(path).series("train/loss")
    return Losses(read(path).bits_per_byte, fmean(losses[-max(1, steps // 10) :]))


def report(found: dict[str, list[Losses]], seeds: list[int], steps: int) -> None:
    rows = {}
    for side in [side for side in found if side != "bf16"]:
        for figure in ("held_out", "training"):
            pairs = [(getattr(a, figure), getattr(b, figure)) for a, b in zip(found[side], found["bf16"])]
            rows[f"{side}, {figure.replace('_', '-')} loss"] = pairs
    ratios = {name: [ours / peer for ours, peer in pairs] for name, pairs in rows.items()}
    table = [[name, *(f"{100 * (r - 1):+.3f}%" for r in (median(rs), *rs))] for name, rs in ratios.items()]
    show(["gap to bf16", "median", *(f"seed {seed}" for seed in seeds)], table)
    emit(
        "fp8_loss",
        rows=list(rows),
        ratio=[median(rs) for rs in ratios.values()],
        ours=[median(ours for ours, _ in pairs) for pairs in rows.values()],
        peer=[median(peer for _, peer in pairs) for pairs in rows.values()],
        spread=[(min(rs), max(rs)) for rs in ratios.values()],
        limit=[LIMIT if name.startswith("fp8") else None for name in rows],
        unit="bits per byte (held-out), nats a token (training)",
        gaps_percent={name: [100 * (r - 1) for r in rs] for name, rs in ratios.items()},
        seeds=seeds,
        steps=steps,
        code=code(SOURCE),
    )


if __name__ == "__main__":
    main()
