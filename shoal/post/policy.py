"""The policy's side of reinforcement learning: graded answers to batches, log-probabilities with a gradient.

    groups → advantages → batches (answers packed end to end, prompts are read, not predicted) → train_step

Answers to one prompt share it in a batch: it is computed once, and they branch off from it (`Branching`).

`log_probs` takes log π of the tokens drawn a chunk of logits at a time, in the weights' type, as the engine does: what
bf16 rounds, it rounds on both sides alike.

Shapes: T tokens of a batch, N completion tokens in it, S answers in it, D model, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shoal.data.loader import UNPREDICTED, Batch
from shoal.model.attend import Packed
from shoal.model.moe import MoE, Replayed
from shoal.model.transformer import Transformer
from shoal.ops import dispatch as ops
from shoal.post import grpo
from shoal.post.rl_config import PolicyConfig
from shoal.post.rollout import Sample
from shoal.train.loss import CHUNK_BYTES, chunks

ROUND = 256  # batches are filled up to a multiple: kernels meet few shapes, balance is judged over so many tokens


class Graded(NamedTuple):
    """A graded sample. `weight` is what each of its tokens counts in the step's loss."""

    prompt: tuple[int, ...]
    sample: Sample
    advantage: float
    weight: float


class Branching(Packed):
    """Segments that begin alike and lie there once."""

    def __init__(self, branches: ops.Branches):
        super().__init__(branches.lengths)
        self.branches = branches

    def heads(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, scale: float) -> Tensor:
        return ops.branching_attention(q_THK, k_TGK, v_TGV, self.branches, scale)


@dataclass(frozen=True)
class Rollout:
    """A batch of answers with what the loss needs of each token. `routes_TLK`: experts to take again."""

    batch: Batch
    attend: Branching
    lengths_S: Tensor  # completion tokens of each answer
    engine_N: Tensor  # log-probabilities by the weights that drew them
    fresh_N: Tensor  # bool: drawn by the weights as they are now
    advantage_N: Tensor
    weight_N: Tensor
    routes_TLK: Tensor | None


