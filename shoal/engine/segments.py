"""A native program whose experts come and go, run in pieces: as far as a mixture's choice, then its products for the
experts that are in memory while the others are read, then theirs as they come, and on to the next choice.

A product passes over experts that have no place, and writes each row of those that have; so a mixture's two products
may run as often as batches come. While the first batch is computed the next layer's choice is foretold: its own norm
and router on the residual stream as it is now.

Shapes: T rows, D model.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.engine.experts import Placed
from shoal.engine.offload import Offload, OffloadedExperts
from shoal.model.block import Block
from shoal.model.moe import MoE
from shoal.model.transformer import Transformer
from shoal.ops.program import Matrices, Program, Rows


class Segments:
    def __init__(self, model: Transformer, program: Program, x_TD: Tensor, looked_up: bool):
        """`x_TD`: the program's residual stream. `looked_up`: the program begins behind the embedding."""
        self.model, self.program, self.x_TD, self.looked_up = model, program, x_TD, looked_up
        blocks = [block for block in model.layers if isinstance(block, Block) and block.is_moe]
        self.blocks: Sequence[Block] = blocks
        assert len(blocks) == len(program.mixtures)
        experts = [block.ffn.experts for block in blocks if isinstance(block.ffn, MoE)]
        assert isinstance(experts[0], OffloadedExperts)
        self.offload: Offload = experts[0].offload

    def run(self, rows: Rows, n: int) -> None:
        """As `Program.run`, of instructions that end behind the last mixture. Raises StorageError."""
        if self.looked_up:
            self.x_TD[: len(rows.tokens)] = self.model.embed(torch.tensor(rows.tokens))
        first = 0
        for i, mixture in enumerate(self.program.mixtures):
            self.program.run(rows, mixture.routed, first)
            with self.offload.chosen(i, self.program.busy()) as batches:
                self._foretell(i + 1, len(rows.tokens))
                first = mixture.routed
                for batch in batches:
                    for e, matrices in batch:
                        place(mixture.experts, e, matrices)
                    self.program.run(rows, mixture.gated + 2, first, partly=True)
                    for e, _ in batch:
                        mixture.experts.clear(e)
                    first = mixture.gated
            first = mixture.gated + 2
        self.program.run(rows, n, first)

    def _foretell(self, mixture: int, T: int) -> None:
        if mixture < len(self.blocks):
            block = self.blocks[mixture]
            assert isinstance(block.ffn, MoE)
            chosen = block.ffn.router(block.ffn_norm(self.x_TD[:T])).experts_TK
            self.offload.foretell(mixture, set(chosen.flatten().tolist()))


def place(experts: Matrices, e: int, matrices: Placed) -> None:
    """As they were placed the last time, if there was one since they were read."""
    if matrices.kept is None:
        experts.place(e, *matrices)
        matrices.kept = experts.kept(e)
    else:
        experts.put(e, matrices.kept)
