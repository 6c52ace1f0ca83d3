"""A native program whose experts come and go, run in pieces: as far as a mixture's choice, then its products for the
experts that are in memory while the others are read, then theirs as they come, and on to the next choice.

A product passes over experts that have no place, and writes each row of those that have; so a mixture's two products
may run as often as batches come. Each choice but the last leaves, beside it, what the next one will probably be
(`write_foretold` in native.py).

Shapes: T rows, D model, A chosen.
"""

import torch
from torch import Tensor

from shoal.engine.experts import Placed
from shoal.engine.offload import Offload, OffloadedExperts
from shoal.model.moe import MoE
from shoal.model.transformer import Transformer
from shoal.ops.program import Matrices, Program, Rows

FORETOLD = "foretold"  # the buffer [T, A] in which the next mixture's experts are


class Segments:
    def __init__(self, model: Transformer, program: Program, x_TD: Tensor, looked_up: bool):
        """`x_TD`: the program's residual stream. `looked_up`: the program begins behind the embedding."""
        assert model.config.moe
        self.model, self.program, self.x_TD, self.looked_up = model, program, x_TD, looked_up
        mixtures = [block.get_submodule("ffn") for block in model.layers]
        experts = [ffn.experts for ffn in mixtures if isinstance(ffn, MoE)]
        assert len(experts) == len(program.mixtures) and isinstance(experts[0], OffloadedExperts)
        self.offload: Offload = experts[0].offload
        self.foretold_TA = program.rows(FORETOLD, model.config.moe.n_activated, torch.int16)

    def run(self, rows: Rows, n: int) -> None:
        """As `Program.run`, of instructions that end behind the last mixture. Raises StorageError."""
        if self.looked_up:
            self.x_TD[: len(rows.tokens)] = self.model.embed(torch.tensor(rows.tokens))
        first = 0
        for i, mixture in enumerate(self.program.mixtures):
            self.program.run(rows, mixture.routed, first)
            with self.offload.chosen(i, self.program.busy()) as batches:
                if i + 1 < len(self.program.mixtures):
                    self.offload.foretell(i + 1, set(self.foretold_TA[: len(rows.tokens)].flatten().tolist()))
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


def place(experts: Matrices, e: int, matrices: Placed) -> None:
    """As they were placed the last time, if there was one since they were read."""
    if matrices.kept is None:
        experts.place(e, *matrices)
        matrices.kept = experts.kept(e)
    else:
        experts.put(e, matrices.kept)
