"""The arithmetic of the model, written to be read: the executable specification of every fast twin.

Shapes: T tokens, D width, F hidden width, E experts, K chosen, M = T·K routed rows, R rope dims; in attention S
segments of L tokens, H query heads, G key-value heads, K query and key dims, V value dims; over a cache S tokens seen,
P pages of U tokens, W = C + R numbers a token's latent; in losses V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / rms(x) · w (arXiv 1910.07467) over the last dimension, in fp32; the result has x's dtype."""
    x = x_TD.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.float()).type_as(x_TD)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """silu(gate) · up (arXiv 2002.05202) in fp32; the result has gate's dtype."""
    return (F.silu(gate_TF.float()) * up_TF.float()).type_as(gate_TF)


def rotate_pairs(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> Tensor:
    """Turn neighbouring pairs (x0, x1), (x2, x3), …: DeepSeek's layout. x is [T, R] or [T, H, R]; fp32 inside.

    A pair is a complex number and turns by one product: the same numbers as cosines and sines one by one give.
    """
    turn = torch.complex(cos_TR2, sin_TR2)
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * (turn[:, None] if x.dim() == 3 else turn)).flatten(-2).type_as(x)


def rotate_halves(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> Tensor:
    """Turn pairs (x_i, x_{i+R/2}): the layout of Llama and Qwen2. x is [T, H, R]; fp32 inside."""
    cos, sin = cos_TR2[:, None], sin_TR2[:, None]
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).type_as(x)


class Places(NamedTuple):
    """Who sits where once rows are sorted by expert."""

    token_M: Tensor  # the token behind each row
    place_TK: Tensor  # the row of each token's k-th choice
    counts_E: Tensor  # rows an expert gets


def top_k(x_TE: Tensor, k: int) -> Tensor:
    """The indices of each row's k largest [T, k], in any order."""
    return x_TE.topk(k, sorted=False).indices


