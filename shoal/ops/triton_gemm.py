"""Products of E4M3 numbers under block scales on a GPU, dense and grouped by expert, in Triton: for sm_89 and later.

    forward   y  [M, N] = x Wᵀ      Σ_b sx[m, b] · sw[n/128, b] · Σ_{k in b} x·w      `linear(x, w, counts)`
    dgrad     dx [M, K] = dy W      the same with W turned                            `linear(dy, turned(w), counts)`
    wgrad     dW [N, K] = dyᵀ x     Σ_b sdy[n, b] · sx[k, b] · Σ_{m in b} dy·x        `gradient(dy, x, counts)`

b runs over blocks of 128 along the summed dimension. Tensor cores sum one block, with fewer bits than fp32 has (14 on
Hopper); each such sum is then scaled and added in fp32 registers: DeepSeek-V3's promotion (arXiv 2412.19437, 3.3.2).

Rows of E experts lie in runs, `counts` long; one expert is a dense product. A program finds its expert by adding up the
counts, so nothing is read back to the host. Blocks of W stay blocks when it is turned, so dgrad takes a turned copy and
no kernel of its own: operands of 8 bits must lie along the sum anyway. On Hopper tiles come through its copy engine,
by descriptors, elsewhere by plain loads; both want rows of whole 16 bytes.

Shapes: M rows, N outputs, K inputs, E experts, B blocks of the sum, S slots (triton_quant.columns).
"""
# pyright: reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from shoal.ops.quant import FP8_BLOCK, Quantised
from shoal.ops.quant_tiles import ROW_TILE, TILE
from shoal.ops.triton_quant import place, power, scale_bytes

FEW = 64  # rows an expert up to which a product is tuned as one that only reads weights


