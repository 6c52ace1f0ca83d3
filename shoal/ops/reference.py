"""The arithmetic of the model, written to be read: the executable specification that every fast twin is tested against.

Shapes: T tokens, D width, F hidden width, H heads, R rope dims, V vocabulary.
"""

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
    """Turn neighbouring pairs (x0, x1), (x2, x3), …: DeepSeek's interleaved layout. x is [T, R] or [T, H, R]; fp32 inside."""
    if x.dim() == 3:
        cos_TR2, sin_TR2 = cos_TR2[:, None], sin_TR2[:, None]
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos_TR2 - b * sin_TR2, a * sin_TR2 + b * cos_TR2), -1).flatten(-2).type_as(x)


def rotate_halves(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> Tensor:
    """Turn pairs (x_i, x_{i+R/2}): the layout of Llama and Qwen2. x is [T, H, R]; fp32 inside."""
    cos, sin = cos_TR2[:, None], sin_TR2[:, None]
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).type_as(x)


def sort_by_expert(experts_TK: Tensor, n_experts: int) -> tuple[Tensor, Tensor]:
    """order_M: the flat (token, choice) pairs sorted by expert, earlier tokens first; counts_E: rows an expert gets."""
    flat = experts_TK.flatten()
    return flat.argsort(stable=True), torch.bincount(flat, minlength=n_experts)


def gather_rows(x_TD: Tensor, order_M: Tensor, K: int) -> Tensor:
    """Copy each token to the rows where its chosen experts wait: [M, D], M = T·K."""
    return x_TD[order_M // K]


def weigh_rows(y_MD: Tensor, weights_TK: Tensor, order_M: Tensor) -> Tensor:
    """The way back: y_t = Σ_K weight · row, summed in fp32; the result has y's dtype."""
    T, K = weights_TK.shape
    y_TKD = torch.zeros_like(y_MD).index_copy(0, order_M, y_MD).unflatten(0, (T, K))
    return (y_TKD.float() * weights_TK[..., None]).sum(1).type_as(y_MD)


def grouped_linear(x_MD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    """Row block e (counts_E[e] rows) times weight e transposed: [M, F]."""
    blocks = x_MD.split(counts_E.tolist())
    return torch.cat([F.linear(x, w) for x, w in zip(blocks, weight_EFD, strict=True)])
