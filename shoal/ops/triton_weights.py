"""x Wᵀ of weights in 8 or 4 bits on a GPU, in Triton: quant.linear without a dequantised weight in memory.

    y[m, n] = Σ_g scale[n, g] · Σ_{k in g} code[n, k] · x[m, k]  (+ least[n, g] · Σ_{k in g} x[m, k])

Codes are read once, in the bits they are kept in, turned into x's dtype in registers, where all of them are exact, and
multiplied there; each group's sum is scaled in fp32. Codes are the left factor: single tokens then fill a tensor core's
short side. Of int4's two numbers a byte the even ones meet x's even columns, the odd ones its odd.

Shapes: M rows, N outputs, K inputs.
"""
# pyright: reportIndexIssue=false

import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.quant import Quantised

STEP, LEAST_STEP = 128, 32  # of K at a time, a power of two that divides groups; int4's halves need 16 each
FEW = 16  # rows up to which weights are all that counts


def takes(x_MK: Tensor, weight: Quantised) -> bool:
    dense = weight.codes.dim() == 2 and weight.codes.is_contiguous()
    return x_MK.dim() == 2 and x_MK.stride(1) == 1 and dense and step_of(weight) >= LEAST_STEP


def step_of(weight: Quantised) -> int:
    """Whole rows may be groups, and of any length: 10,944 goes by 64."""
    group = weight.block[1]
    return min(STEP, group & -group)


def linear(x_MK: Tensor, weight: Quantised) -> Tensor:
    """[M, N] in x's dtype."""
    (M, K), (N, _), (rows, group) = x_MK.shape, weight.shape, weight.block
    assert takes(x_MK, weight), (x_MK.shape, x_MK.stride(), weight.block, weight.codes.stride())
    y_MN = x_MK.new_empty(M, N)
    least = None if weight.least is None else weight.least.contiguous()
    grid = lambda config: (triton.cdiv(M, config["BM"]) * triton.cdiv(N, config["BN"]),)  # noqa: E731
    if M:
        _linear[grid](
            x_MK, x_MK.stride(0), weight.codes, weight.scales.contiguous(), least, y_MN, M, N, K,
            weight.form, rows, group, step_of(weight), M <= FEW,
        )  # fmt: skip
    return y_MN


def _configs() -> list[triton.Config]:
    """(rows of x, rows of W, warps, stages): the first few for single tokens, the others for prompts."""
    sizes = [(16, 32, 4, 5), (16, 64, 4, 4), (16, 128, 8, 4), (64, 128, 4, 3), (128, 128, 8, 3), (128, 64, 4, 3)]
    sizes = sizes[1:2] if triton.knobs.runtime.interpret else sizes
    return [triton.Config({"BM": BM, "BN": BN}, num_warps=warps, num_stages=s) for BM, BN, warps, s in sizes]


@triton.autotune(_configs(), key=["N", "K", "FORM", "GROUP", "FEW"])
@triton.jit
def _linear(
    x, x_stride, codes, scales, least, y, M, N, K,
    FORM: tl.constexpr, ROWS: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr, FEW: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """A tile [BN, BM] of yᵀ; programs of the same rows of W are neighbours."""
    across, groups = tl.cdiv(M, BM), tl.cdiv(K, GROUP)
    m = tl.program_id(0) % across * BM + tl.arange(0, BM)
    n = tl.program_id(0) // across * BN + tl.arange(0, BN)
    x += m.to(tl.int64)[None, :] * x_stride
    total = tl.zeros((BN, BM), tl.float32)
    for first in range(0, K, STEP):
        place = n // ROWS * groups + first // GROUP
        scale = tl.load(scales + place, mask=n < N, other=0.0).to(tl.float32)
        if FORM == "int4":
            pair = first // 2 + tl.arange(0, STEP // 2)
            byte = tl.load(codes + n.to(tl.int64)[:, None] * (K // 2) + pair[None, :], mask=(n < N)[:, None], other=0)
            even = tl.load(x + 2 * pair[:, None], mask=(m < M)[None, :], other=0.0)
            odd = tl.load(x + 2 * pair[:, None] + 1, mask=(m < M)[None, :], other=0.0)
            zero = 8 if least is None else 0
            part = tl.dot(((byte & 15).to(tl.float32) - zero).to(even.dtype), even, input_precision="ieee")
            part = tl.dot(((byte >> 4).to(tl.float32) - zero).to(odd.dtype), odd, part, input_precision="ieee")
            if least is not None:
                low = tl.load(least + place, mask=n < N, other=0.0).to(tl.float32)
                sums = tl.sum(even.to(tl.float32), 0) + tl.sum(odd.to(tl.float32), 0)
                total += low[:, None] * sums[None, :]
        else:
            k = first + tl.arange(0, STEP)
            inside = (n < N)[:, None] & (k < K)[None, :]
            kept = tl.load(codes + n.to(tl.int64)[:, None] * K + k[None, :], mask=inside, other=0.0)
            values = tl.load(x + k[:, None], mask=(k < K)[:, None] & (m < M)[None, :], other=0.0)
            number = kept if FORM == "fp8" else kept.to(tl.float32) - 128
            part = tl.dot(number.to(values.dtype), values, input_precision="ieee")
        total += part * scale[:, None]
    where = y + m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(where, total.to(y.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])
