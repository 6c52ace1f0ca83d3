"""Which implementation of each operation runs: the reference, or a fast twin where the machine has one.

The choice is by tensor: bf16 on a CPU with AVX512-BF16 goes to the C kernels (cpu.py), and so does AdamW on fp32
masters there; on a GPU, where Triton is installed, expert rows, attention over a latent cache and weights in few bits
go to its kernels (triton_*.py). Grouped products that the C kernels don't take go to `F.grouped_mm` on a GPU and to
`GroupedLinear`, below, on a CPU; all else is reference.py's. `describe` says it in a line for the log. Shapes are
reference.py's.
"""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from shoal.ops import cpu, program, quant, reference
from shoal.ops.branches import Branches
from shoal.ops.quant import Quantised
from shoal.ops.reference import AdamW, Places, rotate_halves, suffix_attention

__all__ = ["AdamW", "Branches", "Places", "rotate_halves", "suffix_attention"]

GATHER_BYTES = 64 << 20  # of keys copied out of a paged cache at a time


def describe() -> str:
    return f"kernels: {cpu.status()}" + (f", on the GPU {gpu_status()}" if torch.cuda.is_available() else "")


def gpu_status() -> str:
    if triton_kernels():
        return "Triton's for expert rows, latent attention and numbers in 8 and 4 bits, torch's for the rest"
    return "torch's (SHOAL_KERNELS=reference)" if cpu.wanted() == "reference" else "torch's (no Triton here)"


@cache
def triton_kernels() -> bool:
    """Whether tensors on a GPU go to Triton's kernels. The modules that define them are imported when one does."""
    return cpu.wanted() == "native" and find_spec("triton") is not None


def knows_fp8(device: torch.device) -> bool:
    """Whether a GPU has E4M3: from the RTX 4090 and the H100 on. Before, Triton compiles nothing that holds it."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    if x_TD.dim() == 2 and weight_D.dtype is torch.float32 and cpu.takes(x_TD, x_TD.shape[1]):
        return cpu.RMSNorm.apply(x_TD, weight_D, eps)  # type: ignore[return-value]
    return reference.rms_norm(x_TD, weight_D, eps)


def swiglu(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    if gate_TF.dim() == 2 and cpu.takes(gate_TF, gate_TF.shape[1]):
        return cpu.SwiGLU.apply(gate_TF, up_TF)  # type: ignore[return-value]
    return reference.swiglu(gate_TF, up_TF)


def rotate_pairs(x: Tensor, cos_TR2: Tensor, sin_TR2: Tensor) -> Tensor:
    if cpu.takes(x, x.shape[-1]) and all(cpu.takes_dense(angle, torch.float32) for angle in (cos_TR2, sin_TR2)):
        return cpu.RotatePairs.apply(x, cos_TR2, sin_TR2)  # type: ignore[return-value]
    return reference.rotate_pairs(x, cos_TR2, sin_TR2)


def top_k(x_TE: Tensor, k: int) -> Tensor:
    return cpu.top_k(x_TE, k) if cpu.takes_dense(x_TE, torch.float32) else reference.top_k(x_TE, k)


def sort_by_expert(experts_TK: Tensor, n_experts: int) -> Places:
    sort = cpu.sort_by_expert if cpu.takes_dense(experts_TK, torch.int64) else reference.sort_by_expert
    return sort(experts_TK, n_experts)


def gather_rows(x_TD: Tensor, places: Places) -> Tensor:
    if cpu.takes(x_TD, x_TD.shape[1]):
        return cpu.GatherRows.apply(x_TD, places.token_M, places.place_TK)  # type: ignore[return-value]
    if x_TD.is_cuda and triton_kernels():
        from shoal.ops import triton_experts

        return triton_experts.GatherRows.apply(x_TD, places.place_TK)  # type: ignore[return-value]
    return reference.gather_rows(x_TD, places)


def weigh_rows(y_MD: Tensor, weights_TK: Tensor, places: Places) -> Tensor:
    if weights_TK.dtype is torch.float32 and cpu.takes(y_MD, y_MD.shape[1]):
        return cpu.WeighRows.apply(y_MD, weights_TK, places.place_TK)  # type: ignore[return-value]
    if y_MD.is_cuda and triton_kernels():
        from shoal.ops import triton_experts

        return triton_experts.WeighRows.apply(y_MD, weights_TK, places.place_TK)  # type: ignore[return-value]
    return reference.weigh_rows(y_MD, weights_TK, places)


def quantised_linear(x_MK: Tensor, weight: Quantised) -> Tensor:
    """x Wᵀ [M, N] of weights in few bits, in x's dtype. No gradient reaches the weights."""
    learns = x_MK.requires_grad and torch.is_grad_enabled()
    if x_MK.dim() == 2 and x_MK.stride(1) == 1 and not learns and cpu.takes(x_MK) and program.takes(weight):
        return program.linear(x_MK, weight)
    if x_MK.is_cuda and not learns and triton_kernels() and (weight.form != "fp8" or knows_fp8(x_MK.device)):
        from shoal.ops import triton_weights

        if triton_weights.takes(x_MK, weight):
            return triton_weights.linear(x_MK, weight)
    return quant.linear(x_MK, weight)


