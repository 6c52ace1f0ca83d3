"""KL(student ‖ teacher) over the whole vocabulary, without logits ever standing whole in memory.

    loss = scale · Σ_t Σ_v p_tv (log p_tv − log q_tv)          p = softmax(W h), q = softmax(W' h'), over the rows asked
    ∂/∂z_tv = scale · p_tv (log p_tv − log q_tv − KL_t)        z = W h

The reverse direction makes a student drop what its teacher would not say, where cross-entropy on the teacher's samples
makes it cover all of it (MiniLLM, arXiv 2306.08543; on-policy distillation, arXiv 2306.13649). As in `train/loss.py`,
loss and both gradients are taken chunk by chunk in the forward pass.

Shapes: T tokens, R rows asked, D model width of the student, E of the teacher, V vocabulary.
"""

import torch
from torch import Tensor

CHUNK_BYTES = 32 << 20  # of one fp32 matrix of logits; about five of them stand at once


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_TD: Tensor, weight_VD: Tensor, h_TE: Tensor, weight_VE: Tensor, asked_T: Tensor, scale: float):
        rows_R = asked_T.nonzero()[:, 0]
        dh_TD, dweight_VD = torch.zeros_like(h_TD), torch.zeros_like(weight_VD)
        exact = torch.promote_types(h_TD.dtype, torch.float32)
        loss = torch.zeros((), dtype=exact, device=h_TD.device)
        for rows in rows_R.split(max(1, CHUNK_BYTES // (4 * len(weight_VD)))):
            h = h_TD[rows]
            log_p = (h @ weight_VD.t()).to(exact).log_softmax(-1)
            gap = log_p - (h_TE[rows] @ weight_VE.t()).to(exact).log_softmax(-1)
            p = log_p.exp_()
            kl = (p * gap).sum(-1, keepdim=True)
            loss += kl.sum()
            dz = gap.sub_(kl).mul_(p).mul_(scale).to(h.dtype)
            dh_TD[rows] = dz @ weight_VD
            dweight_VD.addmm_(dz.t(), h)
        ctx.save_for_backward(dh_TD, dweight_VD)
        return loss * scale

    @staticmethod
    def backward(ctx, upstream: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        dh_TD, dweight_VD = ctx.saved_tensors
        factor = upstream.item()
        if factor != 1:
            dh_TD, dweight_VD = dh_TD * factor, dweight_VD * factor
        return dh_TD, dweight_VD, None, None, None, None


def reverse_kl(
    h_TD: Tensor, weight_VD: Tensor, teacher_h_TE: Tensor, teacher_weight_VE: Tensor, asked_T: Tensor, scale: float
) -> Tensor:
    """`asked_T` (bool) says which rows count. Gradients reach `h_TD` and `weight_VD` only."""
    return _ReverseKL.apply(h_TD, weight_VD, teacher_h_TE, teacher_weight_VE, asked_T, scale)  # type: ignore[return-value]
