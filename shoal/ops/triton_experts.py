"""Rows to their experts and back on a GPU, in Triton: twins of reference.gather_rows and weigh_rows, both ways.

    gather    row place[t, k] ← x_t                      its backward   dx_t = Σ_k drow
    weigh     y_t = Σ_k weight[t, k] · row place[t, k]   its backward   drow = weight · dy_t, dweight = dy_t · row

A program is a token and a piece of its width: it reads its token once, whatever K is, and each sum has one writer, so
equal runs give equal bits. Sums are fp32; results have the rows' dtype.
Shapes: T tokens, K chosen, M = T·K rows, D width.
"""
# pyright: reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 1024


class GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD: Tensor, place_TK: Tensor) -> Tensor:
        ctx.save_for_backward(place_TK)
        (T, K), D, x_TD = place_TK.shape, x_TD.shape[1], x_TD.contiguous()
        y_MD = x_TD.new_empty(T * K, D)
        if T:
            _gather[(T, triton.cdiv(D, WIDTH))](x_TD, place_TK, y_MD, D, K, WIDTH)
        return y_MD

    @staticmethod
    def backward(ctx, dy_MD: Tensor):
        return summed(dy_MD.contiguous(), None, *ctx.saved_tensors), None


class WeighRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_MD: Tensor, weights_TK: Tensor, place_TK: Tensor) -> Tensor:
        y_MD, weights_TK = y_MD.contiguous(), weights_TK.contiguous()
        ctx.save_for_backward(y_MD, weights_TK, place_TK)
        return summed(y_MD, weights_TK, place_TK)

    @staticmethod
    def backward(ctx, dy_TD: Tensor):
        y_MD, weights_TK, place_TK = ctx.saved_tensors
        (T, K), D = place_TK.shape, y_MD.shape[1]
        dy_MD, dweights_TK = torch.empty_like(y_MD), torch.empty_like(weights_TK)
        if T:
            _unweigh[(T, K)](dy_TD.contiguous(), y_MD, weights_TK, place_TK, dy_MD, dweights_TK, D, K, WIDTH)
        return dy_MD, dweights_TK, None


def summed(y_MD: Tensor, weights_TK: Tensor | None, place_TK: Tensor) -> Tensor:
    """Σ_k weight · row [T, D]; no weights: 1."""
    (T, K), D = place_TK.shape, y_MD.shape[1]
    y_TD = y_MD.new_empty(T, D)
    if T:
        _sum[(T, triton.cdiv(D, WIDTH))](y_MD, weights_TK, place_TK, y_TD, D, K, WIDTH)
    return y_TD


@triton.jit
def _gather(x, place, y, D, K: tl.constexpr, WIDTH: tl.constexpr):
    t, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    token = tl.load(x + t * D + d, mask=d < D)
    for k in range(K):
        tl.store(y + tl.load(place + t * K + k) * D + d, token, mask=d < D)


@triton.jit
def _sum(y, weights, place, out, D, K: tl.constexpr, WIDTH: tl.constexpr):
    t, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for k in range(K):
        row = tl.load(y + tl.load(place + t * K + k) * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += row if weights is None else row * tl.load(weights + t * K + k)
    tl.store(out + t * D + d, total.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _unweigh(dy, y, weights, place, dy_rows, dweights, D, K: tl.constexpr, WIDTH: tl.constexpr):
    """One choice of one token, all its width."""
    t, k = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, weight = tl.load(place + t * K + k), tl.load(weights + t * K + k)
    total = tl.zeros((WIDTH,), tl.float32)
    for first in range(0, D, WIDTH):
        d = first + tl.arange(0, WIDTH)
        grad = tl.load(dy + t * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += grad * tl.load(y + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        tl.store(dy_rows + row * D + d, (grad * weight).to(dy_rows.dtype.element_ty), mask=d < D)
    tl.store(dweights + t * K + k, tl.sum(total, 0))
