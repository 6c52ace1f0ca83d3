"""Next-token and multi-token loss, without logits ever standing whole in memory.

The head's product, the cross-entropy and both gradients are taken chunk by chunk in the forward pass: the logits of a
chunk become their own gradient, are multiplied back into hidden state and head, and are gone. `F.cross_entropy` on
whole logits would hold T · V numbers three times over (4,096 tokens of V3's vocabulary: 6 GB in fp32).

Multi-token prediction (V3, section 2.2): loss = L_main + λ/depth · Σ_k L_k, module k predicting k further tokens ahead.

Shapes: T tokens, D model, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from shoal.data.loader import Batch
from shoal.model.attend import Attend, Packed
from shoal.model.moe import Routes
from shoal.model.transformer import Transformer
from shoal.ops import dispatch as ops

CHUNK_BYTES = 64 << 20  # of logits at a time,
CACHED_BYTES = 8 << 20  # and on a CPU, where they stay in its cache
UNPREDICTED = -100

Runner = Callable[..., tuple[Tensor, Routes | None]]  # runs a layer on its arguments, recomputing it for example
Main = Callable[[Batch, Tensor, Tensor, int], Tensor]  # (batch, h_TD, head's weight_VD, the step's targets) → loss


class _LinearCrossEntropy(torch.autograd.Function):
    """scale · Σ_t −log softmax(W h_t)[y_t], fp32. `targets_T` below 0 count nothing."""

    @staticmethod
    def forward(ctx, h_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, scale: float) -> Tensor:
        dh_TD, dweight_VD = torch.empty_like(h_TD), torch.zeros_like(weight_VD, dtype=torch.float32)
        loss = torch.zeros((), dtype=torch.float32, device=h_TD.device)
        for rows in chunks(len(h_TD), weight_VD):
            h = h_TD[rows]
            logits = h @ weight_VD.t()
            loss += ops.cross_entropy_(logits, targets_T[rows], scale).sum()
            torch.mm(logits, weight_VD, out=dh_TD[rows])
            dweight_VD += logits.t() @ h
        ctx.save_for_backward(dh_TD, dweight_VD.type_as(weight_VD))
        return loss * scale

    @staticmethod
    def backward(ctx, upstream: Tensor):
        dh_TD, dweight_VD = ctx.saved_tensors
        factor = upstream.item()
        return (dh_TD, dweight_VD, None, None) if factor == 1 else (dh_TD * factor, dweight_VD * factor, None, None)


def chunks(T: int, weight_VD: Tensor, most: int | None = None) -> list[slice]:
    """Equal slices of T rows, each with at most `most` bytes of logits, or as many as suit the device."""
    most = most or (CACHED_BYTES if weight_VD.device.type == "cpu" else CHUNK_BYTES)
    n = max(1, -(-T * len(weight_VD) * weight_VD.element_size() // most))
    size = -(-T // n)
    return [slice(start, min(start + size, T)) for start in range(0, T, size)]


def linear_cross_entropy(h_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, scale: float) -> Tensor:
    return _LinearCrossEntropy.apply(h_TD, weight_VD, targets_T, scale)  # type: ignore[return-value]


def next_token(batch: Batch, h_TD: Tensor, weight_VD: Tensor, n_targets: int) -> Tensor:
    """The main loss of pretraining and fine-tuning: −log p of each target, a mean over the step's."""
    return linear_cross_entropy(h_TD, weight_VD, batch.targets_T, 1 / n_targets)


def further(targets_T: Tensor, positions_T: Tensor, k: int) -> Tensor:
    """Targets k further ahead: of the token at i + k, where that is still in i's segment."""
    ahead = torch.full_like(targets_T, UNPREDICTED)
    same = positions_T[k:] == positions_T[:-k] + k
    ahead[:-k] = torch.where(same, targets_T[k:], UNPREDICTED)
    return ahead


@dataclass(frozen=True)
class Losses:
    """`total` is what to differentiate; the others are means a token (nats), detached."""

    total: Tensor
    main: Tensor
    mtp: Tensor | None
    routes: list[Routes]


