"""What attends to what. A model hands its projections to an `Attend`; it never knows which.

`Packed` trains: documents lie end to end, each token sees the earlier tokens of its own segment, keys are rebuilt by
*calling* the up-projection, so gradients and 8-bit leaves apply. `Absorbed` is the arithmetic that decoding from a
cache rests on: W_up is folded into query and output, so scores and sums stay in the latent (C + R numbers a token).
Both give the same result; a test says so.

Shapes: T tokens, H heads, G key-value heads, K query dims, N nope, R rope, V value dims, C latent.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shoal.model.layers import Linear
from shoal.ops import dispatch as ops


class Attend(Protocol):
    """The seam. `layer` is for those that keep something of each layer, a cache for example."""

    def latent(
        self,
        layer: int,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        c_TC: Tensor,
        k_rope_TR: Tensor,
        up: Linear,
        scale: float,
    ) -> Tensor:
        """softmax(scale · (q_nope · k_nope + q_rope · k_rope)) v [T, H, V], where every head's k_nope, v = up(c)."""
        ...

    def heads(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, scale: float) -> Tensor:
        """softmax(scale · q kᵀ) v [T, H, V], each of G key-value heads serving H / G query heads."""
        ...


class Packed:
    """Dense causal attention inside each segment. `lengths` sum to T."""

    def __init__(self, lengths: Sequence[int]):
        self.lengths = tuple(lengths)

    def latent(
        self,
        layer: int,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        c_TC: Tensor,
        k_rope_TR: Tensor,
        up: Linear,
        scale: float,
    ) -> Tensor:
        H, N = q_nope_THN.shape[1:]
        both = up(c_TC).unflatten(-1, (H, -1))
        k_nope_THN, v_THV = both.split([N, both.shape[-1] - N], dim=-1)
        k_rope_THR = k_rope_TR[:, None].expand(-1, H, -1)
        q_THK = torch.cat([q_nope_THN, q_rope_THR], -1)
        k_THK = torch.cat([k_nope_THN, k_rope_THR], -1)
        return self.heads(layer, q_THK, k_THK, v_THV, scale)

    def heads(self, layer: int, q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, scale: float) -> Tensor:
        return ops.causal_attention(q_THK, k_TGK, v_TGV, self.lengths, scale)


class Absorbed(Packed):
    """Scores in the latent: (W_upᵀ q) · c + q_rope · k_rope. The slow twin of attention over a latent cache."""

    def latent(
        self,
        layer: int,
        q_nope_THN: Tensor,
        q_rope_THR: Tensor,
        c_TC: Tensor,
        k_rope_TR: Tensor,
        up: Linear,
        scale: float,
    ) -> Tensor:
        H, N = q_nope_THN.shape[1:]
        up_k_HNC, up_v_HVC = up.weight.unflatten(0, (H, -1)).tensor_split([N], dim=1)
        q_THC = torch.einsum("thn,hnc->thc", q_nope_THN, up_k_HNC)
        scores_HTS = torch.einsum("thc,sc->hts", q_THC, c_TC) + torch.einsum("thr,sr->hts", q_rope_THR, k_rope_TR)
        seen_TS = torch.block_diag(*(torch.ones(n, n, device=c_TC.device) for n in self.lengths)).tril().bool()
        p_HTS = (scores_HTS * scale).masked_fill(~seen_TS, -torch.inf).softmax(-1, dtype=torch.float32).type_as(c_TC)
        o_THC = torch.einsum("hts,sc->thc", p_HTS, c_TC)
        return torch.einsum("thc,hvc->thv", o_THC, up_v_HVC)
