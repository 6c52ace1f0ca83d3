"""Training leaves in 8 bits: forward, dgrad and wgrad of every product of a block in E4M3 (DeepSeek-V3, section 3.3).

    forward    y  = q(x) q(W)ᵀ            q: tiles of 1 × 128 of activations, blocks of 128 × 128 of weights
    dgrad      dx = q(dy) q(W)
    wgrad      dW = q'(dy)ᵀ q'(x̂)         q': tiles of 128 × 1; x̂ is what was kept of x, tiled anew

Between forward and backward x̂ lies in 8 bits (in 12, E5M6, before attention's out projection), and so do gate and up,
from which SwiGLU's output is made again; policy.py has the table. `swap` puts these leaves in from outside, over the
same parameters: names, checkpoints and optimizer don't notice. `restore` takes them out.

On a CPU these are the numerics of 8-bit training, not its speed. Without a unit for FP8 the operands, rounded to what
8 bits can hold, are multiplied in bf16 with an fp32 sum, which is exact under power-of-two scales (quant_tiles.py);
under fp32 scales they are multiplied in fp32, and take as much longer. On a GPU with Triton they are multiplied as they
are (fp8_tiles.py). A weight's gradient leaves in the weight's dtype.

Shapes: M rows (tokens, or rows sorted by expert), K inputs, N outputs, F hidden, E matrices (1, or experts).
"""

import torch
from torch import Tensor, nn

from shoal.model.layers import Linear, RMSNorm, SwiGLU
from shoal.model.moe import Experts
from shoal.model.transformer import Transformer
from shoal.ops import dispatch as ops
from shoal.ops import fp8_tiles
from shoal.ops.fp8_tiles import Operand
from shoal.ops.quant import Quantised
from shoal.ops.quant_tiles import E5M6, ROW_TILE, Scales
from shoal.precision import policy

WIDER = "fp8      operands of 8 bits, multiplied in wider arithmetic: the numerics of 8-bit training, not its speed"
AS_THEY_ARE = "fp8      operands of 8 bits, multiplied as they are, by Triton's kernels"
REMEMBERED = "_row_tiles"  # attribute of a tensor that several leaves read
BEFORE_LEAVES = ("attn_norm", "q_norm", "kv_norm", "ffn_norm")  # norms whose rows are multiplied in 8 bits