def losses(
    model: Transformer,
    batch: Batch,
    attend: Attend,
    n_targets: int,
    mtp_weight: float,
    balance_alpha: float,
    context: int,
    run: Runner | None = None,
    main_loss: Main = next_token,
) -> Losses:
    """The loss of one micro-batch; it is a part of a step of `n_targets` targets.

    `balance_alpha` is for this part: α times its share of the step's tokens. `run` runs layers and modules (see body).
    `main_loss` may be another than the next token's; the multi-token modules learn the batch's targets all the same.
    """
    embedded_TD = model.embed(batch.tokens_T)
    h_TD, routes = model.body(embedded_TD, batch.positions_T, attend, run)
    main = main_loss(batch, h_TD, model.head.weight, n_targets)
    total, mtp = main, None
    if mtp_weight and len(model.mtp):
        parts, weight = [], mtp_weight / len(model.mtp)
        for k, module in enumerate(model.mtp, start=1):
            words = h_TD, shifted(embedded_TD, k), batch.positions_T, attend
            h_TD, chosen = run(module, *words) if run else module(*words)
            routes = routes + ([chosen] if chosen else [])
            targets_T = further(batch.targets_T, batch.positions_T, k)
            parts.append(linear_cross_entropy(h_TD, model.head.weight, targets_T, weight / n_targets))
        weighted = torch.stack(parts).sum()
        total, mtp = total + weighted, weighted.detach() / mtp_weight
    if balance_alpha and routes:
        total = total + balance_alpha * torch.stack([sequence_balance(r, context) for r in routes]).sum()
    return Losses(total, main.detach(), mtp, routes)


def shifted(embedded_TD: Tensor, k: int) -> Tensor:
    """Row i holds the embedding of token i + k; the last k rows, which predict nothing, wrap around."""
    return embedded_TD.roll(-k, 0)


def sequence_balance(routes: Routes, context: int) -> Tensor:
    """Σ_e f_e P_e of each sequence, averaged (V3, equations 17–20): f the share of tokens · E/K, P the mean score."""
    T, E = routes.scores_TE.shape
    K = routes.experts_TK.shape[1]
    chosen_TE = torch.zeros_like(routes.scores_TE).scatter_(1, routes.experts_TK, 1.0)
    score_TE = routes.scores_TE / routes.scores_TE.sum(-1, keepdim=True)
    f_SE, p_SE = (x.view(T // context, context, E).mean(1) for x in (chosen_TE, score_TE))
    return (f_SE * E / K * p_SE).sum(-1).mean()


@dataclass
class Score:
    """Sums over held-out text; `bits_per_byte` and `mtp_accept` are what to report."""

    nats: float = 0.0
    n_bytes: int = 0
    n_targets: int = 0
    agreed: int = 0
    drafted: int = 0

    @property
    def bits_per_byte(self) -> float:
        return self.nats / log(2) / max(self.n_bytes, 1)

    @property
    def mtp_accept(self) -> float | None:
        """Share of second tokens that greedy speculative decoding would accept: the model's own choice, guessed."""
        return self.agreed / self.drafted if self.drafted else None


@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[Batch], attend_of: Callable[[Sequence[int]], Packed]) -> Score:
    """Score held-out `batches`; `attend_of(lengths)` makes the attention."""
    score = Score()
    for batch in (b.to(model.embed.weight.device) for b in batches):
        attend = attend_of(batch.lengths)
        embedded_TD = model.embed(batch.tokens_T)
        h_TD, _ = model.body(embedded_TD, batch.positions_T, attend)
        nll_T, best_T = scored(h_TD, model.head.weight, batch.targets_T)
        score.nats += nll_T.sum(dtype=torch.float64).item()
        score.n_bytes += batch.n_bytes
        score.n_targets += int((batch.targets_T >= 0).sum())
        if len(model.mtp):
            h_TD, _ = model.mtp[0](h_TD, shifted(embedded_TD, 1), batch.positions_T, attend)
            targets_T = further(batch.targets_T, batch.positions_T, 1)
            _, guess_T = scored(h_TD, model.head.weight, targets_T)
            drafted_T = targets_T[:-1] >= 0
            score.drafted += int(drafted_T.sum())
            score.agreed += int((drafted_T & (guess_T[:-1] == best_T[1:])).sum())
    return score


def scored(h_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor]:
    """−log p of each target (fp32, 0 where there is none) and the likeliest token."""
    nll, best = [], []
    for rows in chunks(len(h_TD), weight_VD):
        logits = h_TD[rows] @ weight_VD.t()
        best.append(logits.argmax(-1))
        nll.append(ops.cross_entropy_(logits, targets_T[rows], 1.0))
    return torch.cat(nll), torch.cat(best)
