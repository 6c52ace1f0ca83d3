"""Balance without an auxiliary loss (DeepSeek-V3, section 2.1.2): after each step the bias of every router moves by γ,
up for experts that got less than their share and down for those that got more. The bias steers selection only.

Shapes: T tokens, E experts, K chosen, L mixture layers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.model.moe import Router, Routes
from shoal.model.transformer import Transformer


def loads(routes: Sequence[Routes]) -> Tensor:
    """Tokens that each expert of each mixture layer got: [L, E], int64."""
    return torch.stack([torch.bincount(r.experts_TK.flatten(), minlength=r.scores_TE.shape[1]) for r in routes])


def routers(model: Transformer) -> list[Router]:
    """In the order in which routes come out: layers, then multi-token modules."""
    return [m for m in model.modules() if isinstance(m, Router)]


@torch.no_grad()
def move_biases(model: Transformer, loads_LE: Tensor, speed: float) -> None:
    """Resting multi-token modules have no loads and come last, so their routers stay as they are."""
    for router, load_E in zip(routers(model), loads_LE, strict=False):
        if router.config.scoring == "sigmoid":
            router.bias += speed * torch.sign(load_E.float().mean() - load_E)


def max_over_mean(loads_LE: Tensor) -> float:
    """How much busier the busiest expert of a layer is than the average one, averaged over layers; 1 is perfect."""
    return (loads_LE.amax(1) / loads_LE.float().mean(1)).mean().item()
