"""Numbers in 8 and 4 bits, written to be read: the specification of every kernel that makes or reads them.

A matrix W [N, K] becomes codes of few bits and a scale for each block of rows and columns:

    fp8     w ≈ code · scale            E4M3 codes, blocks of 128 × 128 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2)
    int8    w ≈ (code − 128) · scale    a block is a whole row, or `group` numbers of one
    int4    w ≈ (code − 8) · scale      groups of 32, 64 or 128 numbers of a row; or code · scale + least

Codes lie as published files keep them (official FP8 folders; compressed-tensors' "pack-quantized", whose 32-bit words
are these bytes), so that a file can be mapped and multiplied with as it is. int4 keeps number 2i in the low half of
byte i, number 2i + 1 in the high half.

Every code is exact in bf16. A product is the sum over blocks, in fp32, of scale · Σ code · x.
Shapes: N outputs, K inputs; a stack of experts has an E in front.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["fp8", "int8", "int4"]

FP8 = torch.float8_e4m3fn
FP8_BLOCK = (128, 128)
FP8_MOST = 448.0
LEAST_AMAX = 1e-4  # below it a block is as good as zero
BITS: dict[Form, int] = {"fp8": 8, "int8": 8, "int4": 4}


@dataclass(frozen=True)
class Quantised:
    """A matrix [N, K], or a stack of them, in few bits.

    codes    fp8: float8_e4m3fn [.., N, K]      int8: uint8 [.., N, K]      int4: uint8 [.., N, K/2]
    scales   [.., ⌈N / rows⌉, ⌈K / columns⌉] of `block` = (rows, columns): fp32 for fp8, bf16 or fp16 for integers
    least    int4 alone: as the scales, or None where zero is code 8
    """

    form: Form
    codes: Tensor
    scales: Tensor
    block: tuple[int, int]
    least: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix these codes stand for."""
        *outer, K = self.codes.shape
        return (*outer, 2 * K if self.form == "int4" else K)

    @property
    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.codes, self.scales, self.least) if x is not None)

    def __getitem__(self, e: int | slice) -> "Quantised":
        """Of a stack, one matrix or some."""
        least = None if self.least is None else self.least[e]
        return Quantised(self.form, self.codes[e], self.scales[e], self.block, least)

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """What the codes stand for [.., N, K], computed in fp32."""
        shape, (rows, columns) = self.shape, self.block
        values = numbers(self.form, self.codes, self.least is None)
        if rows > 1 or shape[-1] % columns:
            return values.mul_(spread(self.scales, self.block, shape)).to(dtype)
        groups = values.unflatten(-1, (-1, columns)).mul_(self.scales.float()[..., None])
        if self.least is not None:
            groups += self.least.float()[..., None]
        return values.to(dtype)


def numbers(form: Form, codes: Tensor, signed: bool = True) -> Tensor:
    """The codes as fp32 numbers [.., N, K], before their scales."""
    if form == "fp8":
        return codes.float()
    if form == "int8":
        return codes.float() - 128
    halves = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return halves.float() - 8 if signed else halves.float()


def spread(scales: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """Each block's scale, in fp32, at each of its numbers: [.., N, K]."""
    rows, columns = block
    whole = scales.float().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
    return whole[..., : shape[-2], : shape[-1]]


def quantise(weight: Tensor, form: Form, group: int = 128, dtype: torch.dtype = torch.bfloat16) -> Quantised:
    """Round [.., N, K] to nearest. Integers: `group` numbers of a row share a scale of this dtype, and divide K."""
    return to_fp8(weight) if form == "fp8" else to_integers(weight, form, group, dtype)


def to_fp8(weight: Tensor) -> Quantised:
    """E4M3, a scale max(amax, 1e-4) / 448 for each block of 128 × 128; ragged blocks count what they have."""
    amax = block_amax(weight.float(), FP8_BLOCK)
    scales = amax.clamp(min=LEAST_AMAX) / FP8_MOST
    codes = weight.float() / spread(scales, FP8_BLOCK, tuple(weight.shape))
    return Quantised("fp8", codes.to(FP8), scales, FP8_BLOCK)


def block_amax(x: Tensor, block: tuple[int, int]) -> Tensor:
    """The largest magnitude of each block of rows and columns: [.., ⌈N / rows⌉, ⌈K / columns⌉]."""
    (rows, columns), (N, K) = block, x.shape[-2:]
    padded = torch.nn.functional.pad(x.abs(), (0, -K % columns, 0, -N % rows))
    return padded.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1))


def to_integers(weight: Tensor, form: Form, group: int, dtype: torch.dtype) -> Quantised:
    """Symmetric, a scale amax / (2^(bits−1) − 1) a group."""
    assert weight.shape[-1] % group == 0, (weight.shape, group)
    half = 2 ** (BITS[form] - 1)
    grouped = weight.float().unflatten(-1, (-1, group))
    scales = (grouped.abs().amax(-1) / (half - 1)).clamp(min=torch.finfo(dtype).tiny).to(dtype)
    codes = (grouped / scales.float()[..., None]).round().clamp(-half, half - 1) + half
    return Quantised(form, packed(form, codes.to(torch.uint8).flatten(-2)), scales, (1, group))


def packed(form: Form, codes: Tensor) -> Tensor:
    """One code a byte → as they are kept."""
    return codes[..., 0::2] | codes[..., 1::2] << 4 if form == "int4" else codes


def linear(x: Tensor, weight: Quantised) -> Tensor:
    """x Wᵀ [.., N] of x [.., K], the sum in fp32; the result has x's dtype."""
    return (x.float() @ weight.dequantise().mT).type_as(x)
