"""AdamW and Muon behind one face, over fp32 masters of bf16 weights.

AdamW (arXiv 1711.05101). Muon (Keller Jordan, 2024; scaled as in arXiv 2502.16982) for every matrix inside a block,
each expert's own: the update is the momentum with its singular values all moved towards one,

    u = orthogonal(g + μ·buf) · rms · √max(rows, columns)        p ← p (1 − lr·decay) − lr·u

by a few Newton–Schulz steps, which are products and run at the speed of products. Embedding, head, norms and routers
stay with AdamW. `torch.optim.Muon` takes 2-D parameters only, keeps no masters and loops over experts.

A parameter that is fp32 already is its own master. Moments may be kept in bf16 (DeepSeek-V3, section 3.3.3): a step
widens a parameter's own, moves them in fp32 and rounds them back. State names are `master.NAME`, `momentum.NAME`,
`first.NAME`, `second.NAME`, NAME being the model's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.model.moe import Experts
from shoal.model.transformer import Transformer
from shoal.ops import dispatch as ops
from shoal.train.config import OptimConfig

NEWTON_SCHULZ = (  # a, b, c of each step, minimax: singular values of 0.005 to 1 come to 1 ± 0.2; then the last again
    (8.3794, -24.7478, 18.3416),
    (4.0433, -3.0131, 0.5702),
    (3.5061, -2.6283, 0.5263),
    (2.4907, -1.8353, 0.4372),
)
MARGIN = 1.02  # over the norm: beyond 1, where rounding may put a matrix of rank one, the first step diverges


@dataclass
class Slot:
    """One parameter with its master and moments. `muon` tells its rule; `lr` multiplies the run's rate.

    `paired`: each matrix is two, one above the other, and Muon turns each on its own.
    """

    name: str
    weight: nn.Parameter
    master: Tensor
    muon: bool
    paired: bool
    lr: float
    decay: float
    first: Tensor  # momentum of Muon, first moment of AdamW
    second: Tensor | None  # second moment of AdamW


class Optimizer:
    def __init__(self, model: Transformer, config: OptimConfig, moments: torch.dtype = torch.float32):
        self.config, self.moments = config, moments
        gates_and_ups = {id(m.gate_up) for m in model.modules() if isinstance(m, Experts)}
        self.slots = [self._slot(name, p, id(p) in gates_and_ups) for name, p in model.named_parameters()]

    def _slot(self, name: str, p: nn.Parameter, paired: bool) -> Slot:
        c = self.config
        ends = {"embed.weight": c.embed_lr, "head.weight": c.head_lr}
        inner = p.dim() >= 2 and name not in ends and not name.endswith("router.weight")
        muon = inner and c.matrices == "muon"
        master = p.data if p.dtype == torch.float32 else p.data.float()
        first = torch.zeros_like(master, dtype=self.moments)
        second = None if muon else torch.zeros_like(first)
        decay = c.weight_decay if inner else 0.0
        return Slot(name, p, master, muon, paired, ends.get(name, 1.0), decay, first, second)

    def gradients(self) -> list[Tensor | None]:
        """As backward left them, one for each slot; None for a parameter that took no part."""
        return [slot.weight.grad for slot in self.slots]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None], number: int, lr: float, clip_factor: float) -> None:
        """Update number `number` (from 1) by the gradients times `clip_factor`; a slot without one stays as it is."""
        for slot, grad in zip(self.slots, gradients, strict=True):
            if grad is not None and slot.muon:
                self._muon(slot, grad, lr * slot.lr, clip_factor)
            elif grad is not None:
                self._adamw(slot, grad, number, lr * slot.lr, clip_factor)

    def _adamw(self, s: Slot, grad: Tensor, number: int, lr: float, clip: float) -> None:
        c = self.config
        assert s.second is not None
        size, root = lr / (1 - c.beta1**number), (1 - c.beta2**number) ** -0.5
        numbers = ops.AdamW(clip, lr, c.beta1, c.beta2, c.eps, s.decay, size, root)
        narrow = None if s.weight.dtype == torch.float32 else s.weight
        first, second = s.first.float(), s.second.float()  # themselves where they are fp32
        ops.adamw_(s.master, first, second, grad, narrow, numbers)
        _keep(s.first, first)
        _keep(s.second, second)

    def _muon(self, s: Slot, grad: Tensor, lr: float, clip: float) -> None:
        c, g = self.config, grad.float() * clip
        first = s.first.float().mul_(c.momentum).add_(g)
        _keep(s.first, first)
        u = g.add_(first, alpha=c.momentum)
        matrices = u.unflatten(1, (2, -1)) if s.paired else u
        u = orthogonal(matrices, c.newton_schulz_steps).reshape(u.shape)
        size = c.muon_rms * max(matrices.shape[-2:]) ** 0.5
        s.master.mul_(1 - lr * s.decay).add_(u, alpha=-lr * size)
        self._narrow(s)

    def _narrow(self, s: Slot) -> None:
        if s.weight.dtype != torch.float32:
            s.weight.data.copy_(s.master)

    @torch.no_grad()
    def adopt(self) -> None:
        """Take the model's weights, set from outside, for the masters."""
        for s in self.slots:
            if s.weight.dtype != torch.float32:
                s.master.copy_(s.weight)

    def zero_grad(self) -> None:
        for slot in self.slots:
            slot.weight.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Everything besides the weights as saved, by flat name."""
        state: dict[str, Tensor] = {}
        for s in self.slots:
            if s.weight.dtype != torch.float32:
                state[f"master.{s.name}"] = s.master
            state[f"{'momentum' if s.muon else 'first'}.{s.name}"] = s.first
            if s.second is not None:
                state[f"second.{s.name}"] = s.second
        return state

    @torch.no_grad()
    def load_tensors(self, state: dict[str, Tensor]) -> None:
        """The inverse of `tensors`; the names must be the same."""
        own = self.tensors()
        assert own.keys() == state.keys(), sorted(own.keys() ^ state.keys())[:4]
        for name, tensor in own.items():
            tensor.copy_(state[name])
        for s in self.slots:
            self._narrow(s)


def _keep(moment: Tensor, wide: Tensor) -> None:
    if moment is not wide:
        moment.copy_(wide)


def norm(gradients: Sequence[Tensor | None]) -> float:
    """Over all of them; NaN or infinite where any is."""
    norms = [ops.norm(g) for g in gradients if g is not None]
    return torch.linalg.vector_norm(torch.stack(norms)).item()


def orthogonal(g: Tensor, steps: int) -> Tensor:
    """U Vᵀ of each matrix's singular value decomposition, roughly (singular values 0.8–1.2): [..., m, n], bf16 inside.

    x ← a x + (b A + c A²) x with A = x xᵀ, on the side where A is smaller.
    """
    tall = g.shape[-2] > g.shape[-1]
    x = (g.mT if tall else g).to(torch.bfloat16)
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / (MARGIN * norm + 1e-7).to(x.dtype)
    shape, x = x.shape, x.reshape(-1, *x.shape[-2:])
    for a, b, c in (NEWTON_SCHULZ[min(i, len(NEWTON_SCHULZ) - 1)] for i in range(steps)):
        A = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(A, A, A, beta=b, alpha=c), x, beta=a)
    x = x.reshape(shape)
    return (x.mT if tall else x).float()
