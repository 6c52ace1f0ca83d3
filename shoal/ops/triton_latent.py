"""Absorbed latent attention over pages on a GPU, one new token a stream, in Triton: reference.paged_latent_attention.

    o_h = Σ_s softmax_s(scale · q_h · k_s) c_s        k_s = [c_s, k_rope_s], the same for all heads h

All heads of a token read one cache row, so a program takes many heads at once and a row comes from memory once: with
H heads 2 H (W + C) operations on 2 W bytes. Few streams with long contexts would leave most of a GPU idle, so each
context is cut into splits, attended to side by side with the maximum and sum of its own softmax (FlashAttention-2's
online one, arXiv 2307.08691), and put together in a second pass (flash decoding). A stream's own length is what is cut:
ragged streams do work as they are long.

Shapes: T tokens, H heads, P pages of U tokens, C latent, R rope dims, W = C + R, S splits; A heads and B tokens a tile.
"""
# pyright: reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
WAVES = 2  # programs a multiprocessor that a call aims at
LONG = 16  # pages from which on calls are tuned apart
PAGES = 4  # a split has at least, else putting together costs more than it saves
REGISTERS = 128  # of a thread, for sums: more of them spill


def paged_latent_attention(
    q_THW: Tensor, latent_PUW: Tensor, table_TP: Tensor, seen_T: Tensor, C: int, scale: float, splits: int | None = None
) -> Tensor:
    """[T, H, C]: each query over the first `seen_T` tokens of its own row of pages, in as many splits as pay."""
    (T, H, W), U = q_THW.shape, latent_PUW.shape[1]
    assert latent_PUW.is_contiguous() and table_TP.stride(1) == 1, (latent_PUW.stride(), table_TP.stride())
    A = heads_at_once(H, q_THW.device)
    S = splits or how_many(T * triton.cdiv(H, A), table_TP.shape[1], q_THW.device)
    o_THC = q_THW.new_empty(T, H, C)
    if not T:
        return o_THC
    q_THW = q_THW.to(latent_PUW.dtype).contiguous()
    part_TSHC, lse_TSH = (q_THW.new_empty(T, S, H, n, dtype=torch.float32) for n in (C, 1))
    C2, R2 = (max(16, triton.next_power_of_2(n)) for n in (C, W - C))
    _attend[(triton.cdiv(H, A) * T, S)](
        q_THW, latent_PUW, table_TP, table_TP.stride(0), seen_T, part_TSHC, lse_TSH, H, scale * LOG2_E,
        C, W - C, U, A, C2, R2, table_TP.shape[1] > LONG,
    )  # fmt: skip
    _merge[(T * H,)](part_TSHC, lse_TSH, o_THC, H, S, C, C2)
    return o_THC


def takes(latent_PUW: Tensor, table_TP: Tensor) -> bool:
    """16 bits: in fp32, V3's queries and rows of its cache have no room in the shared memory of a 4090."""
    return latent_PUW.dtype.itemsize == 2 and latent_PUW.is_contiguous() and table_TP.stride(1) == 1


def heads_at_once(H: int, device: torch.device) -> int:
    """64 where a multiprocessor has room for V3's 64 queries and 32 rows of its cache (A100, H100, H200), 32 on others;
    no more than there are, no fewer than tensor cores take."""
    most = 64 if device.type != "cuda" or shared_bytes(device) >= 147_456 else 32
    return min(most, max(16, triton.next_power_of_2(H)))