def linear(
    x: Quantised, weight: Quantised, counts_E: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """x Wᵀ [M, N] of tiles [M, K] and a weight [N, K]; with counts, of a stack [E, N, K] and rows sorted by expert."""
    (M, K), (*_, N, K_w), E = x.codes.shape, weight.shape, 0 if counts_E is None else len(counts_E)
    assert (x.block, weight.block, K) == (ROW_TILE, FP8_BLOCK, K_w), (x.block, weight.block, K, K_w)
    assert K % 16 == 0 and x.scales.stride(0) == 1, (K, x.scales.stride())
    y = x.codes.new_empty(M, N, dtype=dtype)
    engine = has_copy_engine(y)
    operands = _tiled(x.codes, engine), _tiled(weight.codes.view(-1, K), engine)
    scales = scale_bytes(x), scale_bytes(weight).contiguous()
    few, E2 = max(E, 1) * FEW >= M, triton.next_power_of_2(max(E, 1))
    grid = lambda config: ((triton.cdiv(M, config["BM"]) + E) * triton.cdiv(N, config["BN"]),)  # noqa: E731
    if M:
        _linear[grid](*operands, *scales, y, counts_E, M, N, K, E, E2, few, engine)
    return y


def turned(weight: Quantised) -> Quantised:
    """Wᵀ, a copy: what dgrad multiplies by."""
    return Quantised(weight.form, weight.codes.mT.contiguous(), weight.scales.mT.contiguous(), weight.block)


def gradient(dy: Quantised, x: Quantised, counts_E: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """dyᵀ x [E, N, K] of two tensors' `columns` (codes [N, S], [K, S]) by the same counts; 0 where there are none."""
    (N, S), (K, S_x), E = dy.codes.shape, x.codes.shape, len(counts_E)
    assert S_x == S and dy.scales.stride(0) == x.scales.stride(0) == 1, (S, S_x, dy.scales.stride(), x.scales.stride())
    dw = dy.codes.new_empty(E, N, K, dtype=dtype)
    engine = has_copy_engine(dw)
    operands = (_tiled(side.codes, engine) for side in (dy, x))
    grid = lambda config: (triton.cdiv(N, config["BM"]) * triton.cdiv(K, config["BN"]), E)  # noqa: E731
    _gradient[grid](
        *operands, scale_bytes(dy), scale_bytes(x), dw, counts_E, N, K, S, E, triton.next_power_of_2(E), engine
    )
    return dw


def has_copy_engine(x: Tensor) -> bool:
    """Whether descriptors are worth it where x lies: from Hopper on. The interpreter takes them as well."""
    return not x.is_cuda or torch.cuda.get_device_capability(x.device) >= (9, 0)


def _tiled(codes: Tensor, engine: bool) -> TensorDescriptor | Tensor:
    """Read by blocks of one tile, until a launch has its configuration's (`_fit`)."""
    return TensorDescriptor.from_tensor(codes, [TILE, TILE]) if engine else codes


def _fit(named: dict) -> None:
    """A descriptor's block is part of its type: give both operands the configuration's."""
    for name, size in (("a", "BM"), ("b", "BN")):
        if isinstance(named[name], TensorDescriptor):
            named[name].block_shape = [named[size], TILE]


def _configs() -> list[triton.Config]:
    """Tile sizes to try. One program of 8 warps fills a multiprocessor of an H100 or H200; of 4 warps several share
    one, and some promote while others multiply. A 4090 has 99 KiB for stages of (BM + BN) · 128 bytes."""
    sizes = [(128, 128, 8, 4), (128, 128, 8, 3), (64, 128, 4, 5), (64, 128, 4, 3), (128, 64, 4, 4), (64, 64, 4, 5)]
    sizes = sizes[-1:] if triton.knobs.runtime.interpret else sizes
    return [
        triton.Config({"BM": BM, "BN": BN}, num_warps=warps, num_stages=stages, pre_hook=_fit)
        for BM, BN, warps, stages in sizes
    ]


@triton.autotune(_configs(), key=["N", "K", "E", "FEW"])
@triton.jit
def _linear(
    a, b, a_scales, b_scales, y, counts, M, N, K,
    E: tl.constexpr, E2: tl.constexpr, FEW: tl.constexpr, ENGINE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr = 128,
):  # fmt: skip
    """A tile [BM, BN] of y. E = 0: dense. Rows behind an expert's end are read (the next one's) and not written.

    Scales are loaded one block ahead: they would otherwise hold up the product they belong to.
    """
    i, j = _near(tl.program_id(0), tl.num_programs(0), tl.cdiv(N, BN))
    expert, row, end = 0, i * BM, M
    if E > 0:
        expert, row, end = place(i, counts, E, E2, BM)
        if expert >= E:
            return
    m, n, B = row + tl.arange(0, BM), j * BN + tl.arange(0, BN), tl.cdiv(K, TILE)
    a_scales += m
    b_scales += (expert * tl.cdiv(N, TILE) + j * BN // TILE) * B
    scale = _scale(a_scales, m < M) * _scale(b_scales, B > 0)
    total = tl.zeros((BM, BN), tl.float32)
    for block in range(B):
        x = _tile(a, row, block * TILE, M, K, BM, TILE, ENGINE)
        w = _tile(b, expert * N + j * BN, block * TILE, expert * N + N, K, BN, TILE, ENGINE)
        a_scales += M
        next_x = _scale(a_scales, (m < M) & (block + 1 < B))
        next_w = _scale(b_scales + block + 1, block + 1 < B)
        total += tl.dot(x, w.T) * scale[:, None]
        scale = next_x * next_w
    where = y + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(where, total.to(y.dtype.element_ty), mask=(m < end)[:, None] & (n < N)[None, :])


@triton.autotune(_configs(), key=["N", "K", "E"])
@triton.jit
def _gradient(
    a, b, a_scales, b_scales, dw, counts, N, K, S,
    E: tl.constexpr, E2: tl.constexpr, ENGINE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr = 128,
):  # fmt: skip
    """A tile [BM, BN] of one expert's dW: the sum over its tiles of rows."""
    i, j = _near(tl.program_id(0), tl.num_programs(0), tl.cdiv(K, BN))
    expert, e = tl.program_id(1), tl.arange(0, E2)
    n, k = i * BM + tl.arange(0, BM), j * BN + tl.arange(0, BN)
    tiles_E = (tl.load(counts + e, mask=e < E, other=0).to(tl.int32) + TILE - 1) // TILE
    first = tl.sum(tl.where(e < expert, tiles_E, 0), 0)
    last = first + tl.sum(tl.where(e == expert, tiles_E, 0), 0)
    a_scales += first * N + n
    b_scales += first * K + k
    dy_scale = _scale(a_scales, (n < N) & (first < last))
    x_scale = _scale(b_scales, (k < K) & (first < last))
    total = tl.zeros((BM, BN), tl.float32)
    for tile in range(first, last):
        dy = _tile(a, i * BM, tile * TILE, N, S, BM, TILE, ENGINE)
        x = _tile(b, j * BN, tile * TILE, K, S, BN, TILE, ENGINE)
        a_scales += N
        b_scales += K
        next_dy = _scale(a_scales, (n < N) & (tile + 1 < last))
        next_x = _scale(b_scales, (k < K) & (tile + 1 < last))
        total += tl.dot(dy, x.T) * dy_scale[:, None] * x_scale[None, :]
        dy_scale, x_scale = next_dy, next_x
    where = dw + (expert.to(tl.int64) * N + n[:, None]) * K + k[None, :]
    tl.store(where, total.to(dw.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])


@triton.jit
def _tile(source, row, column, rows, width, TALL: tl.constexpr, WIDE: tl.constexpr, ENGINE: tl.constexpr):
    """[TALL, WIDE] of a matrix [rows, width], zeros where it ends; the copy engine may read on to the next expert's."""
    if ENGINE:
        return source.load([row, column])
    else:
        r, c = row + tl.arange(0, TALL), column + tl.arange(0, WIDE)
        inside = (r < rows)[:, None] & (c < width)[None, :]
        return tl.load(source + r.to(tl.int64)[:, None] * width + c[None, :], mask=inside, other=0.0)


@triton.jit
def _scale(where, inside):
    """Scales in fp32, whichever way they are kept; 0 where there are none."""
    kept = tl.load(where, mask=inside, other=0)
    return power(kept) if where.dtype.element_ty == tl.uint8 else kept


@triton.jit
def _near(program, programs, columns, GROUP: tl.constexpr = 8):
    """(row, column) of a program's tile, such that programs side by side in time read rows and columns they share:
    GROUP rows of tiles, column after column, then the next GROUP."""
    rows, wide = programs // columns, GROUP * columns
    first = program // wide * GROUP
    height = min(rows - first, GROUP)
    return first + program % wide % height, program % wide // height
