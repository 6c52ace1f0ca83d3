"""A start from pair statistics: embedding and head begin as the best low-rank table of which token follows which.

That table is the first thing a language model learns, and batches teach it slowly: each shows a few thousand noisy
pairs. Counted once over the whole text, every pair takes part in every update, and some tens of updates, each as dear
as the head of one training step, give what hundreds of steps give otherwise. When what writes into the residual stream
starts at zero (`init.out_std`), the model is this table, and the layers learn what pairs can't tell.

    logits[a, :] = head · rms_norm(embed[a])        cross-entropy against P(next | a), rows weighted by count^0.75

P is Kneser-Ney's: each count is lowered by a discount, and what that frees goes to tokens by how many different ones
they follow; without it the table learns the training text by heart (LOG.md). The first coordinate is the same for all
tokens, so that the head can hold there how frequent each token is; `offsets.py` needs it, too.

Shapes: V vocabulary, D model, R rows of a block.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.data.corpus import Split
from shoal.train.offsets import CONSTANT

MOST_PAIRS, WINDOWS = 2**24, 64  # of a longer text, evenly spread windows are counted
DISCOUNT = 0.75
WEIGHT_POWER = 0.75  # rare tokens take part more than by their share
EMBED_LR, HEAD_LR = 0.2, 0.02  # falling linearly to zero
BETAS = (0.8, 0.95)
BLOCK_LOGITS = 2**22  # at a time
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Pairs:
    """How often b follows a: pairs that occur, sorted by a. None crosses from one document into the next."""

    first: np.ndarray  # [pairs]
    second: np.ndarray  # [pairs]
    times: np.ndarray  # [pairs]

    @classmethod
    def count(cls, split: Split, vocab_size: int) -> "Pairs":
        n = len(split.tokens)
        windows = 1 if n <= MOST_PAIRS else WINDOWS
        width = min(n, MOST_PAIRS) // windows
        starts = np.linspace(0, n - width, windows).astype(np.int64)
        codes = np.concatenate([window(split, start, start + width + 1, vocab_size) for start in starts])
        codes, times = np.unique(codes, return_counts=True)
        return cls(codes // vocab_size, codes % vocab_size, times)


def window(split: Split, begin: int, end: int, vocab_size: int) -> np.ndarray:
    """The pairs of tokens begin … end - 1, each as one number, first · V + second."""
    tokens = split.tokens[begin:end].astype(np.int64)
    starts = split.doc_starts[(split.doc_starts > begin) & (split.doc_starts < begin + len(tokens))]
    return np.delete(tokens[:-1] * vocab_size + tokens[1:], starts - begin - 1)


class Targets:
    """P(next | a) for blocks of rows a, and how much each row weighs."""

    def __init__(self, pairs: Pairs, vocab_size: int, device: torch.device = CPU):
        def placed(x: np.ndarray) -> Tensor:
            return torch.from_numpy(x).float().to(device)

        V, self.pairs = vocab_size, pairs
        totals = np.bincount(pairs.first, pairs.times, V)
        followed = np.bincount(pairs.second, minlength=V) + 1e-3  # by so many different tokens; never quite nothing
        kinds = np.bincount(pairs.first, minlength=V)
        weights = totals**WEIGHT_POWER
        self.rows = np.searchsorted(pairs.first, np.arange(V + 1))
        self.share = placed((pairs.times - DISCOUNT) / totals[pairs.first])
        self.base_V = placed(followed / followed.sum())
        self.freed_V = placed(np.where(totals > 0, DISCOUNT * kinds / np.maximum(totals, 1), 1.0))
        self.weights_V = placed(weights / weights.sum())

    def block(self, begin: int, end: int) -> Tensor:
        """[R, V], every row summing to one."""
        here = slice(self.rows[begin], self.rows[end])
        first, column = (torch.from_numpy(x[here]).to(self.share.device) for x in (self.pairs.first, self.pairs.second))
        p_RV = torch.outer(self.freed_V[begin:end], self.base_V)
        return p_RV.index_put_((first - begin, column), self.share[here], accumulate=True)


def fit(
    split: Split, vocab_size: int, dim: int, steps: int, seed: int, device: torch.device = CPU
) -> tuple[Tensor, Tensor]:
    """(embedding with rows of root mean square one, head), both fp32 [V, D], after `steps` updates.

    It costs about `steps` times the head's part of a training step of V tokens, and memory for the pairs.
    """
    V, targets = vocab_size, Targets(Pairs.count(split, vocab_size), vocab_size, device)
    generator = torch.Generator().manual_seed(seed)
    rest_VD = torch.randn(V, dim - 1, generator=generator).to(device)  # all coordinates but the constant one
    blocks = [x.clone().requires_grad_() for x in rest_VD.split(max(1, BLOCK_LOGITS // V))]
    head_VD = torch.zeros(V, dim, device=device).requires_grad_()
    groups = [{"params": blocks, "lr": EMBED_LR}, {"params": [head_VD], "lr": HEAD_LR}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, (EMBED_LR, HEAD_LR), strict=True):
            group["lr"] = lr * (1 - step / steps)
        begin = 0
        for rest_RD in blocks:
            block_loss(rest_RD, head_VD, targets, begin).backward()
            begin += len(rest_RD)
        optimizer.step()
        optimizer.zero_grad()
    return normed(torch.cat(blocks).detach()), head_VD.detach()


def normed(rest_RD: Tensor) -> Tensor:
    """The constant in front of the other coordinates, scaled to a root mean square of one in all."""
    D = rest_RD.shape[1] + 1
    rest_RD = F.rms_norm(rest_RD, (D - 1,)) * ((D - CONSTANT**2) / (D - 1)) ** 0.5
    return F.pad(rest_RD, (1, 0), value=CONSTANT)


def block_loss(rest_RD: Tensor, head_VD: Tensor, targets: Targets, begin: int) -> Tensor:
    """The share of the cross-entropy, in nats, of the rows from `begin` on."""
    end = begin + len(rest_RD)
    logits_RV = F.linear(normed(rest_RD).bfloat16(), head_VD.bfloat16()).float()
    each_R = torch.logsumexp(logits_RV, -1) - (targets.block(begin, end) * logits_RV).sum(-1)
    return targets.weights_V[begin:end] @ each_R
