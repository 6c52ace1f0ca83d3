"""Reinforcement learning: answers a second of whole GRPO steps (drawing, grading, learning), ours against TRL's.

    python -m bench.rl_speed [--quick]         PEER_PYTHON names the interpreter of an environment with trl

A model of 0.95M parameters in V3's shape; 16 prompts of 8 answers a step, of exactly 32 and of 128 tokens each;
the same prompts, reward, rates and two threads on both sides (`bench/grpo.py`). Ours is the loop of `shoal rl` as it
is: bf16 weights with fp32 masters, the gap between engine and trainer measured, some answers written down token by
token. TRL draws by transformers' generate. Of its dtypes and experts implementations the fastest counts.
"""

import argparse
from statistics import median

from bench import grpo, models
from bench.record import emit
from bench.shape import THREADS
from bench.sides import Ratio, Side, interleave, start
from bench.table import show

LENGTHS = (32, 128)
PEERS = ("fp32 grouped_mm", "bf16 grouped_mm", "fp32 eager", "bf16 eager")
LIMIT = 5.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two rounds instead of seven, and 32 tokens alone")
    quick = parser.parse_args().quick
    rounds = 2 if quick else 7
    models.prepare("tiny")
    answers = {}
    for tokens in LENGTHS[:1] if quick else LENGTHS:
        sides = start(("our_grpo", f"{tokens}", False), *fastest(tokens))
        answers |= interleave(sides, rounds, warmup=2)
        for side in sides:
            side.close()
    report(answers, rounds)


def fastest(tokens: int) -> list[tuple[str, str]]:
    """Each dtype with the experts implementation that is faster over two steps after a first one."""
    found: dict[str, tuple[float, str]] = {}
    for variant in PEERS:
        side = Side("with_trl", f"{tokens} {variant}")
        if side.missing:
            print(f"{side.name}: missing: {side.missing}")
            side.close()
            return []
        seconds = min([side.ask("step", i)["seconds"] for i in range(3)][1:])
        side.close()
        print(f"  try      {side.name:28} {seconds:.3f} s", flush=True)
        dtype = variant.split()[0]
        found[dtype] = min(found.get(dtype, (seconds, variant)), (seconds, variant))
    return [("with_trl", f"{tokens} {variant}") for _, variant in found.values()]


def report(answers: dict[str, list[dict]], rounds: int) -> None:
    rates = {name: [grpo.ANSWERS / a["seconds"] for a in found] for name, found in answers.items()}
    show(
        ["answers/s", "median", "least", "most", "drawing"],
        [[name, median(r), min(r), max(r), drawing(answers[name])] for name, r in rates.items()],
    )
    rows, ratios, left, right = [], [], [], []
    for name in (name for name in rates if name.startswith("our")):
        tokens = name.split()[1]
        peers = [n for n in rates if n.startswith(f"with_trl {tokens} ")]
        if peers:
            rows.append(max(peers, key=lambda n: median(rates[n])))
            ratios.append(Ratio.of(rates[name], rates[rows[-1]]))
            left.append(median(rates[name]))
            right.append(median(rates[rows[-1]]))
    show(
        ["ratio to", "median", "least", "most", "limit"],
        [[n, r.median, *r.spread, LIMIT] for n, r in zip(rows, ratios)],
    )
    emit(
        "rl_speed",
        rows=rows,
        ratio=[r.median for r in ratios],
        ours=left,
        peer=right,
        spread=[r.spread for r in ratios],
        limit=[LIMIT] * len(rows),
        units="answers/s",
        ours_in="bf16, fp32 masters",
        answers_per_second={name: median(r) for name, r in rates.items()},
        share_of_drawing={name: drawing(found) for name, found in answers.items()},
        answers=grpo.ANSWERS,
        rounds=rounds,
        threads=THREADS,
    )


def drawing(found: list[dict]) -> float | None:
    """The share of a step in which answers are drawn; not known of a peer."""
    parts = [(a["time/rollout"], a["time/update"]) for a in found if "time/rollout" in a]
    return median(r / (r + u) for r, u in parts) if parts else None


if __name__ == "__main__":
    main()