class _LogProbs(torch.autograd.Function):
    """log softmax(W h)[y] of each row, fp32. Logits become their own gradient; if one chunk is all, it is kept."""

    @staticmethod
    def forward(ctx, h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        parts = chunks(len(h_ND), weight_VD, CHUNK_BYTES)
        if len(parts) == 1:
            nll_N, slope_NV = surprise(h_ND, weight_VD, targets_N)
            ctx.save_for_backward(h_ND, weight_VD, targets_N, slope_NV)
            return -nll_N
        ctx.save_for_backward(h_ND, weight_VD, targets_N)
        return -torch.cat([surprise(h_ND[rows], weight_VD, targets_N[rows])[0] for rows in parts])

    @staticmethod
    def backward(ctx, grad_N: Tensor):
        h_ND, weight_VD, targets_N, *slopes = ctx.saved_tensors
        weight_N1 = -grad_N[:, None]
        dh_ND, weighed_ND = torch.empty_like(h_ND), (h_ND * weight_N1).to(h_ND.dtype)
        dweight_VD = torch.zeros_like(weight_VD)
        for rows in chunks(len(h_ND), weight_VD, CHUNK_BYTES):
            slope_NV = slopes[0] if slopes else surprise(h_ND[rows], weight_VD, targets_N[rows])[1]
            torch.mm(slope_NV, weight_VD, out=dh_ND[rows])
            dweight_VD.addmm_(slope_NV.t(), weighed_ND[rows])
        return (dh_ND * weight_N1).to(h_ND.dtype), dweight_VD, None


def surprise(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """−log π of each target, fp32 [N], and its slope on the logits, softmax − one-hot [N, V]."""
    logits_NV = h_ND @ weight_VD.t()
    return ops.cross_entropy_(logits_NV, targets_N, 1.0), logits_NV


def log_probs(h_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """log π of `targets_N` by the head on hidden states: fp32 [N]."""
    return _LogProbs.apply(h_ND, weight_VD, targets_N)  # type: ignore[return-value]


def packed(answers: Sequence[Graded], version: int, most_tokens: int) -> Iterator[Rollout]:
    """Answers in batches of at most `most_tokens`, in their order; a longer one has a batch of its own."""
    part: list[Graded] = []
    used = 0
    for answer in answers:
        before, own = len(answer.prompt) - 1, len(answer.sample.tokens)
        n = own if part and part[-1].prompt == answer.prompt else before + own
        if part and used + n > most_tokens:
            yield batched(part, version)
            part, used, n = [], 0, before + own
        part.append(answer)
        used += n
    if part:
        yield batched(part, version)


class Layout:
    """A batch's rows as they are laid down in stretches of `lengths`; a segment is the stretches of one text."""

    def __init__(self):
        self.tokens: list[int] = []
        self.targets: list[int] = []
        self.positions: list[int] = []
        self.lengths: list[int] = []
        self.segments: list[list[range]] = []

    def lay(self, tokens: Sequence[int], targets: Sequence[int], position: int) -> range:
        start = len(self.tokens)
        self.tokens += tokens
        self.targets += targets
        self.positions += range(position, position + len(tokens))
        self.lengths.append(len(tokens))
        return range(start, len(self.tokens))

    def fill(self, texts: Sequence[Sequence[int]], n: int) -> None:
        """`n` further rows: the texts once more, each by itself, the last one cut off.

        They predict nothing; experts so see tokens of the kind they are for, which a run of padding would not be.
        """
        for text in cycle(texts):
            if not n:
                break
            part = text[:n]
            self.segments.append([self.lay(part, [UNPREDICTED] * len(part), 0)])
            n -= len(part)

    def attend(self) -> Branching:
        return Branching(ops.Branches.of(self.segments))


def batched(answers: Sequence[Graded], version: int) -> Rollout:
    """A prompt's last token belongs to each answer, whose first token it predicts; those before it are shared."""
    layout = Layout()
    for prompt, its in groupby(answers, lambda a: a.prompt):
        shared = layout.lay(prompt[:-1], [UNPREDICTED] * (len(prompt) - 1), 0)
        for a in its:
            own = layout.lay([prompt[-1], *a.sample.tokens[:-1]], a.sample.tokens, len(shared))
            layout.segments.append([shared, own])
    layout.fill([(*a.prompt, *a.sample.tokens[:-1]) for a in answers], -len(layout.tokens) % ROUND)
    batch = Batch(
        torch.tensor(layout.tokens), torch.tensor(layout.targets), torch.tensor(layout.positions),
        tuple(layout.lengths), 0, tuple(a.sample.seed for a in answers),
    )  # fmt: skip
    attend, n_S = layout.attend(), [len(a.sample.tokens) for a in answers]
    stamps = torch.tensor([v for a in answers for v in a.sample.versions])
    return Rollout(
        batch,
        attend,
        torch.tensor(n_S),
        torch.tensor([p for a in answers for p in a.sample.logprobs]),
        stamps == version,
        torch.from_numpy(np.repeat(np.array([a.advantage for a in answers], np.float32), n_S)),
        torch.from_numpy(np.repeat(np.array([a.weight for a in answers], np.float32), n_S)),
        _routes(answers, attend),
    )


def _routes(answers: Sequence[Graded], attend: Branching) -> Tensor | None:
    """Experts of each row, what fills the batch up included; None where any answer lacks them."""
    known = [a.sample.routes_TLK for a in answers]
    parts = [routes[:n] for routes, n in zip(cycle(known), attend.lengths) if routes is not None]
    return torch.cat(parts)[attend.branches.first_T] if len(parts) == len(attend.lengths) else None


@torch.no_grad()
def scored(model: Transformer, rollout: Rollout, replay: bool = False) -> Tensor:
    """log π of a batch's completion tokens as the trainer sees them: fp32 [N]."""
    b = rollout.batch
    with replayed(model, [rollout] if replay else []):
        h_TD, _ = model.body(model.embed(b.tokens_T), b.positions_T, rollout.attend)
    drawn_T = b.targets_T >= 0
    return log_probs(h_TD[drawn_T], model.head.weight, b.targets_T[drawn_T])


@contextmanager
def replayed(model: Transformer, rollouts: Sequence[Rollout]) -> Iterator[list[Replayed]]:
    """Routers of the layers take the engine's experts, one batch after the other; their own where those are unknown."""
    if any(r.routes_TLK is None for r in rollouts) or not rollouts:
        yield []
        return
    mixtures = [layer.ffn for layer in model.layers if isinstance(layer.ffn, MoE)]
    routers = [moe.router for moe in mixtures]
    routes = [[r.routes_TLK[:, i] for r in rollouts if r.routes_TLK is not None] for i in range(len(mixtures))]
    stand_ins = [Replayed(router, its) for router, its in zip(routers, routes, strict=True)]
    try:
        for moe, stand_in in zip(mixtures, stand_ins):
            moe.register_module("router", stand_in)
        yield stand_ins
    finally:
        for moe, router in zip(mixtures, routers):
            moe.register_module("router", router)


class Objective:
    """The main loss of `train_step` for these batches, and what it found on the way.

    `old` are the log-probabilities of the weights that a step begins with, `references` those of the reference; None
    where there was no update since, or no reference.
    """

    def __init__(
        self,
        config: PolicyConfig,
        rollouts: Sequence[Rollout],
        old: Sequence[Tensor | None],
        references: Sequence[Tensor | None],
    ):
        self.config = config
        self.known = {r.batch.ids: (r, o, ref) for r, o, ref in zip(rollouts, old, references, strict=True)}
        self.found: list[tuple[grpo.Surrogate, Tensor, Rollout]] = []
        self.flips = 0  # tokens whose experts the trainer would have chosen otherwise, over layers

    @property
    def batches(self) -> list[Batch]:
        return [rollout.batch for rollout, _, _ in self.known.values()]

    def attend(self, batch: Batch) -> Branching:
        return self.known[batch.ids][0].attend

    def __call__(self, batch: Batch, h_TD: Tensor, weight_VD: Tensor, n_targets: int) -> Tensor:
        c = self.config
        rollout, old_N, reference_N = self.known[batch.ids]
        drawn_T = batch.targets_T >= 0
        logp_N = log_probs(h_TD[drawn_T], weight_VD, batch.targets_T[drawn_T])
        now_N = logp_N.detach()
        result = grpo.surrogate(
            grpo.VARIANTS[c.variant], logp_N, now_N if old_N is None else old_N, rollout.engine_N,
            rollout.advantage_N, rollout.weight_N, rollout.lengths_S, c.importance, reference_N, c.kl_weight,
        )  # fmt: skip
        self.found.append((result, now_N, rollout))
        return result.loss

    def gap(self) -> grpo.Gap | None:
        """On tokens that the weights as they were before this update drew; None where there are none."""
        pairs = [(now_N[r.fresh_N], r.engine_N[r.fresh_N]) for _, now_N, r in self.found]
        trainer_N, engine_N = (torch.cat(column) for column in zip(*pairs))
        return grpo.Gap.between(trainer_N, engine_N) if len(trainer_N) else None

    def ratios(self) -> dict[int, list[float]]:
        """π / π_engine of each answer's tokens, by the answer's seed."""
        found = {}
        for _, now_N, r in self.found:
            parts = (now_N - r.engine_N).exp().split(r.lengths_S.tolist())
            found |= {seed: part.tolist() for seed, part in zip(r.batch.ids, parts, strict=True)}
        return found
