"""Numbers into E4M3 on a GPU, alone or fused with what makes them: quant_tiles.py's arithmetic in Triton.

    rows      1 × 128 tiles of x [T, K]             for y = x Wᵀ and dx = dy W          `rows`, `rms_norm`, `swiglu`
    columns   128 × 1 tiles, written turned         for dW = dyᵀ x, which sums over T   `columns`
    blocks    128 × 128 of a weight [.., N, K]                                          `blocks`

What is fused is rounded as if it were not, to the input's dtype and then to 8 bits: the numbers are the same, but the
tensor in between is not read again; nor is SwiGLU's written, while routers want normed rows as they are.
Codes lie along the dimension that a product will sum over (Hopper multiplies 8-bit numbers no other way), scales along
the other one, so that neighbouring threads of a product read neighbouring scales.

Shapes: T tokens, K width, N outputs, B = ⌈K / 128⌉; M rows of E experts, each expert's in one run; S slots of rows.
"""
# pyright: reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.quant import FP8, FP8_BLOCK, Quantised
from shoal.ops.quant_tiles import ROW_TILE, TILE, UE8M0, Scales

ROWS = 32  # that one program quantises


def rows(x_TK: Tensor, scales: Scales) -> Quantised:
    """quant_tiles.row_tiles: codes [T, K], scales [T, B] lying column by column."""
    (T, K), made = x_TK.shape, _room(x_TK, scales)
    if T:
        _rows[_row_grid(T, K)](x_TK, x_TK.stride(0), *_parts(made), T, K, ROWS, TILE)
    return made


def swiglu(gate_TK: Tensor, up_TK: Tensor, scales: Scales) -> Quantised:
    """The tiles of silu(gate) · up; gate and up may be halves of one tensor."""
    assert gate_TK.shape == up_TK.shape and up_TK.stride(1) == 1, (gate_TK.shape, up_TK.shape, up_TK.stride())
    (T, K), made = gate_TK.shape, _room(gate_TK, scales)
    if T:
        _swiglu[_row_grid(T, K)](gate_TK, up_TK, gate_TK.stride(0), up_TK.stride(0), *_parts(made), T, K, ROWS, TILE)
    return made


def rms_norm(x_TK: Tensor, weight_K: Tensor, eps: float, scales: Scales) -> tuple[Tensor, Quantised]:
    """x / rms(x) · weight, and its tiles. One program a row, which it keeps in registers: K up to some 16,384."""
    (T, K), y_TK, made = x_TK.shape, x_TK.new_empty(x_TK.shape), _room(x_TK, scales)
    B2 = triton.next_power_of_2(triton.cdiv(K, TILE))
    if T:
        _rms_norm[(T,)](x_TK, x_TK.stride(0), weight_K, y_TK, *_parts(made), T, K, eps, B2, TILE)
    return y_TK, made


def blocks(weight: Tensor, scales: Scales) -> Quantised:
    """quant_tiles.block_tiles of [N, K] or a stack of them."""
    weight = weight.contiguous()
    (*outer, N, K), E = weight.shape, weight.shape[:-2].numel()
    grid = triton.cdiv(N, TILE), triton.cdiv(K, TILE)
    made = Quantised(
        "fp8", torch.empty_like(weight, dtype=FP8), weight.new_empty(*outer, *grid, dtype=_dtype(scales)), FP8_BLOCK
    )
    _blocks[(*grid, E)](weight, *_parts(made), N, K, TILE)
    return made


