"""The leaves that every block is made of.

`Linear` and `Experts` (moe.py) are the only modules that own weight matrices of a block. Precision is changed by
replacing these leaves from outside (FP8 for training, packed integers for serving), never by a flag inside them.

Shapes: T tokens, D model width, F hidden width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.ops import dispatch as ops


class Linear(nn.Module):
    """y = x Wᵀ (+ b) over the last dimension. `weight` is [out, in], as checkpoints store it."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Embedding(nn.Module):
    """Rows of `weight` [V, D]; also the output head's matrix where embeddings are tied."""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens_T: Tensor) -> Tensor:
        return F.embedding(tokens_T, self.weight)


class RMSNorm(nn.Module):
    """x / rms(x) · weight (arXiv 1910.07467). The weight stays fp32 whatever the compute dtype."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate x) · up x): the dense feed-forward layer, and the shared expert (arXiv 2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate, self.up, self.down = Linear(dim, hidden), Linear(dim, hidden), Linear(hidden, dim)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down(ops.swiglu(self.gate(x_TD), self.up(x_TD)))
