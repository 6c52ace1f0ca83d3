"""Operands of 8-bit products on this machine: the numbers of quant_tiles.py, by C kernels (native/fp8_tiles.c) or not.

Under power-of-two scales an operand is bf16, exactly, and so is the product of two with its sum in fp32; under fp32
scales it is fp32. Kernels take bf16 on a CPU with AVX512-BF16, rows a multiple of 16 wide, power-of-two scales; all
else is the reference's. Shapes: M rows, K columns, E matrices of N × K.
"""

from itertools import accumulate

import torch
from torch import Tensor

from shoal.ops import cpu, quant_tiles
from shoal.ops.cpu import _call
from shoal.ops.quant import FP8, Quantised
from shoal.ops.quant_tiles import E5M6, ROW_TILE, TILE, UE8M0, Scales


def operand_dtype(scales: Scales) -> torch.dtype:
    return torch.bfloat16 if scales == "ue8m0" else torch.float32


def _native(x: Tensor, scales: Scales) -> bool:
    return scales == "ue8m0" and cpu.takes(x, x.shape[-1])


def _room(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """For codes and UE8M0 bytes of these rows."""
    M, K = x_MK.shape
    return torch.empty(M, K, dtype=FP8), torch.empty(M, -(-K // TILE), dtype=UE8M0)


def rows(x_MK: Tensor, scales: Scales) -> tuple[Tensor, Quantised]:
    """In 1 × 128 tiles: the operand of a product over K, and what to keep of it."""
    if not _native(x_MK, scales):
        kept = quant_tiles.row_tiles(x_MK, scales)
        return kept.dequantise(operand_dtype(scales)), kept
    x_MK, y_MK, (codes, bytes_) = x_MK.contiguous(), torch.empty(x_MK.shape, dtype=x_MK.dtype), _room(x_MK)
    _call("fp8_rows", x_MK, codes, bytes_, y_MK, *x_MK.shape)
    return y_MK, Quantised("fp8", codes, bytes_, ROW_TILE)


def passing_rows(x_MK: Tensor, scales: Scales) -> Tensor:
    """`rows` where nothing is to be kept."""
    if not _native(x_MK, scales):
        return quant_tiles.row_tiles(x_MK, scales).dequantise(operand_dtype(scales))
    x_MK, y_MK = x_MK.contiguous(), torch.empty(x_MK.shape, dtype=x_MK.dtype)
    _call("fp8_rows", x_MK, None, None, y_MK, *x_MK.shape)
    return y_MK


def kept_rows(x_MK: Tensor, scales: Scales) -> Quantised:
    """`rows` where no product follows."""
    if not _native(x_MK, scales):
        return quant_tiles.row_tiles(x_MK, scales)
    x_MK, (codes, bytes_) = x_MK.contiguous(), _room(x_MK)
    _call("fp8_rows", x_MK, codes, bytes_, None, *x_MK.shape)
    return Quantised("fp8", codes, bytes_, ROW_TILE)


def columns(x_MK: Tensor, counts_E: Tensor, scales: Scales) -> Tensor:
    """In 128 × 1 tiles, none of which spans two of E parts: the operand of a product over rows."""
    counts = counts_E.tolist()
    if not _native(x_MK, scales):
        return quant_tiles.column_tiles(x_MK, counts, scales).to(operand_dtype(scales))
    ends = list(accumulate(counts))
    spans = [
        (at, min(at + TILE, end))
        for end, count in zip(ends, counts, strict=True)
        for at in range(end - count, end, TILE)
    ]
    x_MK, y_MK = x_MK.contiguous(), torch.empty(x_MK.shape, dtype=x_MK.dtype)
    _call("fp8_columns", x_MK, torch.tensor(spans, dtype=torch.int64), len(spans), y_MK, x_MK.shape[1])
    return y_MK


def blocks(weight_ENK: Tensor, scales: Scales) -> Tensor:
    """In 128 × 128 blocks: the operand that a weight is, in products either way."""
    if not _native(weight_ENK, scales):
        return quant_tiles.block_tiles(weight_ENK, scales).dequantise(operand_dtype(scales))
    weight_ENK = weight_ENK.contiguous()
    y_ENK = torch.empty_like(weight_ENK)
    _call("fp8_blocks", weight_ENK, y_ENK, weight_ENK[..., 0, 0].numel(), *weight_ENK.shape[-2:])
    return y_ENK


def e5m6(x_MK: Tensor) -> E5M6:
    if not _native(x_MK, "ue8m0"):
        return quant_tiles.e5m6(x_MK)
    x_MK, (M, K) = x_MK.contiguous(), x_MK.shape
    codes, bytes_ = torch.empty(M, K // 2 * 3, dtype=torch.uint8), torch.empty(M, -(-K // TILE), dtype=UE8M0)
    _call("e5m6_encode", x_MK, codes, bytes_, M, K)
    return E5M6(codes, bytes_)


def restored(kept: Quantised | E5M6, dtype: torch.dtype) -> Tensor:
    """The numbers that stand behind what was kept: [M, K]."""
    M, width = kept.codes.shape
    K = width if isinstance(kept, Quantised) else width // 3 * 2
    y_MK = torch.empty(M, K, dtype=dtype, device=kept.codes.device)
    if kept.scales.dtype is not UE8M0 or not cpu.takes(y_MK, K):
        return kept.dequantise(dtype)
    name = "fp8_decode" if isinstance(kept, Quantised) else "e5m6_decode"
    _call(name, kept.codes, kept.scales, y_MK, M, K)
    return y_MK