def columns(x_MK: Tensor, counts_E: Tensor, scales: Scales) -> Quantised:
    """xᵀ [K, S] in 1 × 128 tiles: each expert's rows of x are lengthened by zeros to whole tiles.

    S is bounded without asking the GPU for the counts; slots behind the last expert's stay unwritten.
    """
    (M, K), E = x_MK.shape, len(counts_E)
    tiles = M // TILE + E  # the most that E runs of M rows in all can take
    kept = x_MK.new_empty(tiles, K, dtype=_dtype(scales)).t()
    made = Quantised("fp8", x_MK.new_empty(K, tiles * TILE, dtype=FP8), kept, ROW_TILE)
    assert x_MK.stride(1) == 1, x_MK.stride()
    grid, E2 = (tiles, triton.cdiv(K, TILE)), triton.next_power_of_2(E)
    _columns[grid](x_MK, x_MK.stride(0), *_parts(made), counts_E, K, tiles * TILE, E, E2, TILE)
    return made


def _room(x_TK: Tensor, scales: Scales) -> Quantised:
    T, K = x_TK.shape
    assert x_TK.stride(1) == 1, x_TK.stride()
    kept = x_TK.new_empty(triton.cdiv(K, TILE), T, dtype=_dtype(scales)).t()
    return Quantised("fp8", x_TK.new_empty(T, K, dtype=FP8), kept, ROW_TILE)


def _dtype(scales: Scales) -> torch.dtype:
    return torch.float32 if scales == "fp32" else UE8M0


def _parts(made: Quantised) -> tuple[Tensor, Tensor]:
    return made.codes, scale_bytes(made)


def scale_bytes(x: Quantised) -> Tensor:
    """Scales as kernels take them: powers of two as their bytes, which Triton has no type for."""
    return x.scales.view(torch.uint8) if x.scales.dtype is UE8M0 else x.scales


def _row_grid(T: int, K: int) -> tuple[int, int]:
    return triton.cdiv(T, ROWS), triton.cdiv(K, TILE)


@triton.jit
def power(byte):
    """What a byte of UE8M0 stands for."""
    return tl.where(byte == 255, float("nan"), (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True))


@triton.jit
def scaled(values, AXIS: tl.constexpr, kept: tl.constexpr):
    """(values / scale, scale as fp32, scale as it is kept) of tiles along an axis, or of all (None).

    The maximum is taken of bits, as of integers: there NaN is more than infinity, and infinity more than all else.
    """
    bits = values.to(tl.uint32, bitcast=True) & 0x7FFFFFFF
    amax = tl.max(bits, AXIS).to(tl.float32, bitcast=True)
    scale = tl.div_rn(tl.maximum(amax, 1e-4, propagate_nan=tl.PropagateNan.ALL), 448.0)
    as_kept = scale
    if kept == tl.uint8:  # up to a power of two: all but nothing is added to the exponent
        byte = tl.minimum((scale.to(tl.uint32, bitcast=True) + 0x7FFFFF) >> 23, 255)
        as_kept, scale = byte.to(tl.uint8), power(byte)
    across = scale if AXIS is None else tl.expand_dims(scale, AXIS)
    return tl.div_rn(values, tl.broadcast_to(across, values.shape)), as_kept


@triton.jit
def place(block, counts, E: tl.constexpr, E2: tl.constexpr, ROWS: tl.constexpr):
    """(expert, first row, its expert's end) of a block of ROWS rows, counted over experts; expert ≥ E: there is none.

    Every program adds the counts up for itself: there is no table to make first.
    """
    e = tl.arange(0, E2)
    counts_E = tl.load(counts + e, mask=e < E, other=0).to(tl.int32)
    blocks_E = (counts_E + ROWS - 1) // ROWS
    expert = tl.sum((tl.cumsum(blocks_E, 0) <= block).to(tl.int32), 0)
    first = tl.sum(tl.where(e < expert, blocks_E, 0), 0)
    start = tl.sum(tl.where(e < expert, counts_E, 0), 0)
    end = start + tl.sum(tl.where(e == expert, counts_E, 0), 0)
    return expert, start + (block - first) * ROWS, end


