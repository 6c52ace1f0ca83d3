"""A model walked through with one of its layers in memory at a time.

    h = embed(tokens)      for each layer: h = layer(h)      logits = head(norm(h))

So a model of any size is calibrated and judged in the memory of a layer and of the text's hidden states. The text are
windows of equal length, each a document of its own. Weights are those of a bf16 model, or the numbers that few bits
stand for; the arithmetic is fp32, so that what is seen is the weights' doing.

Shapes: W windows of T tokens, D model, R rows, V vocabulary.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.model import hf
from shoal.model.attend import Packed
from shoal.model.block import Block
from shoal.model.layers import Embedding
from shoal.model.rope import angles
from shoal.precision import weights

TOGETHER = 8192  # tokens that go through a layer at once


class Walk:
    """`folder` opened in the form it is stored in, or `wide`: with all matrices dequantised. Raises ModelError as
    `hf.load` does."""

    def __init__(self, folder: Path | str, wide: bool = False):
        self.model, self.stored = hf.opened(folder, torch.bfloat16)
        self.config = self.model.config
        self.pieces = list(hf.own_pieces(self.model))
        self._leaves = {} if wide else weights.leaves(self.model, self.stored)

    def read(self, name: str) -> nn.Module:
        """The module of that name, `layers.3` for example, with its weights."""
        module = deepcopy(self.model.get_submodule(name))
        for leaf, matrices in self._leaves.items():
            if leaf.startswith(f"{name}."):
                inside = leaf.removeprefix(f"{name}.")
                weights.replace_leaf(module, inside, [self.stored.quantised(piece) for piece in matrices])
        places = {key: torch.zeros(t.shape, dtype=t.dtype) for key, t in module.state_dict().items()}
        module.load_state_dict(places, assign=True)
        for piece in self.pieces:
            key = piece.ours.removeprefix(f"{name}.")
            if key != piece.ours and key in places:
                self.stored.copy(piece, piece.of(places[key]))
        return module.float()

    @torch.inference_mode()
    def embed(self, tokens_WT: Tensor) -> Tensor:
        embedding = self.read("embed")
        assert isinstance(embedding, Embedding)
        return embedding(tokens_WT)

    @torch.inference_mode()
    def through(self, block: nn.Module, h_WTD: Tensor) -> Tensor:
        assert isinstance(block, Block)
        T = h_WTD.shape[1]
        found = []
        for part in h_WTD.split(max(1, TOGETHER // T)):
            rope = angles(torch.arange(T).repeat(len(part)), self.config)
            found.append(block(part.flatten(0, 1), rope, Packed([T] * len(part)))[0].unflatten(0, (-1, T)))
        return torch.cat(found)

    @cached_property
    def head(self) -> Callable[[Tensor], Tensor]:
        """Rows behind the last norm [R, D] → logits [R, V]."""
        if "head" in self._leaves:
            return weights.QuantisedLinear(self.stored.quantised(self._leaves["head"][0]))
        name = "embed" if self.config.tie_embeddings else "head"
        return partial(F.linear, weight=self.read(name).get_parameter("weight"))
