"""Rounding that looks at what the numbers are multiplied with (GPTQ, arXiv 2210.17323), layer by layer.

A matrix W [N, K] meets inputs x; the error that counts is ‖(W − Ŵ) X‖², of which H = X Xᵀ is all that matters. Columns
are rounded from left to right, and what a column loses the later ones make up for:

    e = (w_k − ŵ_k) / U_kk        w_j −= e · U_kj   for j behind k        Uᵀ U = H⁻¹, U upper triangular

Where a group begins, its scale is set for its numbers as they then are: the one of a grid of shares of the largest with
the least Σ H_kk (w − ŵ)². Inputs are what the layers before make of them in few bits. Rounding the most active columns
first, with scales set before, was no better, and is left out.

Experts see the rows that are routed to them, weighed as their outputs are. A router sends some experts next to nothing
of a text; so to each one's H a share is added of what the whole layer sees, as if PRIOR · K more rows had come.

Shapes: B matrices, N outputs, K inputs, G groups of a row, T tokens, D model, E experts, F hidden.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shoal.model.block import Block
from shoal.model.hf_names import Piece
from shoal.model.layers import Linear
from shoal.model.moe import Experts, MoE, Routes
from shoal.model.mtp import MTP
from shoal.ops import dispatch as ops
from shoal.ops import quant
from shoal.ops.quant import Quantised
from shoal.precision.convert import Kept, kept
from shoal.precision.convert import rounded as nearest
from shoal.precision.layers import Walk

DAMP = 0.01  # of H's mean diagonal, added to it
SHARES = [1 - 0.04 * i for i in range(13)]  # of a group's largest number
BLOCK = 128  # columns whose errors are carried on together
PRIOR = 0.25
SAMPLE = 1024  # of a layer's tokens, seen by every expert
TOGETHER_BYTES = 2**30  # of experts that are done together: H, and in fp64 its copies, factor and inverse
LAYER = re.compile(r"(layers\.\d+|mtp\.\d+\.block)\.(.*)")


class Columns(NamedTuple):
    """Of H: U, and how much each column counts."""

    upper_BKK: Tensor
    weight_BK: Tensor


def columns(H_BKK: Tensor) -> Columns:
    H = H_BKK.double()
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    diagonal += (DAMP * diagonal.mean(-1, keepdim=True)).clamp(min=1e-12)
    lower = torch.linalg.cholesky(H.flip(-1, -2)).flip(-1, -2)  # R upper, R Rᵀ = H: U is its inverse
    eye = torch.eye(H.shape[-1], dtype=H.dtype).expand_as(H)
    return Columns(torch.linalg.solve_triangular(lower, eye, upper=True).float(), diagonal.float())


def rounded(W_BNK: Tensor, c: Columns, how: Kept) -> Quantised:
    """The matrices in few bits, a stack of them, in groups that divide BLOCK."""
    K, group = W_BNK.shape[-1], how.group
    assert group and BLOCK % group == 0, how
    half, left = 2 ** (quant.BITS[how.form] - 1), W_BNK.clone()
    codes, scales = torch.empty_like(left), []
    for start in range(0, K, BLOCK):
        end = min(start + BLOCK, K)
        part, lost = left[..., start:end], torch.empty_like(left[..., start:end])
        for i, k in enumerate(range(start, end)):
            if k % group == 0:
                scales.append(best_scales(part[..., i : i + group], c.weight_BK[:, k : k + group], half))
            w, step = part[..., i], scales[-1].float()
            codes[..., k] = (w / step).round().clamp(-half, half - 1)
            lost[..., i] = (w - codes[..., k] * step) / c.upper_BKK[:, k, k, None]
            part[..., i + 1 :] -= lost[..., i, None] * c.upper_BKK[:, None, k, k + 1 : end]
        left[..., end:] -= lost @ c.upper_BKK[:, start:end, end:]
    packed = quant.packed(how.form, (codes + half).to(torch.uint8))
    return Quantised(how.form, packed, torch.stack(scales, -1), (1, group))


def best_scales(W_BNK: Tensor, weight_BK: Tensor, half: int) -> Tensor:
    """bf16 [B, N], of a group of columns: of a grid, what makes the least weighted squares."""
    most = (W_BNK.abs().amax(-1) / (half - 1)).clamp(min=torch.finfo(torch.bfloat16).tiny)
    best, least = most.bfloat16(), torch.full_like(most, torch.inf)
    for share in SHARES:
        scale = (most * share).bfloat16()
        step = scale.float()[..., None]
        off = ((W_BNK / step).round_().clamp_(-half, half - 1).mul_(step).sub_(W_BNK)).square_() @ weight_BK[..., None]
        best, least = torch.where(off[..., 0] < least, scale, best), torch.minimum(off[..., 0], least)
    return best


class Seen:
    """What the leaves of a block are multiplied with while a text goes through: H of each, and what its experts get."""

    def __init__(self, block: Block):
        self.hessians: dict[str, Tensor] = {}
        self.inputs: list[Tensor] = []  # of a mixture, [T, D] each
        self.routes: list[Routes] = []
        self._same: list[tuple[Tensor, str]] = []
        self._root: dict[str, str] = {}
        leaves = [(name, m) for name, m in block.named_modules() if isinstance(m, Linear)]
        self._hooks = [m.register_forward_pre_hook(self._leaf(name)) for name, m in leaves]
        self._hooks.append(block.register_forward_pre_hook(lambda *_: self._same.clear()))
        if isinstance(block.ffn, MoE):
            self._hooks.append(block.ffn.register_forward_hook(self._mixture))

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._same.clear()

    def of(self, name: str) -> Tensor:
        return self.hessians[self._root[name]]

    def _leaf(self, name: str):
        def see(_, inputs: tuple[Tensor]) -> None:
            (x,) = inputs
            root = next((other for seen, other in self._same if seen is x), None)
            if root is None:
                root = name
                self._same.append((x, name))
                self.hessians[name] = self.hessians.get(name, 0) + x.mT @ x
            self._root[name] = root

        return see

    def _mixture(self, _, inputs: tuple[Tensor], result: tuple[Tensor, Routes]) -> None:
        self.inputs.append(inputs[0])
        self.routes.append(result[1])


class Calibration:
    """Makes matrices for `convert.write`, which asks for those of a layer together, and for layers in order.

    `tokens_WT` are windows of a text. The matrices of layers become integers of 4 bits; others are rounded to the
    nearest.
    """

    def __init__(self, folder: Path | str, tokens_WT: Tensor, group: int):
        self.walk, self.group = Walk(folder, wide=True), group
        self._places = {(p.ours, p.expert, p.first_row): p for p in self.walk.pieces}
        self._made: dict[str, Quantised] = {}
        self._layers = self._each_layer(tokens_WT)

    def __call__(self, piece: Piece, how: Kept) -> Quantised:
        if not LAYER.match(piece.ours):
            weight = torch.empty(piece.shape)
            self.walk.stored.copy(piece, weight)
            return nearest(weight, how)
        if piece.name not in self._made:
            self._made.clear()
            next(self._layers)
        return self._made[piece.name]

    @torch.inference_mode()
    def _each_layer(self, tokens_WT: Tensor) -> Iterator[None]:
        h_WTD = self.walk.embed(tokens_WT)
        for i in range(self.walk.config.n_layers):
            h_WTD = self._layer(f"layers.{i}", self.walk.read(f"layers.{i}"), h_WTD)
            yield
        h_WTD = self.walk.read("norm")(h_WTD)
        for k in range(self.walk.config.n_mtp):
            module = self.walk.read(f"mtp.{k}")
            assert isinstance(module, MTP)
            tokens_WT, h_WTD = tokens_WT[:, 1:], h_WTD[:, :-1]
            e_WTD = module.embed_norm(self.walk.embed(tokens_WT))
            h_WTD = module.proj(torch.cat([e_WTD, module.hidden_norm(h_WTD)], -1))
            h_WTD = module.norm(self._layer(f"mtp.{k}.block", module.block, h_WTD))
            yield

    def _layer(self, name: str, block: nn.Module, h_WTD: Tensor) -> Tensor:
        """Make its matrices; what it makes of the hidden states with them."""
        assert isinstance(block, Block)
        seen = Seen(block)
        self.walk.through(block, h_WTD)
        seen.close()
        for leaf, module in block.named_modules():
            if isinstance(module, Linear):
                self._linear(f"{name}.{leaf}.weight", module, seen.of(leaf))
            elif isinstance(module, Experts):
                self._experts(f"{name}.{leaf}", module, torch.cat(seen.inputs), seen.routes)
        return self.walk.through(block, h_WTD)

    def _linear(self, ours: str, leaf: Linear, H_KK: Tensor) -> None:
        piece = self._places[ours, None, 0]
        if how := kept(piece, "int4", self.group):
            made = rounded(leaf.weight[None], columns(H_KK[None]), how)[0]
            self._made[piece.name] = made
            leaf.weight.copy_(made.dequantise())

    def _experts(self, ours: str, leaf: Experts, x_TD: Tensor, routes: list[Routes]) -> None:
        rows = Rows.of(x_TD, routes)
        each = (4 + 4 * 8) * max(leaf.gate_up.shape[2], leaf.down.shape[2]) ** 2
        for chosen in torch.arange(len(leaf.down)).split(max(1, TOGETHER_BYTES // each)):
            E = chosen.tolist()
            self._stack(f"{ours}.gate_up", leaf.gate_up, E, rows.hessians(E))
            self._stack(f"{ours}.down", leaf.down, E, rows.hessians(E, leaf.gate_up))

    def _stack(self, ours: str, stack_ENK: Tensor, experts: list[int], H_BKK: Tensor) -> None:
        first = self._places[ours, experts[0], 0]
        how = kept(first, "int4", self.group)
        assert how, first
        made = rounded(stack_ENK[experts], columns(H_BKK), how)
        for i, e in enumerate(experts):
            stack_ENK[e] = made[i].dequantise()
            for row in range(0, stack_ENK.shape[1], first.shape[0]):
                part = slice(row, row + first.shape[0])
                matrix = Quantised(
                    made.form, made.codes[i, part].contiguous(), made.scales[i, part].contiguous(), made.block
                )
                self._made[self._places[ours, e, row].name] = matrix


class Rows(NamedTuple):
    """What a mixture's experts see of a text."""

    x_TD: Tensor
    experts_TK: Tensor
    weights_TK: Tensor

    @classmethod
    def of(cls, x_TD: Tensor, routes: list[Routes]) -> "Rows":
        return cls(x_TD, torch.cat([r.experts_TK for r in routes]), torch.cat([r.weights_TK for r in routes]))

    def hessians(self, experts: list[int], gate_up_EFD: Tensor | None = None) -> Tensor:
        """H of each expert [B, K, K]: of its inputs, or with `gate_up` of what its down-projection gets."""
        T = len(self.x_TD)
        common_SD = self.x_TD[:: max(1, T // SAMPLE)]
        weight = self.weights_TK.square().mean().sqrt()
        found = []
        for e in experts:
            t, k = (self.experts_TK == e).nonzero(as_tuple=True)
            own, common = self.x_TD[t], common_SD
            if gate_up_EFD is not None:
                own, common = (ops.swiglu(*(x @ gate_up_EFD[e].mT).chunk(2, -1)) for x in (own, common))
            own = own * self.weights_TK[t, k, None]
            prior = PRIOR * common.shape[1] / len(common) * weight**2
            found.append(own.mT @ own + prior * (common.mT @ common))
        return torch.stack(found)
