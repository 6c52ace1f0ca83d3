"""Serving leaves: `Linear` and `Experts` whose weights stay in 8 or 4 bits, swapped in from outside.

The model's code doesn't change: `model.layers[0].attn.q_up` is another leaf, that's all. What is quantised and what
stays in high precision is policy.py's to say.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from shoal.ops import dispatch as ops
from shoal.ops import quant
from shoal.ops.quant import Quantised


class QuantisedLinear(nn.Module):
    """`Linear` with weights in few bits. They are no parameters: nothing trains them."""

    def __init__(self, weight: Quantised, bias: Tensor | None = None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        y = quant.linear(x, self.weight)
        return y if self.bias is None else y + self.bias


class QuantisedExperts(nn.Module):
    """`Experts` with weights in few bits, each expert's three matrices on their own, as checkpoints have them."""

    def __init__(self, gate: Sequence[Quantised], up: Sequence[Quantised], down: Sequence[Quantised]):
        super().__init__()
        self.gate, self.up, self.down = tuple(gate), tuple(up), tuple(down)

    def __len__(self) -> int:
        return len(self.down)

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        rows = zip(x_MD.split(counts_E.tolist()), self.gate, self.up, self.down, strict=True)
        made = [
            quant.linear(ops.swiglu(quant.linear(x, gate), quant.linear(x, up)), down)
            for x, gate, up, down in rows
            if len(x)
        ]
        return torch.cat(made) if made else x_MD
