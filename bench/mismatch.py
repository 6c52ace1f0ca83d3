"""Engine against trainer: how far apart they put the same tokens' log-probabilities, on the same weights.

    python -m bench.mismatch [MODEL] [--quick]    MODEL: a run, a checkpoint, a model folder; without it random weights

The engine draws answers to problems in groups, as in reinforcement; the trainer scores them in its own batches. Mean
and largest |Δ log p|, k3 (an estimate of KL that is never negative), and the tokens for which some layer's router would
choose other experts in the trainer (flips). With replay, which `shoal rl` does, the trainer takes the experts that the
engine took: what is left is rounding, and flips are tokens whose experts still differ.

Weights make a difference: where the next token is open and experts are nearly tied, rounding decides more. Random ones
(`bench/models.py`) are the hard case: one token in a hundred meets other experts in bf16, and without replay that is
nearly all of the gap.
"""

import argparse
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import models
from bench.record import emit
from bench.shape import THREADS
from bench.table import show
from shoal import runtime
from shoal.cli.opened import Opened, open_model
from shoal.engine import native
from shoal.engine.engine import LocalEngine
from shoal.model.transformer import Transformer
from shoal.post import policy
from shoal.post.grpo import Gap
from shoal.post.policy import Graded, Rollout
from shoal.post.rl_config import RolloutConfig
from shoal.post.rollout import Rollouts
from shoal.tasks.catalog import QUICK_LEVELS, QUICK_TASKS, resolve
from shoal.tasks.task import draw

LIMITS = {"float32": 1e-6, "bfloat16": 1e-4}  # of the mean |Δ log p|, and of k3
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Found:
    dtype: str
    replay: bool
    gap: Gap
    tokens: int
    flips: int

    @property
    def judged(self) -> float:
        """The number that has a limit."""
        return self.gap.mean if self.dtype == "float32" else self.gap.k3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="what to measure; default: random weights of 0.95M parameters")
    parser.add_argument("--quick", action="store_true", help="8 prompts instead of 64")
    args = parser.parse_args()
    runtime.setup(THREADS)
    if args.model is None:
        models.prepare("tiny")
    name = args.model or str(models.folder("tiny"))
    report(name, [found for dtype in LIMITS for found in compared(open_model(name, dtype, THREADS), dtype, args.quick)])


def compared(opened: Opened, dtype: str, quick: bool) -> Iterator[Found]:
    answers = drawn(opened, RolloutConfig(8 if quick else 64, group=8, max_tokens=64))
    batches = list(policy.packed(answers, 0, BATCH_TOKENS))
    for replay in (False, True):
        logp_N = torch.cat([policy.scored(opened.model, batch, replay) for batch in batches])
        gap = Gap.between(logp_N, torch.cat([batch.engine_N for batch in batches]))
        flips = sum(flipped(opened.model, batch, replay) for batch in batches)
        yield Found(dtype, replay, gap, sum(len(b.batch.tokens_T) for b in batches), flips)


def drawn(opened: Opened, config: RolloutConfig) -> list[Graded]:
    """As `shoal rl` draws them."""
    tasks = resolve(",".join(QUICK_TASKS))
    with closing(LocalEngine(opened.model, deterministic=native.takes(opened.model))) as engine:
        rollouts = Rollouts(
            engine, opened.tokenizer, config, 0, lambda i: draw(tasks, 0, i, "train", QUICK_LEVELS), routes=True
        )
        groups = rollouts.collect(config.prompts)
    return [Graded(group.prompt, sample, 1.0, 1.0) for group in groups for sample in group.samples]


@torch.no_grad()
def flipped(model: Transformer, rollout: Rollout, replay: bool) -> int:
    """Tokens, over layers, whose experts in the trainer are others than in the engine; none in a dense model."""
    if rollout.routes_TLK is None:
        return 0
    b = rollout.batch
    with policy.replayed(model, [rollout] if replay else []):
        _, routes = model.body(model.embed(b.tokens_T), b.positions_T, rollout.attend)
    pairs = zip(routes, rollout.routes_TLK.unbind(1))
    return sum(differing(mine.experts_TK, theirs_TK) for mine, theirs_TK in pairs)


def differing(mine_TK: Tensor, theirs_TK: Tensor) -> int:
    return int((mine_TK.sort().values != theirs_TK.long().sort().values).any(-1).sum())


def report(name: str, found: list[Found]) -> None:
    rows = [f"{f.dtype}{' replayed' if f.replay else ''}" for f in found]
    show(
        ["engine to trainer", "mean |Δ log p|", "largest", "k3", "flips", "rows", "limit"],
        [[row, f.gap.mean, f.gap.most, f.gap.k3, f.flips, f.tokens, limit(f)] for row, f in zip(rows, found)],
    )
    emit(
        "mismatch",
        rows=rows,
        ratio=[f.judged / LIMITS[f.dtype] for f in found],
        ours=[f.judged for f in found],
        peer=[LIMITS[f.dtype] for f in found],
        spread=[None] * len(found),
        limit=[1.0] * len(found),
        measures=["mean |Δ log p|" if f.dtype == "float32" else "k3" for f in found],
        mean=[f.gap.mean for f in found],
        largest=[f.gap.most for f in found],
        k3=[f.gap.k3 for f in found],
        flips=[f.flips for f in found],
        tokens=[f.tokens for f in found],
        model=name,
        threads=THREADS,
    )


def limit(f: Found) -> str:
    return f"{'mean' if f.dtype == 'float32' else 'k3'} {LIMITS[f.dtype]:g}" + (", 0 flips" if f.replay else "")


if __name__ == "__main__":
    main()