class _Product(torch.autograd.Function):
    """y_e = x_e W_eᵀ of row blocks x_e, W being `weights` one above the other: [M, N]."""

    @staticmethod
    def forward(ctx, x_MK: Tensor, counts_E: Tensor, operand_MK: Tensor, kept, scales: Scales, *weights: Tensor):
        ctx.save_for_backward(counts_E, kept.codes, kept.scales, *weights)
        ctx.kind, ctx.scales = type(kept), scales
        return fp8_tiles.product(operand_MK, fp8_tiles.stacked(weights, len(counts_E), scales), counts_E, x_MK.dtype)

    @staticmethod
    def backward(ctx, dy_MN: Tensor):
        counts_E, codes, row_scales, *weights = ctx.saved_tensors
        matrices_EKN = fp8_tiles.turned(fp8_tiles.stacked(weights, len(counts_E), ctx.scales))
        dx_MK = fp8_tiles.product(fp8_tiles.passing_rows(dy_MN, ctx.scales), matrices_EKN, counts_E, dy_MN.dtype)
        x_MK = _restored(ctx.kind, codes, row_scales, ctx.scales)
        d_ENK = _weight_gradient(dy_MN, x_MK, counts_E, ctx.scales)
        parts = d_ENK.split([w.numel() // len(d_ENK) // d_ENK.shape[2] for w in weights], 1)
        return dx_MK, None, None, None, None, *(d.reshape(w.shape).to(w.dtype) for d, w in zip(parts, weights))


class _SwiGLUDown(torch.autograd.Function):
    """(silu(gate) · up) Wᵀ of row blocks, gate and up being halves of a row; kept is their E4M3 form."""

    @staticmethod
    def forward(ctx, gate_up_M2F: Tensor, counts_E: Tensor, scales: Scales, down_ENF: Tensor):
        kept = fp8_tiles.kept_rows(gate_up_M2F.unflatten(1, (2, -1)).flatten(0, 1), scales)
        ctx.save_for_backward(counts_E, kept.codes, kept.scales, down_ENF)
        ctx.scales = scales
        h_MF = fp8_tiles.swiglu_rows(gate_up_M2F, scales)
        return fp8_tiles.product(h_MF, fp8_tiles.blocks(down_ENF, scales), counts_E, gate_up_M2F.dtype)

    @staticmethod
    def backward(ctx, dy_MN: Tensor):
        counts_E, codes, row_scales, down_ENF = ctx.saved_tensors
        gate_up = _restored(Quantised, codes, row_scales, ctx.scales).to(dy_MN.dtype).unflatten(0, (-1, 2)).flatten(1)
        down_EFN = fp8_tiles.turned(fp8_tiles.blocks(down_ENF, ctx.scales))
        dh_MF = fp8_tiles.product(fp8_tiles.passing_rows(dy_MN, ctx.scales), down_EFN, counts_E, dy_MN.dtype)
        with torch.enable_grad():
            h_MF = ops.swiglu(*gate_up.requires_grad_().chunk(2, -1))
        (dgate_up,) = torch.autograd.grad(h_MF, gate_up, dh_MF)
        ddown_ENF = _weight_gradient(dy_MN, h_MF.detach(), counts_E, ctx.scales)
        return dgate_up, None, None, ddown_ENF.to(down_ENF.dtype)


def _weight_gradient(dy_MN: Tensor, x_MK: Tensor, counts_E: Tensor, scales: Scales) -> Tensor:
    dy, x = (fp8_tiles.columns(each, counts_E, scales) for each in (dy_MN, x_MK))
    return fp8_tiles.weight_gradient(dy, x, counts_E)


def _restored(kind: type, codes: Tensor, row_scales: Tensor, scales: Scales) -> Tensor:
    kept = E5M6(codes, row_scales) if kind is E5M6 else Quantised("fp8", codes, row_scales, ROW_TILE)
    return fp8_tiles.restored(kept, fp8_tiles.operand_dtype(scales))


def _all(x_MK: Tensor) -> Tensor:
    """The counts of one matrix that takes every row."""
    return x_MK.new_full((1,), len(x_MK), dtype=torch.int64)


@torch.no_grad()
def _row_tiles(x_MK: Tensor, scales: Scales) -> tuple[Operand, Quantised]:
    """Made once, and kept once, where several leaves read the same tensor: they lie with it as long as it lives."""
    if x_MK.is_inference():
        return fp8_tiles.rows(x_MK, scales)
    version, made = getattr(x_MK, REMEMBERED, (None, None))
    if made is None or version != x_MK._version:
        made = fp8_tiles.rows(x_MK, scales)
        setattr(x_MK, REMEMBERED, (x_MK._version, made))
    return made


class _Norm(torch.autograd.Function):
    """x / rms(x) · weight, and the codes and scales of its tiles; made again from x in backward."""

    @staticmethod
    def forward(ctx, x_MK: Tensor, weight_K: Tensor, eps: float, scales: Scales):
        ctx.save_for_backward(x_MK, weight_K)
        ctx.eps = eps
        y_MK, tiles = fp8_tiles.normed_rows(x_MK, weight_K, eps, scales)
        ctx.mark_non_differentiable(tiles.codes, tiles.scales)
        return y_MK, tiles.codes, tiles.scales

    @staticmethod
    def backward(ctx, dy_MK: Tensor, *_):
        x_MK, weight_K = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            y_MK = ops.rms_norm(x_MK, weight_K, ctx.eps)
        return *torch.autograd.grad(y_MK, (x_MK, weight_K), dy_MK), None, None


class Fp8Norm(RMSNorm):
    """`RMSNorm` before leaves in 8 bits. On a GPU it makes the tiles that they will ask for, as long as it has the rows
    in registers; elsewhere they are made when they are asked for."""

    def __init__(self, leaf: RMSNorm, scales: Scales):
        nn.Module.__init__(self)
        self.weight, self.eps = leaf.weight, leaf.eps
        self.scales: Scales = scales

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_inference_mode_enabled() or not fp8_tiles.on_gpu(x):
            return super().forward(x)
        y, codes, kept = _Norm.apply(x, self.weight, self.eps, self.scales)  # type: ignore[misc]
        tiles = Quantised("fp8", codes, kept, ROW_TILE)
        setattr(y, REMEMBERED, (y._version, (tiles, tiles)))
        return y


class Fp8Linear(Linear):
    def __init__(self, leaf: Linear, scales: Scales, kept: str):
        nn.Module.__init__(self)
        self.weight, self.bias = leaf.weight, leaf.bias
        self.scales: Scales = scales
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        if self.kept == "e5m6":
            operand, kept = fp8_tiles.passing_rows(x.detach(), self.scales), fp8_tiles.e5m6(x.detach())
        else:
            operand, kept = _row_tiles(x, self.scales)
        y = _Product.apply(x, _all(x), operand, kept, self.scales, self.weight)
        return y if self.bias is None else y + self.bias  # type: ignore[return-value]


class Fp8SwiGLU(SwiGLU):
    def __init__(self, leaf: SwiGLU, scales: Scales):
        nn.Module.__init__(self)
        self.gate, self.up, self.down = leaf.gate, leaf.up, leaf.down
        self.scales: Scales = scales

    def forward(self, x_TD: Tensor) -> Tensor:
        counts, tiles = _all(x_TD), _row_tiles(x_TD, self.scales)
        gate_up = _Product.apply(x_TD, counts, *tiles, self.scales, self.gate.weight, self.up.weight)
        return _SwiGLUDown.apply(gate_up, counts, self.scales, self.down.weight[None])  # type: ignore[return-value]


class Fp8Experts(Experts):
    def __init__(self, leaf: Experts, scales: Scales):
        nn.Module.__init__(self)
        self.gate_up, self.down = leaf.gate_up, leaf.down
        self.scales: Scales = scales

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        gates_and_ups = self.gate_up.unflatten(1, (2, -1))  # each has blocks of its own, as checkpoints have them
        gate_up = _Product.apply(x_MD, counts_E, *_row_tiles(x_MD, self.scales), self.scales, gates_and_ups)
        return _SwiGLUDown.apply(gate_up, counts_E, self.scales, self.down)  # type: ignore[return-value]


def note(weight: Tensor) -> str:
    """What is multiplied with what, where this weight lies."""
    return AS_THEY_ARE if fp8_tiles.on_gpu(weight) else WIDER


def swap(model: Transformer, scales: Scales = "ue8m0") -> Transformer:
    """Put 8-bit leaves over the parameters of those that policy.py has in fp8, in place."""
    for name, module in list(model.named_modules()):
        holder, child = _place(model, name)
        if not isinstance(holder, SwiGLU) and (leaf := _leaf(name, module, scales)):
            setattr(holder, child, leaf)
    return model


def restore(model: Transformer) -> Transformer:
    """Take them out again: the model computes in its dtype, as it will wherever its checkpoint is opened."""
    for name, module in list(model.named_modules()):
        plain = next((kind for kind in (Linear, SwiGLU, Experts, RMSNorm) if type(module).__base__ is kind), None)
        if plain:
            leaf = plain.__new__(plain)
            leaf.__dict__.update(module.__dict__)
            setattr(*_place(model, name), leaf)
    return model


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Who holds the module of this name, and under which attribute."""
    parent, _, child = name.rpartition(".")
    return model.get_submodule(parent), child


def _leaf(name: str, module: nn.Module, scales: Scales) -> nn.Module | None:
    if isinstance(module, Experts):
        return Fp8Experts(module, scales)
    if isinstance(module, SwiGLU):
        return Fp8SwiGLU(module, scales)
    if isinstance(module, RMSNorm) and name.endswith(BEFORE_LEAVES):
        return Fp8Norm(module, scales)
    if isinstance(module, Linear) and (row := policy.of(f"{name}.weight")).precision == "fp8":
        return Fp8Linear(module, scales, row.kept)
    return None
