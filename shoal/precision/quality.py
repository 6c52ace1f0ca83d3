"""What few bits cost: a folder against the one that it was made from, on text that neither was made with.

Both are walked through side by side, a layer of each in memory at a time (layers.py), the reference with its weights in
bf16. Counted are bits per byte of the text, the divergence KL(p ‖ q) of the distributions over the next token (p the
reference's), and how often both think the same token likeliest.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.errors import ModelError
from shoal.precision.layers import Walk

HEAD_ROWS = 512  # logits of so many tokens stand in memory at once


@dataclass(frozen=True)
class Quality:
    """`kl` in bits a token; `agreement` a share of tokens."""

    tokens: int
    text_bytes: int
    bits_per_byte: float
    reference_bits_per_byte: float
    kl: float
    agreement: float

    @property
    def loss(self) -> float:
        """How much more bits a byte takes, as a share."""
        return self.bits_per_byte / self.reference_bits_per_byte - 1


@torch.inference_mode()
def compare(folder: Path | str, reference: Path | str, tokens_WT: Tensor, n_bytes: int) -> Quality:
    """`tokens_WT` are windows of a text, each judged from its second token on; those spell `n_bytes`."""
    walks = [Walk(reference), Walk(folder)]
    if walks[0].config != walks[1].config:
        raise ModelError(
            f"{folder} and {reference} differ in more than bits", "one made from the other", "compare those"
        )
    states = [walk.embed(tokens_WT) for walk in walks]
    for i in range(walks[0].config.n_layers):
        states = [walk.through(walk.read(f"layers.{i}"), h) for walk, h in zip(walks, states, strict=True)]
    rows = [walk.read("norm")(h[:, :-1]).flatten(0, 1) for walk, h in zip(walks, states, strict=True)]
    nll, other, kl, agreed = 0.0, 0.0, 0.0, 0
    targets = tokens_WT[:, 1:].flatten()
    for h, g, next_R in zip(rows[0].split(HEAD_ROWS), rows[1].split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        p, q = (walk.head(x).log_softmax(-1) for walk, x in zip(walks, (h, g), strict=True))
        nll += F.nll_loss(p, next_R, reduction="sum").item()
        other += F.nll_loss(q, next_R, reduction="sum").item()
        kl += F.kl_div(q, p, log_target=True, reduction="sum").item()
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    bits = math.log(2)
    n = len(targets)
    return Quality(n, n_bytes, other / bits / n_bytes, nll / bits / n_bytes, kl / bits / n, agreed / n)