def sort_by_expert(experts_TK: Tensor, n_experts: int) -> Places:
    """Rows (token, choice) sorted by expert, earlier tokens first."""
    flat = experts_TK.flatten()
    order_M = flat.argsort(stable=True)
    place = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(len(flat), device=flat.device))
    counts_E = torch.bincount(flat, minlength=n_experts)
    return Places(order_M // experts_TK.shape[1], place.view_as(experts_TK), counts_E)


def gather_rows(x_TD: Tensor, places: Places) -> Tensor:
    """Copy each token to the rows where its chosen experts wait: [M, D], M = T·K."""
    return x_TD[places.token_M]


def weigh_rows(y_MD: Tensor, weights_TK: Tensor, places: Places) -> Tensor:
    """The way back: y_t = Σ_K weight · row, summed in fp32; the result has y's dtype."""
    return (y_MD[places.place_TK].float() * weights_TK[..., None]).sum(1).type_as(y_MD)


def grouped_linear(x_MD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e (counts_E[e] rows) times weight e transposed: [M, F].

    Only tests run it, against `GroupedLinear` (cpu.py's and dispatch's) and `F.grouped_mm`: one runs on every device.
    """
    blocks = x_MD.split(counts_E.tolist())
    return torch.cat([F.linear(x, w) for x, w in zip(blocks, weight_EFD, strict=True)])


def causal_attention(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, scale: float, L: int) -> Tensor:
    """softmax(scale · q kᵀ) v over segments of equal length L, end to end: [T, H, V]."""
    q, k, v = (x.unflatten(0, (-1, L)).transpose(1, 2) for x in (q_THK, k_TGK, v_TGV))  # [S, heads, L, dims]
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return o.transpose(1, 2).flatten(0, 1)


def suffix_attention(q_THK: Tensor, k_SGK: Tensor, v_SGV: Tensor, scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v, the queries being the last T of S tokens, each seeing those up to itself: [T, H, V]."""
    (T, H, K), (S, G, V) = q_THK.shape, v_SGV.shape
    q = q_THK.unflatten(1, (G, H // G)).transpose(0, 1).flatten(1, 2)  # [G, T · H/G, K]: heads as more queries
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T).repeat_interleave(H // G, 0)
    v = F.pad(v_SGV, (0, K - V))  # torch's fused attention wants equal widths
    k, v = k_SGK.transpose(0, 1), v.transpose(0, 1)
    o = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=seen, scale=scale)[0]
    return o.unflatten(1, (T, H // G)).transpose(0, 1).flatten(1, 2)[..., :V]


def paged_attention(
    q_THK: Tensor, k_PUGK: Tensor, v_PUGV: Tensor, table_TP: Tensor, seen_T: Tensor, scale: float
) -> Tensor:
    """softmax(scale · q kᵀ) v [T, H, V], each query over the first `seen_T` tokens of its own row of pages.

    fp32 inside. Rows of `table_TP` are padded with any page.
    """
    k_TSGK, v_TSGV = (kept[table_TP].flatten(1, 2).float() for kept in (k_PUGK, v_PUGV))
    q_TGHK = q_THK.float().unflatten(1, (k_TSGK.shape[2], -1))
    scores_TGHS = torch.einsum("tghk,tsgk->tghs", q_TGHK, k_TSGK) * scale
    unseen_TS = torch.arange(k_TSGK.shape[1], device=seen_T.device) >= seen_T[:, None]
    p_TGHS = scores_TGHS.masked_fill(unseen_TS[:, None, None], -torch.inf).softmax(-1)
    return torch.einsum("tghs,tsgv->tghv", p_TGHS, v_TSGV).flatten(1, 2).type_as(q_THK)


def paged_latent_attention(
    q_THW: Tensor, latent_PUW: Tensor, table_TP: Tensor, seen_T: Tensor, C: int, scale: float
) -> Tensor:
    """paged_attention with one key for all heads, whose first C numbers are the value too: [T, H, C]."""
    keys_TSW = latent_PUW[table_TP].flatten(1, 2).float()
    scores_THS = torch.bmm(q_THW.float(), keys_TSW.mT) * scale
    unseen_TS = torch.arange(keys_TSW.shape[1], device=seen_T.device) >= seen_T[:, None]
    p_THS = scores_THS.masked_fill(unseen_TS[:, None], -torch.inf).softmax(-1)
    return torch.bmm(p_THS, keys_TSW[..., :C]).type_as(q_THW)


def cross_entropy_(logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
    """−log softmax at each target, 0 where it is negative; the logits become scale · (softmax − onehot), in place."""
    counted, index = targets_T >= 0, targets_T.clamp(min=0)[:, None]
    log_p = logits_TV.float().log_softmax(-1)
    nll_T = -log_p.gather(1, index)[:, 0] * counted
    grad = log_p.exp_().scatter_add_(1, index, -torch.ones_like(index, dtype=log_p.dtype))
    logits_TV.copy_(grad.mul_(scale * counted[:, None]))
    return nll_T


def norm(x: Tensor) -> Tensor:
    """√Σx² over all numbers, in fp32."""
    return torch.linalg.vector_norm(x, dtype=torch.float32)


class AdamW(NamedTuple):
    """The numbers of one AdamW step. `size` and `root` correct for moments that began at zero."""

    clip: float  # what the gradient is multiplied by
    lr: float
    beta1: float
    beta2: float
    eps: float
    decay: float
    size: float  # lr / (1 − beta1ᵗ)
    root: float  # 1 / √(1 − beta2ᵗ)


def adamw_(p: Tensor, m: Tensor, v: Tensor, grad: Tensor, weight: Tensor | None, c: AdamW) -> None:
    """One AdamW step (arXiv 1711.05101) on the fp32 master p and its moments m, v; `weight` becomes p, rounded.

    m, v ← means of g, g²    p ← p (1 − lr·decay) − size · m / (√v · root + eps)
    """
    g = grad.float() * c.clip
    m.mul_(c.beta1).add_(g, alpha=1 - c.beta1)
    v.mul_(c.beta2).addcmul_(g, g, value=1 - c.beta2)
    p.mul_(1 - c.lr * c.decay).addcdiv_(m, (v.sqrt() * c.root).add_(c.eps), value=-c.size)
    if weight is not None:
        weight.copy_(p)
