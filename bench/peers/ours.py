"""Shoal's own step as it trains: fp32 masters, clipping, router biases, balance loss and all, under `shoal.runtime`."""

import torch

from bench.peers.modules import nbytes
from bench.shape import BETAS, CONTEXT, LEARNING_RATE, ROWS, SHAPE, STEP_TOKENS, THREADS, WEIGHT_DECAY, batch
from shoal import runtime
from shoal.data.loader import Batch
from shoal.train.config import BatchConfig, OptimConfig, PretrainConfig
from shoal.train.step import TrainState, train_step

CONFIG = PretrainConfig(
    model=SHAPE,
    batch=BatchConfig(context=CONTEXT, samples=ROWS),
    optim=OptimConfig("adamw", LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], weight_decay=WEIGHT_DECAY),
    steps=1000,
    threads=THREADS,
)


def missing() -> None:
    return None


def build(variant: str) -> "OurTrainer":
    return OurTrainer()


class OurTrainer:
    def __init__(self):
        runtime.setup(THREADS, device="cpu")
        self.state = TrainState(CONFIG, "cpu")

    def step(self, number: int) -> dict[str, float]:
        rows = batch(number)
        tokens_T, targets_T = (torch.from_numpy(x.flatten()) for x in (rows[:, :-1], rows[:, 1:]))
        positions_T = torch.arange(CONTEXT).repeat(ROWS)
        packed = Batch(tokens_T, targets_T, positions_T, (CONTEXT,) * ROWS, n_bytes=0, ids=tuple(range(ROWS)))
        result = train_step(self.state, [packed])
        assert result.skipped is None, result.skipped
        return {"loss": result.loss}

    def parts(self) -> dict[str, int]:
        """As for the peers, gradients are as wide as the weights and freed after the update."""
        slots = self.state.optimizer.slots
        weights = nbytes(s.weight for s in slots)
        return {
            "weights": weights,
            "gradients": weights,
            "masters": nbytes(s.master for s in slots if s.weight.dtype != torch.float32),
            "moments": nbytes(m for s in slots for m in (s.first, s.second) if m is not None),
        }


assert CONFIG.batch.tokens == STEP_TOKENS
