"""What training any plain torch module with torch's own AdamW has in common: the peers' inner loop."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.shape import BETAS, LEARNING_RATE, WEIGHT_DECAY, batch


class ModuleTrainer:
    """`loss(rows)` takes int64 [rows, context + 1]. AdamW is fused, on the weights as they stand: no fp32 masters.

    Nothing is clipped or scheduled: whatever Shoal's step does beyond this is work the peer is spared.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Tensor], Tensor]):
        self.model, self.loss = model.train(), loss
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
        )

    def step(self, number: int) -> dict[str, float]:
        loss = self.loss(torch.from_numpy(batch(number)))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {"loss": loss.item()}

    def parts(self) -> dict[str, int]:
        weights = list(self.model.parameters())
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        return {
            "weights": nbytes(weights),
            "gradients": nbytes(weights),  # as wide as the weights, freed after the update
            "masters": 0,
            "moments": nbytes(state),
        }


def nbytes(tensors) -> int:
    return sum(t.nbytes for t in tensors)
