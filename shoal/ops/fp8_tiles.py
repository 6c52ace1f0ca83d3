"""Operands of 8-bit products on this machine, and the products: quant_tiles.py's numbers, by whatever is fast here.

On a GPU that knows E4M3, with Triton, an operand stays in 8 bits and is multiplied so (triton_gemm.py). Elsewhere,
under power-of-two scales, it is bf16, exactly, and so is the product of two with its sum in fp32; under fp32 scales it
is fp32. C kernels (native/fp8_tiles.c) make bf16 ones on a CPU with AVX512-BF16, rows a multiple of 16 wide; all else
is the reference's.

Shapes: M rows, K columns, E matrices of N × K.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from shoal.ops import cpu, dispatch, quant_tiles
from shoal.ops.cpu import call
from shoal.ops.quant import FP8, FP8_BLOCK, Quantised
from shoal.ops.quant_tiles import E5M6, ROW_TILE, TILE, UE8M0, Scales

Operand = Tensor | Quantised


def operand_dtype(scales: Scales) -> torch.dtype:
    return torch.bfloat16 if scales == "ue8m0" else torch.float32


def _native(x: Tensor, scales: Scales) -> bool:
    return scales == "ue8m0" and cpu.takes(x, x.shape[-1])


def on_gpu(x: Tensor) -> bool:
    return x.is_cuda and dispatch.triton_kernels() and dispatch.knows_fp8(x.device)


def _room(x_MK: Tensor) -> tuple[Tensor, Tensor]:
    """For codes and UE8M0 bytes of these rows."""
    M, K = x_MK.shape
    return torch.empty(M, K, dtype=FP8), torch.empty(M, -(-K // TILE), dtype=UE8M0)


def rows(x_MK: Tensor, scales: Scales) -> tuple[Operand, Quantised]:
    """In 1 × 128 tiles: the operand of a product over K, and what to keep of it."""
    if on_gpu(x_MK):
        kept = kept_rows(x_MK, scales)
        return kept, kept
    if not _native(x_MK, scales):
        kept = quant_tiles.row_tiles(x_MK, scales)
        return kept.dequantise(operand_dtype(scales)), kept
    x_MK, y_MK, (codes, bytes_) = x_MK.contiguous(), torch.empty(x_MK.shape, dtype=x_MK.dtype), _room(x_MK)
    call("fp8_rows", x_MK, codes, bytes_, y_MK, *x_MK.shape)
    return y_MK, Quantised("fp8", codes, bytes_, ROW_TILE)


def passing_rows(x_MK: Tensor, scales: Scales) -> Operand:
    """`rows` where nothing is to be kept."""
    if on_gpu(x_MK):
        return kept_rows(x_MK, scales)
    if not _native(x_MK, scales):
        return quant_tiles.row_tiles(x_MK, scales).dequantise(operand_dtype(scales))
    x_MK, y_MK = x_MK.contiguous(), torch.empty(x_MK.shape, dtype=x_MK.dtype)
    call("fp8_rows", x_MK, None, None, y_MK, *x_MK.shape)
    return y_MK


def normed_rows(x_MK: Tensor, weight_K: Tensor, eps: float, scales: Scales) -> tuple[Tensor, Quantised]:
    """x / rms(x) · weight, and `kept_rows` of it, in one reading of x: on a GPU (`on_gpu`)."""
    from shoal.ops import triton_quant

    return triton_quant.rms_norm(x_MK if x_MK.stride(1) == 1 else x_MK.contiguous(), weight_K, eps, scales)


def swiglu_rows(gate_up_M2F: Tensor, scales: Scales) -> Operand:
    """`passing_rows` of silu(gate) · up, gate and up being halves of a row."""
    gate_MF, up_MF = gate_up_M2F.chunk(2, -1)
    if on_gpu(gate_MF):
        from shoal.ops import triton_quant

        return triton_quant.swiglu(gate_MF, up_MF, scales)
    return passing_rows(dispatch.swiglu(gate_MF, up_MF), scales)


def kept_rows(x_MK: Tensor, scales: Scales) -> Quantised:
    """`rows` where no product follows."""
    if on_gpu(x_MK):
        from shoal.ops import triton_quant

        return triton_quant.rows(x_MK.contiguous(), scales)
    if not _native(x_MK, scales):
        return quant_tiles.row_tiles(x_MK, scales)
    x_MK, (codes, bytes_) = x_MK.contiguous(), _room(x_MK)
    call("fp8_rows", x_MK, codes, bytes_, None, *x_MK.shape)
    return Quantised("fp8", codes, bytes_, ROW_TILE)


def columns(x_MK: Tensor, counts_E: Tensor, scales: Scales) -> Operand:
    """In 128 × 1 tiles, none of which spans two of E parts: the operand of a product over rows."""
    if on_gpu(x_MK):
        from shoal.ops import triton_quant

        return triton_quant.columns(x_MK.contiguous(), counts_E, scales)
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
    call("fp8_columns", x_MK, torch.tensor(spans, dtype=torch.int64), len(spans), y_MK, x_MK.shape[1])
    return y_MK


def blocks(weight_ENK: Tensor, scales: Scales) -> Operand:
    """In 128 × 128 blocks: the operand that a weight is, in products either way."""
    if on_gpu(weight_ENK):
        from shoal.ops import triton_quant

        return triton_quant.blocks(weight_ENK, scales)
    if not _native(weight_ENK, scales):
        return quant_tiles.block_tiles(weight_ENK, scales).dequantise(operand_dtype(scales))
    weight_ENK = weight_ENK.contiguous()
    y_ENK = torch.empty_like(weight_ENK)
    call("fp8_blocks", weight_ENK, y_ENK, weight_ENK[..., 0, 0].numel(), *weight_ENK.shape[-2:])
    return y_ENK


def stacked(weights: Sequence[Tensor], E: int, scales: Scales) -> Operand:
    """[E, N, K] of weights one above the other; each [.., n, K] of theirs has blocks of its own.

    In 8 bits they stay where blocks meet at multiples of 128 rows.
    """
    made, K = [blocks(w, scales) for w in weights], weights[0].shape[-1]
    tiled = [part for part in made if isinstance(part, Quantised)]
    alone = len(weights) == 1 and weights[0].shape[:-2].numel() == E
    if len(tiled) < len(made) or not (alone or all(w.shape[-2] % TILE == 0 for w in weights)):
        wide = [plain(part).view(E, -1, K) for part in made]
        return wide[0] if len(wide) == 1 else torch.cat(wide, 1)
    if len(tiled) == 1:
        codes, kept = (x.view(E, -1, x.shape[-1]) for x in (tiled[0].codes, tiled[0].scales))
        return Quantised("fp8", codes, kept, FP8_BLOCK)
    codes, kept = ([getattr(part, name) for part in tiled] for name in ("codes", "scales"))
    codes, kept = (torch.cat([x.view(E, -1, x.shape[-1]) for x in parts], 1) for parts in (codes, kept))
    return Quantised("fp8", codes, kept, FP8_BLOCK)


def turned(matrices_ENK: Operand) -> Operand:
    """Each matrix transposed."""
    if isinstance(matrices_ENK, Tensor):
        return matrices_ENK.mT
    from shoal.ops import triton_gemm

    return triton_gemm.turned(matrices_ENK)


def product(x_MK: Operand, matrices_ENK: Operand, counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    """x_e W_eᵀ of row blocks: [M, N]. In 8 bits where both are, in whole 16 bytes a row."""
    if isinstance(x_MK, Tensor) or isinstance(matrices_ENK, Tensor) or x_MK.shape[1] % 16:
        return dispatch.grouped_linear(plain(x_MK), plain(matrices_ENK), counts_E).to(dtype)
    from shoal.ops import triton_gemm

    return triton_gemm.linear(x_MK, matrices_ENK, None if len(counts_E) == 1 else counts_E, dtype)


def weight_gradient(dy_MN: Operand, x_MK: Operand, counts_E: Tensor) -> Tensor:
    """dyᵀ x of row blocks, of their `columns`: [E, N, K]."""
    if isinstance(dy_MN, Tensor) or isinstance(x_MK, Tensor):
        return dispatch.grouped_weight_gradient(plain(dy_MN), plain(x_MK), counts_E)
    from shoal.ops import triton_gemm

    return triton_gemm.gradient(dy_MN, x_MK, counts_E)


def plain(x: Operand) -> Tensor:
    """An operand as one multiplies it without a unit for 8 bits."""
    if isinstance(x, Tensor):
        return x
    return x.dequantise(operand_dtype("ue8m0" if x.scales.dtype is UE8M0 else "fp32"))


def e5m6(x_MK: Tensor) -> E5M6:
    if not _native(x_MK, "ue8m0"):
        return quant_tiles.e5m6(x_MK)
    x_MK, (M, K) = x_MK.contiguous(), x_MK.shape
    codes, bytes_ = torch.empty(M, K // 2 * 3, dtype=torch.uint8), torch.empty(M, -(-K // TILE), dtype=UE8M0)
    call("e5m6_encode", x_MK, codes, bytes_, M, K)
    return E5M6(codes, bytes_)


def restored(kept: Quantised | E5M6, dtype: torch.dtype) -> Tensor:
    """The numbers that stand behind what was kept: [M, K]."""
    M, width = kept.codes.shape
    K = width if isinstance(kept, Quantised) else width // 3 * 2
    y_MK = torch.empty(M, K, dtype=dtype, device=kept.codes.device)
    if kept.scales.dtype is not UE8M0 or not cpu.takes(y_MK, K):
        return kept.dequantise(dtype)
    name = "fp8_decode" if isinstance(kept, Quantised) else "e5m6_decode"
    call(name, kept.codes, kept.scales.contiguous(), y_MK, M, K)
    return y_MK
