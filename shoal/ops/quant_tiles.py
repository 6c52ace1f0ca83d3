"""The numbers of 8-bit training, written to be read (DeepSeek-V3, arXiv 2412.19437, sections 3.3.1 to 3.3.3).

    activations    tiles of 1 × 128: 128 numbers of one token share a scale, made online from their own maximum
    weights        blocks of 128 × 128
    gradients      1 × 128 for the product that goes on to the input; 128 × 1 (one channel of 128 tokens) for that of
                   the weights, which sums over tokens: activations kept in 1 × 128 are tiled anew, `column_tiles`
    scale          max(amax, 1e-4) / 448, in fp32; or its ceiling among powers of two, one byte (UE8M0)

With powers of two as scales a number is a code of four significant bits moved by an exponent: exact in bf16, so a bf16
product of such numbers with an fp32 sum is the 8-bit product exactly, and tiling anew adds no rounding but below the
smallest exponent of the new tile. With fp32 scales it is exact in fp32 only.

E5M6 (12 bits, two numbers in three bytes) is fp16 without its last four bits, under such a power of two: for the input
of the projection after attention. Of a tile that holds a NaN or an infinity nothing is left but NaN.

Shapes: M rows (tokens), K columns, E matrices of N × K.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.ops.quant import FP8, FP8_BLOCK, FP8_MOST, LEAST_AMAX, Quantised, block_amax, spread

Scales = Literal["ue8m0", "fp32"]

UE8M0 = torch.float8_e8m0fnu
TILE = 128
ROW_TILE = (1, TILE)
E5M6_MOST = 65024.0  # (2 − 2⁻⁶) · 2¹⁵
E5M6_LEAST = -14  # exponent of the smallest normal number
NAN_SCALE = 255  # of UE8M0's bytes


def tiles(x: Tensor, block: tuple[int, int], scales: Scales) -> Quantised:
    """E4M3 codes of [.., N, K], a scale for each block of rows and columns; ragged ones count what they have."""
    amax = block_amax(x.float(), block)
    made = amax.clamp(min=LEAST_AMAX) / FP8_MOST if scales == "fp32" else power_of_two(amax, FP8_MOST)
    codes = x.float() / spread(made, block, tuple(x.shape))
    return Quantised("fp8", codes.to(FP8), made, block)


def row_tiles(x_MK: Tensor, scales: Scales) -> Quantised:
    """Activations, or their gradients, as a product over K takes them."""
    return tiles(x_MK, ROW_TILE, scales)


def column_tiles(x_MK: Tensor, counts: Sequence[int], scales: Scales) -> Tensor:
    """What is left of x, in fp32, once 128 rows share each column's scale: as a product over rows takes it.

    `counts` cut the rows into parts (an expert's, say) that share no tile and sum to M.
    """
    parts = [row_tiles(part.mT, scales).dequantise().mT for part in x_MK.split(list(counts)) if len(part)]
    return torch.cat(parts) if parts else x_MK.float()


def block_tiles(weight_ENK: Tensor, scales: Scales) -> Quantised:
    return tiles(weight_ENK, FP8_BLOCK, scales)


def power_of_two(amax: Tensor, most: float) -> Tensor:
    """The smallest power of two that brings `amax` to `most` at most, as UE8M0; NaN where amax isn't finite."""
    mantissa, exponent = torch.frexp(amax.float().clamp(min=LEAST_AMAX))  # mantissa in [1/2, 1)
    most_mantissa, most_exponent = torch.frexp(torch.tensor(most, device=amax.device))
    byte = exponent - most_exponent + (mantissa > most_mantissa) + 127
    return torch.where(amax.isfinite(), byte, NAN_SCALE).to(torch.uint8).view(UE8M0)


@dataclass(frozen=True)
class E5M6:
    """[.., K], K even. codes: uint8 [.., 3K/2], an even number in the low half of 24 bits; scales: [.., ⌈K/128⌉]."""

    codes: Tensor
    scales: Tensor

    def dequantise(self, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        low, middle, high = self.codes.int().unflatten(-1, (-1, 3)).unbind(-1)
        codes = torch.stack((low | (middle & 15) << 8, middle >> 4 | high << 4), -1).flatten(-2)
        size, exponent = codes & 63, codes >> 6 & 31
        normal = exponent > 0
        value = torch.ldexp((size + 64 * normal).float(), exponent.clamp(min=1) - 15 - 6)
        value = torch.where(codes >= 1 << 11, -value, value)
        return (value * spread(self.scales, ROW_TILE, tuple(value.shape))).to(dtype)


def e5m6(x: Tensor) -> E5M6:
    """Round [.., K] to nearest, ties to even: 1 sign, 5 exponent and 6 mantissa bits, a power of two a 1 × 128 tile."""
    scales = power_of_two(block_amax(x.float(), ROW_TILE), E5M6_MOST)
    value = x.float() / spread(scales, ROW_TILE, tuple(x.shape))
    size = torch.where(value.isfinite(), value.abs(), 0)
    exponent = torch.frexp(size.clamp(min=2.0**E5M6_LEAST)).exponent - 1  # subnormals share the least
    codes = (exponent - E5M6_LEAST) * 64 + torch.ldexp(size, 6 - exponent).round().int()
    codes |= value.signbit().int() << 11
    pair = codes[..., 0::2] | codes[..., 1::2] << 12
    return E5M6(torch.stack((pair, pair >> 8, pair >> 16), -1).bitwise_and(255).to(torch.uint8).flatten(-2), scales)
