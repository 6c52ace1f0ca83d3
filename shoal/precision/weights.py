"""Serving leaves: `Linear` and `Experts` whose weights stay in 8 or 4 bits, swapped in from outside.

The model's code doesn't change: `model.layers[0].attn.q_up` is another leaf, that's all. `load` opens a folder in the
form it is stored in: what is in few bits is not converted. Where it takes at most half of the memory that is free, it
is read onto large pages, from which tokens are made faster (int4: by a seventh, LOG.md). Where it takes more, it is
used in the mapped files: the system reads it when it is first used and may let go of it again. Dequantised are what is
no leaf (embedding, norms, routers) and the up-projection of the latents, which decoding folds into queries.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from shoal import runtime
from shoal.model import hf
from shoal.model.gguf_file import GGUFFile
from shoal.model.hf import Tensors
from shoal.model.hf_files import TensorFolder
from shoal.model.hf_names import Piece
from shoal.model.layers import Linear
from shoal.model.moe import Experts
from shoal.model.transformer import Transformer
from shoal.ops import cpu
from shoal.ops import dispatch as ops
from shoal.ops.quant import Quantised

ABSORBED = "attn.kv_up"
CHUNK = 64 << 20  # bytes of large pages that are taken at a time
LINE = 64  # bytes, of the processor's cache


class QuantisedLinear(nn.Module):
    """`Linear` with weights in few bits. They are no parameters: nothing trains them."""

    def __init__(self, weight: Quantised, bias: Tensor | None = None):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        y = ops.quantised_linear(x, self.weight)
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
            ops.quantised_linear(ops.swiglu(ops.quantised_linear(x, gate), ops.quantised_linear(x, up)), down)
            for x, gate, up, down in rows
            if len(x)
        ]
        return torch.cat(made) if made else x_MD


class LargePages:
    """Memory for matrices that stay, side by side on large pages."""

    def __init__(self):
        self._left = torch.empty(0, dtype=torch.uint8)

    def keep(self, x: Tensor) -> Tensor:
        """A copy of it there."""
        n = -(-x.nbytes // LINE) * LINE
        if n > len(self._left):
            self._left = cpu.huge(max(n, CHUNK))
        place, self._left = self._left[: x.nbytes], self._left[n:]
        return place.view(x.dtype).view(x.shape).copy_(x)


def load(
    folder: Path | str,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    mapped: bool | None = None,
) -> Transformer:
    """The model in `folder` in the form it is stored in; `dtype` is of the matrices in high precision, `mapped` whether
    the others are used where they lie in their files (None: as there is memory).

    Raises ModelError as `hf.load` does, before memory is taken.
    """
    return opened(folder, dtype, device, mapped)[0]


def opened(
    folder: Path | str, dtype: torch.dtype, device: torch.device | str, mapped: bool | None = None
) -> tuple[Transformer, TensorFolder | GGUFFile]:
    """And its files, which must stay as they are while the model is used: `unchanged` raises where they don't."""
    model, stored = hf.opened(folder, dtype)
    return bring(model, stored, device, mapped), stored.files


def bring(model: Transformer, stored: Tensors, device: torch.device | str, mapped: bool | None = None) -> Transformer:
    """The model that `hf.opened` has checked, with its leaves as they are stored and memory for the rest."""
    if mapped is None:
        mapped = n_bytes(model, stored) > runtime.free_bytes() // 2
    keep = LargePages().keep if torch.device(device).type == "cpu" and not mapped else lambda x: x.to(device)
    for name, pieces in leaves(model, stored).items():
        replace_leaf(model, name, [put(stored.quantised(piece, mapped), keep) for piece in pieces])
    hf.allocate(model, device)
    hf.fill(model, stored)
    return model


def n_bytes(model: Transformer, stored: Tensors) -> int:
    """What the model will take, mapped or not."""
    few = {piece.name: piece for pieces in leaves(model, stored).values() for piece in pieces}
    dtypes = {name: t.dtype for name, t in model.state_dict().items()}
    rest = (piece for piece in hf.own_pieces(model) if piece.name not in few)
    in_memory = sum(math.prod(piece.shape) * dtypes[piece.ours].itemsize for piece in rest)
    return in_memory + sum(stored.n_bytes(piece) for piece in few.values())


def leaves(model: Transformer, stored: Tensors) -> dict[str, list[Piece]]:
    """The leaves that stay in few bits, by the names of their modules: those of which every matrix is."""
    found: dict[str, list[Piece]] = {}
    for piece in hf.own_pieces(model):
        name, _, part = piece.ours.rpartition(".")
        if part != "bias" and isinstance(model.get_submodule(name), Linear | Experts) and not name.endswith(ABSORBED):
            found.setdefault(name, []).append(piece)
    return {name: pieces for name, pieces in found.items() if all(map(stored.in_few_bits, pieces))}


def replace_leaf(model: nn.Module, name: str, matrices: Sequence[Quantised]) -> None:
    """Put a leaf in few bits where `name` is; its bias, if it has one, stays a parameter of the model."""
    above, _, last = name.rpartition(".")
    old = model.get_submodule(name)
    if isinstance(old, Linear):
        (weight,) = matrices
        leaf = QuantisedLinear(weight, old.bias)
    else:
        E = len(matrices) // 3
        gate_up, down = matrices[: 2 * E], matrices[2 * E :]
        leaf = QuantisedExperts(gate_up[0::2], gate_up[1::2], down)
    setattr(model.get_submodule(above), last, leaf)


def put(matrix: Quantised, keep: Callable[[Tensor], Tensor]) -> Quantised:
    """The same matrix, its tensors where `keep` has put them."""
    least = None if matrix.least is None else keep(matrix.least)
    return Quantised(matrix.form, keep(matrix.codes), keep(matrix.scales), matrix.block, least)