def linear(x: Tensor, weight_FD: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x Wᵀ (+ b) over the last dimension."""
    if bias_F is None and x.dim() == 2 and cpu.takes_product(x, weight_FD, *weight_FD.shape):
        whole = torch.tensor([0, len(x)])
        return cpu.GroupedLinear.apply(x, weight_FD[None], whole)  # type: ignore[return-value]
    return F.linear(x, weight_FD, bias_F)


def grouped_linear(x_MD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
    if x_MD.is_cuda:
        offsets_E = counts_E.cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_MD, weight_EFD.transpose(1, 2), offs=offsets_E)
    if cpu.takes_product(x_MD, weight_EFD, *weight_EFD.shape[1:]):
        return cpu.GroupedLinear.apply(x_MD, weight_EFD, starts_of(counts_E))  # type: ignore[return-value]
    return GroupedLinear.apply(x_MD, weight_EFD, counts_E)  # type: ignore[return-value]


class GroupedLinear(torch.autograd.Function):
    """The reference's products on a CPU, without its copies, and in few shapes.

    oneDNN builds a kernel for every shape it meets, and experts' row counts never repeat: products of fresh shapes ran
    at 120–145 GFLOP/s a core where known ones ran at 200. So each block is lengthened to a multiple of `ROUND` rows:
    the extra results are overwritten by the next expert's, the extra rows of a weight's gradient multiplied by zero.
    """

    ROUND = 32

    @staticmethod
    def forward(ctx, x_MD: Tensor, weight_EFD: Tensor, counts_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_MD, weight_EFD)
        ctx.blocks = blocks(counts_E.tolist(), GroupedLinear.ROUND)
        y_MF = x_MD.new_empty(len(x_MD), weight_EFD.shape[1])
        for e, start, _, end in ctx.blocks:
            torch.mm(x_MD[start:end], weight_EFD[e].t(), out=y_MF[start:end])
        return y_MF

    @staticmethod
    def backward(ctx, dy_MF: Tensor):
        x_MD, weight_EFD = ctx.saved_tensors
        dy_MF = dy_MF.contiguous()
        dx_MD = torch.empty_like(x_MD)
        for e, start, _, end in ctx.blocks:
            torch.mm(dy_MF[start:end], weight_EFD[e], out=dx_MD[start:end])
        return dx_MD, _weight_gradient(dy_MF, x_MD, ctx.blocks, len(weight_EFD)), None


def grouped_weight_gradient(dy_MF: Tensor, x_MD: Tensor, counts_E: Tensor) -> Tensor:
    """dyᵀ x of each row block: [E, F, D], what `grouped_linear` gives its weight. Zero where an expert has no rows."""
    if x_MD.is_cuda:
        return F.grouped_mm(dy_MF.t(), x_MD, offs=counts_E.cumsum(0, dtype=torch.int32))
    if cpu.takes_product(x_MD, dy_MF, x_MD.shape[1], dy_MF.shape[1]):
        return cpu.weight_gradient(dy_MF, x_MD, starts_of(counts_E))
    return _weight_gradient(dy_MF, x_MD, blocks(counts_E.tolist(), GroupedLinear.ROUND), len(counts_E))


def starts_of(counts: Tensor) -> Tensor:
    """Where each block begins, and where the last one ends."""
    return F.pad(counts.cumsum(0), (1, 0))


def _weight_gradient(dy_MF: Tensor, x_MD: Tensor, spans: Sequence[tuple[int, int, int, int]], E: int) -> Tensor:
    """`spans` are `blocks`."""
    dweight_EFD = x_MD.new_empty(E, dy_MF.shape[1], x_MD.shape[1])
    longest = max((end - start for _, start, _, end in spans), default=0)
    padded = dy_MF.new_empty(longest, dy_MF.shape[1])
    seen = set()
    for e, start, own, end in spans:
        dy = dy_MF[start:end]
        if own < end:
            dy = padded[: end - start]
            dy[: own - start] = dy_MF[start:own]
            dy[own - start :] = 0
        torch.mm(dy.t(), x_MD[start:end], out=dweight_EFD[e])
        seen.add(e)
    for e in set(range(E)) - seen:
        dweight_EFD[e] = 0
    return dweight_EFD


def blocks(counts: Sequence[int], round_to: int) -> list[tuple[int, int, int, int]]:
    """(expert, first row, end of its own rows, end of the lengthened block) of every expert that has rows."""
    total, ends = sum(counts), list(accumulate(counts))
    starts = [end - count for end, count in zip(ends, counts, strict=True)]
    rounded = [
        min(start + -(-count // round_to) * round_to, total) for start, count in zip(starts, counts, strict=True)
    ]
    return [(e, *span) for e, span in enumerate(zip(starts, ends, rounded, strict=True)) if span[1] > span[0]]


def causal_attention(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """softmax(scale · q kᵀ) v inside each segment, every token seeing the earlier ones and itself: [T, H, V].

    G key-value heads serve H query heads in order. `lengths` sum to T.
    """
    if cpu.takes(q_THK, q_THK.shape[-1], v_TGV.shape[-1]):
        where = (
            torch.tensor([0, *accumulate(lengths)]),
            torch.arange(len(q_THK)),
            torch.zeros(len(lengths), dtype=torch.int64),
        )
        return cpu.Attention.apply(q_THK, k_TGK, v_TGV, *where, scale)  # type: ignore[return-value]
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]  # neighbours of equal length in one call
    rows = [length * count for length, count in runs]
    parts = zip(*(x.split(rows) for x in (q_THK, k_TGK, v_TGV)), runs, strict=True)
    return torch.cat([reference.causal_attention(q, k, v, scale, length) for q, k, v, (length, _) in parts])


def branching_attention(q_THK: Tensor, k_TGK: Tensor, v_TGV: Tensor, to: Branches, scale: float) -> Tensor:
    """`causal_attention` of segments that share what they begin with."""
    if cpu.takes(q_THK, q_THK.shape[-1], v_TGV.shape[-1]):
        where = (to.starts, to.rows_M, to.shared)
        return cpu.Attention.apply(q_THK, k_TGK, v_TGV, *where, scale)  # type: ignore[return-value]
    q, k, v = (x.index_select(0, to.rows_M) for x in (q_THK, k_TGK, v_TGV))
    return causal_attention(q, k, v, to.lengths, scale).index_select(0, to.first_T)


def paged_attention(
    q_THK: Tensor, k_PUGK: Tensor, v_PUGV: Tensor, table_TP: Tensor, seen_T: Tensor, scale: float
) -> Tensor:
    """softmax(scale · q kᵀ) v [T, H, V], each query over the first `seen_T` tokens of its own row of pages."""
    rows = _gathered_together(table_TP, 2 * k_PUGK[0].numel())
    parts = zip(q_THK.split(rows), table_TP.split(rows), seen_T.split(rows))
    return torch.cat([reference.paged_attention(q, k_PUGK, v_PUGV, table, seen, scale) for q, table, seen in parts])


def paged_latent_attention(
    q_THW: Tensor, latent_PUW: Tensor, table_TP: Tensor, seen_T: Tensor, C: int, scale: float
) -> Tensor:
    """The same over a latent cache: one key for all heads, whose first C numbers are the value too. [T, H, C]."""
    if q_THW.is_cuda and triton_kernels():
        from shoal.ops import triton_latent

        if triton_latent.takes(latent_PUW, table_TP):
            return triton_latent.paged_latent_attention(q_THW, latent_PUW, table_TP, seen_T, C, scale)
    rows = _gathered_together(table_TP, latent_PUW[0].numel())
    parts = zip(q_THW.split(rows), table_TP.split(rows), seen_T.split(rows))
    return torch.cat(
        [reference.paged_latent_attention(q, latent_PUW, table, seen, C, scale) for q, table, seen in parts]
    )


def _gathered_together(table_TP: Tensor, numbers_a_page: int) -> int:
    """Rows whose pages, copied in fp32, take GATHER_BYTES."""
    return max(1, GATHER_BYTES // (4 * numbers_a_page * max(1, table_TP.shape[1])))


def cross_entropy_(logits_TV: Tensor, targets_T: Tensor, scale: float) -> Tensor:
    """nll [T] (fp32) of each target, 0 where it is negative. Logits become scale · (softmax − onehot)."""
    if logits_TV.is_contiguous() and cpu.takes(logits_TV):
        return cpu.cross_entropy_(logits_TV, targets_T, scale)
    return reference.cross_entropy_(logits_TV, targets_T, scale)


def norm(x: Tensor) -> Tensor:
    return cpu.norm(x) if cpu.takes_dense(x, torch.bfloat16) else reference.norm(x)


def adamw_(p: Tensor, m: Tensor, v: Tensor, grad: Tensor, weight: Tensor | None, c: AdamW) -> None:
    """One AdamW step on the fp32 master p and its moments; `weight` becomes p, rounded. None where p is the weight."""
    step = cpu.adamw_ if cpu.takes_update(p, grad, weight) else reference.adamw_
    step(p, m, v, grad, weight, c)