def shared_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def how_many(programs: int, pages: int, device: torch.device) -> int:
    """Splits that fill a GPU which has so many programs without any."""
    wanted = WAVES * torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(wanted // programs, pages // PAGES))


def _configs() -> list[triton.Config]:
    """(B, warps, stages). What doesn't fit into a chip's shared memory is left out by the tuner."""
    sizes = [(64, 8, 2), (32, 8, 2), (16, 8, 2), (64, 4, 3), (32, 4, 3), (16, 4, 3)]
    sizes = sizes[1:2] if triton.knobs.runtime.interpret else sizes
    return [triton.Config({"B": B}, num_warps=warps, num_stages=stages) for B, warps, stages in sizes]


def _fitting(configs: list[triton.Config], named: dict, **more) -> list[triton.Config]:
    sums = named["A"] * triton.next_power_of_2(named["C"]) // 32
    return [config for config in configs if sums <= REGISTERS * config.num_warps] or configs


@triton.autotune(_configs(), key=["A", "C", "R", "FAR"], prune_configs_by={"early_config_prune": _fitting})
@triton.jit
def _attend(
    q, latent, table, table_stride, seen, part, lse, H, scale,
    C: tl.constexpr, R: tl.constexpr, U: tl.constexpr,
    A: tl.constexpr, C2: tl.constexpr, R2: tl.constexpr, FAR: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    """A heads of one token over one split of its context. `scale` is for powers of two."""
    split, S, tiles = tl.program_id(1), tl.num_programs(1), tl.cdiv(H, A)
    t, h = tl.program_id(0) // tiles, tl.program_id(0) % tiles * A + tl.arange(0, A)
    c, r = tl.arange(0, C2), tl.arange(0, R2)
    q += (t.to(tl.int64) * H + h)[:, None] * (C + R)
    q_c = tl.load(q + c[None, :], mask=(h < H)[:, None] & (c < C)[None, :], other=0.0)
    q_r = tl.load(q + C + r[None, :], mask=(h < H)[:, None] & (r < R)[None, :], other=0.0)
    length = tl.load(seen + t).to(tl.int32)
    share = tl.cdiv(tl.cdiv(length, U), S) * U  # tokens of a split: whole pages
    most, norm = tl.full((A,), -float("inf"), tl.float32), tl.zeros((A,), tl.float32)
    total = tl.zeros((A, C2), tl.float32)
    for start in range(split * share, min((split + 1) * share, length), B):
        page = tl.load(table + t.to(tl.int64) * table_stride + start // U).to(tl.int64)
        token = start % U + tl.arange(0, B)
        rows = latent + (page * U + token)[:, None] * (C + R)
        c_BC = tl.load(rows + c[None, :], mask=(c < C)[None, :], other=0.0)
        r_BR = tl.load(rows + C + r[None, :], mask=(r < R)[None, :], other=0.0)
        scores = tl.dot(q_c, c_BC.T, input_precision="ieee")
        scores = tl.dot(q_r, r_BR.T, scores, input_precision="ieee") * scale
        scores = tl.where((start + tl.arange(0, B) < length)[None, :], scores, -float("inf"))
        highest = tl.maximum(most, tl.max(scores, 1))
        p, fade = tl.exp2(scores - highest[:, None]), tl.exp2(most - highest)
        norm = norm * fade + tl.sum(p, 1)
        total = tl.dot(p.to(c_BC.dtype), c_BC, total * fade[:, None], input_precision="ieee")
        most = highest
    norm_or_1 = tl.where(norm > 0, norm, 1.0)  # an empty split weighs nothing
    out = (t.to(tl.int64) * S + split) * H + h
    tl.store(part + out[:, None] * C + c[None, :], total / norm_or_1[:, None], mask=(h < H)[:, None] & (c < C)[None, :])
    tl.store(lse + out, most + tl.log2(norm_or_1), mask=h < H)


@triton.jit
def _merge(part, lse, o, H, S, C: tl.constexpr, C2: tl.constexpr, S2: tl.constexpr = 16):
    """One head of one token: splits weighed by what their softmaxes summed to, as many at a time as registers hold."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, C2)
    t, h = row // H, row % H
    most, norm, total = -float("inf"), 0.0, tl.zeros((C2,), tl.float32)
    for first in range(0, S, S2):
        s = first + tl.arange(0, S2)
        where = (t * S + s) * H + h
        sums = tl.load(lse + where, mask=s < S, other=-float("inf"))
        highest = tl.maximum(most, tl.max(sums, 0))
        weight, fade = tl.exp2(sums - highest), tl.exp2(most - highest)
        parts = tl.load(part + where[:, None] * C + c[None, :], mask=(s < S)[:, None] & (c < C)[None, :], other=0.0)
        total, norm, most = total * fade + tl.sum(parts * weight[:, None], 0), norm * fade + tl.sum(weight, 0), highest
    tl.store(o + row * C + c, (total / norm).to(o.dtype.element_ty), mask=c < C)
