"""Peak memory of a training step, ours against transformers at one shape, and the bytes each part takes.

    python -m bench.memory [--quick]

Each side is a fresh process: its resident size after imports is the baseline, then three steps, then the most it ever
held (VmHWM). The parts are the tensors themselves; what is left of the peak is activations, logits, temporaries and
what the allocator keeps. `plan` is what `shoal.plan.memory` foretells for ours, before anything is allocated.
"""

import argparse

from bench.record import emit
from bench.shape import SHAPE, STEP_TOKENS, THREADS, prepare_batches
from bench.sides import Ratio, interleave, start
from bench.table import show
from shoal.plan import memory

PARTS = ["weights", "masters", "moments", "gradients"]
STEPS = 3
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one process a side instead of three")
    times = 1 if parser.parse_args().quick else 3
    prepare_batches()
    found = [measure() for _ in range(times)]
    names = list(found[0])
    peaks = {name: [f[name]["peak"] - f[name]["baseline"] for f in found] for name in names}
    rows = [table_row(name, found[0][name], peaks[name][0]) for name in names]
    show(["MiB", "peak", *PARTS, "rest"], [*rows, planned()])
    peers = [name for name in names if name != "ours"]
    best = min(peers, key=lambda name: min(peaks[name]), default=None)
    ratio = Ratio.of(peaks[best], peaks["ours"]) if best else None
    emit(
        "memory",
        rows=[best],
        ratio=[ratio and ratio.median],
        ours=[min(peaks["ours"])],
        peer=[best and min(peaks[best])],
        spread=[ratio and ratio.spread],
        limit=[None],
        unit="bytes",
        parts={name: {part: found[0][name][part] for part in PARTS} for name in names},
        threads=THREADS,
    )


def measure() -> dict[str, dict]:
    """One fresh process per side."""
    sides = start(("ours", "", False), ("with_transformers", "grouped_mm"), ("with_transformers", "eager"))
    interleave(sides, STEPS, warmup=0)
    memories = {side.name: side.ask("memory") for side in sides}
    for side in sides:
        side.close()
    return memories


def table_row(name: str, found: dict, peak: int) -> list:
    parts = [found[part] for part in PARTS]
    return [name, *(n / MIB for n in (peak, *parts, peak - sum(parts)))]


def planned() -> list:
    plan = memory.of_training(SHAPE, memory.Step(STEP_TOKENS))
    parts = [plan.weights, plan.masters, plan.moments, plan.gradients]
    return ["plan", *(n / MIB for n in (plan.total, *parts, plan.activations + plan.logits))]


if __name__ == "__main__":
    main()