@triton.jit
def _store_rows(values, t, k, codes, scales, T, K):
    """Values [rows, TILE] at rows t and columns k, one tile wide."""
    made, scale = scaled(values, 1, scales.dtype.element_ty)
    inside = (t < T)[:, None] & (k < K)[None, :]
    tl.store(codes + t.to(tl.int64)[:, None] * K + k[None, :], made.to(tl.float8e4nv), mask=inside)
    tl.store(scales + tl.program_id(1).to(tl.int64) * T + t, scale, mask=t < T)


@triton.jit
def _rows(x, stride, codes, scales, T, K, ROWS: tl.constexpr, TILE: tl.constexpr):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (t < T)[:, None] & (k < K)[None, :]
    values = tl.load(x + t.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    _store_rows(values, t, k, codes, scales, T, K)


@triton.jit
def _swiglu(gate, up, gate_stride, up_stride, codes, scales, T, K, ROWS: tl.constexpr, TILE: tl.constexpr):
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.program_id(1) * TILE + tl.arange(0, TILE)
    row, inside = t.to(tl.int64)[:, None], (t < T)[:, None] & (k < K)[None, :]
    g = tl.load(gate + row * gate_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    values = (g * tl.sigmoid(g) * u).to(gate.dtype.element_ty).to(tl.float32)
    _store_rows(values, t, k, codes, scales, T, K)


@triton.jit
def _rms_norm(x, stride, weight, y, codes, scales, T, K, eps, B2: tl.constexpr, TILE: tl.constexpr):
    """One row, as B2 tiles of TILE."""
    t, b = tl.program_id(0).to(tl.int64), tl.arange(0, B2)
    k = b[:, None] * TILE + tl.arange(0, TILE)[None, :]
    values = tl.load(x + t * stride + k, mask=k < K, other=0.0).to(tl.float32)
    root = tl.sqrt_rn(tl.sum(tl.sum(values * values, 1), 0) / K + eps)
    values = values / root * tl.load(weight + k, mask=k < K, other=0.0).to(tl.float32)
    normed = values.to(x.dtype.element_ty)
    made, scale = scaled(normed.to(tl.float32), 1, scales.dtype.element_ty)
    tl.store(y + t * K + k, normed, mask=k < K)
    tl.store(codes + t * K + k, made.to(tl.float8e4nv), mask=k < K)
    tl.store(scales + b.to(tl.int64) * T + t, scale, mask=b * TILE < K)


@triton.jit
def _blocks(weight, codes, scales, N, K, TILE: tl.constexpr):
    i, j, e = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    n, k = i * TILE + tl.arange(0, TILE)[:, None], j * TILE + tl.arange(0, TILE)[None, :]
    inside, where = (n < N) & (k < K), (e * N + n) * K + k
    values = tl.load(weight + where, mask=inside, other=0.0).to(tl.float32)
    made, scale = scaled(values, None, scales.dtype.element_ty)
    tl.store(codes + where, made.to(tl.float8e4nv), mask=inside)
    tl.store(scales + (e * tl.num_programs(0) + i) * tl.num_programs(1) + j, scale)


@triton.jit
def _columns(x, stride, codes, scales, counts, K, S, E: tl.constexpr, E2: tl.constexpr, TILE: tl.constexpr):
    """128 rows of one expert × 128 columns, turned."""
    tile = tl.program_id(0)
    expert, row, end = place(tile, counts, E, E2, TILE)
    if expert >= E:
        return
    m, k = row + tl.arange(0, TILE), tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (m < end)[:, None] & (k < K)[None, :]
    values = tl.load(x + m.to(tl.int64)[:, None] * stride + k[None, :], mask=inside, other=0.0).to(tl.float32)
    made, scale = scaled(values, 0, scales.dtype.element_ty)
    slot = tile * TILE + tl.arange(0, TILE)
    where = codes + k.to(tl.int64)[:, None] * S + slot[None, :]
    tl.store(where, tl.trans(made.to(tl.float8e4nv)), mask=(k < K)[:, None])
    tl.store(scales + tile.to(tl.int64) * K + k, scale, mask=k < K)
