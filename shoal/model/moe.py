"""Fine-grained experts with shared ones (DeepSeekMoE, arXiv 2401.06066), balanced without an auxiliary loss
(DeepSeek-V3, arXiv 2412.19437, section 2.1.2).

Selection uses scores plus a bias that a training loop nudges after each step; the weights use the scores alone:

    s = sigmoid(W x)    K = topk(s + b)  within the best groups    y = shared(x) + scale · Σ_K s/Σs · expert(x)

V2 scores by softmax and has no bias. The router returns what it chose; counting loads and moving the bias is the loop's
business. Which rank an expert lives on is the dispatcher's: `Local` sorts tokens by expert and puts results back.

Shapes: T tokens, D model, E experts, K chosen, F hidden, M = T·K routed rows, sorted by expert.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.model.config import ModelConfig, MoEConfig
from shoal.model.layers import SwiGLU
from shoal.ops import dispatch as ops


class Routes(NamedTuple):
    """What a router chose for each token. `scores_TE` are unbiased, for the sequence balance loss."""

    experts_TK: Tensor  # int64
    weights_TK: Tensor  # fp32, what each chosen expert's output counts
    scores_TE: Tensor  # fp32


class Router(nn.Module):
    """Weight and bias stay fp32; the bias is a buffer, moved by the training loop and not by gradients."""

    bias: Tensor

    def __init__(self, dim: int, config: MoEConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, dim, dtype=torch.float32))
        self.register_buffer("bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_TD: Tensor) -> Routes:
        c, scores_TE = self.config, self.scores(x_TD)
        choice_TE = within_best_groups(scores_TE.detach() + self.bias, c)
        return self.weighed(scores_TE, ops.top_k(choice_TE, c.n_activated))

    def scores(self, x_TD: Tensor) -> Tensor:
        logits_TE: Tensor = _WideLinear.apply(x_TD, self.weight)  # type: ignore[assignment]
        return logits_TE.sigmoid() if self.config.scoring == "sigmoid" else logits_TE.softmax(-1)

    def weighed(self, scores_TE: Tensor, experts_TK: Tensor) -> Routes:
        weights_TK = scores_TE.gather(-1, experts_TK)
        if self.config.norm_topk_prob:
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return Routes(experts_TK, weights_TK * self.config.routed_scaling_factor, scores_TE)


class _WideLinear(torch.autograd.Function):
    """x Wᵀ in fp32, keeping x as it came: other leaves keep it too, and autograd would keep a copy in fp32."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.float(), weight_ED)

    @staticmethod
    def backward(ctx, d_TE: Tensor):
        x_TD, weight_ED = ctx.saved_tensors
        return (d_TE @ weight_ED).type_as(x_TD), d_TE.t() @ x_TD.float()


class Replayed(nn.Module):
    """A router that takes the experts it is given, one call's after the other's, and weighs them by its own scores.

    What an engine chose is so trained on, wherever the trainer's rounding would have chosen otherwise: `flips` counts
    those tokens.
    """

    def __init__(self, router: Router, experts_TK: Sequence[Tensor]):
        super().__init__()
        self.router, self.left, self.flips = router, list(experts_TK), 0

    def forward(self, x_TD: Tensor) -> Routes:
        assert self.left, "more calls than routes"
        own, experts_TK = self.router(x_TD), self.left.pop(0).long()
        same_TK = (own.experts_TK[..., None] == experts_TK[:, None]).any(-1)
        self.flips += int((~same_TK).any(-1).sum())
        return self.router.weighed(own.scores_TE, experts_TK)


def within_best_groups(choice_TE: Tensor, c: MoEConfig) -> Tensor:
    """Keep the experts of the best groups, which limits the nodes a token meets.

    A group is worth its two best experts (V3, sigmoid) or its best one (V2, softmax).
    """
    if c.n_group == c.topk_group:
        return choice_TE
    grouped = choice_TE.unflatten(-1, (c.n_group, -1))  # [T, groups, E / groups]
    worth = grouped.topk(2).values.sum(-1) if c.scoring == "sigmoid" else grouped.amax(-1)
    best = worth.topk(c.topk_group, sorted=False).indices
    keep = torch.zeros_like(worth, dtype=torch.bool).scatter(-1, best, True)
    return grouped.masked_fill(~keep[..., None], -torch.inf).flatten(-2)


class Experts(nn.Module):
    """All routed SwiGLU experts as stacked matrices. Rows arrive sorted by expert; `counts_E`: how many each gets."""

    def __init__(self, n_experts: int, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(n_experts, 2 * hidden, dim))
        self.down = nn.Parameter(torch.empty(n_experts, dim, hidden))

    def forward(self, x_MD: Tensor, counts_E: Tensor) -> Tensor:
        h_MF = ops.swiglu(*ops.grouped_linear(x_MD, self.gate_up, counts_E).chunk(2, -1))
        return ops.grouped_linear(h_MF, self.down, counts_E)


class Local:
    """Every expert on this device: sort rows by expert, compute, weigh, add back."""

    def __call__(self, x_TD: Tensor, routes: Routes, experts: Experts) -> Tensor:
        places = ops.sort_by_expert(routes.experts_TK, len(experts.down))
        y_MD = experts(ops.gather_rows(x_TD, places), places.counts_E)
        return ops.weigh_rows(y_MD, routes.weights_TK, places)


class MoE(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config.moe
        assert c is not None
        self.router = Router(config.dim, c)
        self.experts = Experts(c.n_routed_experts, config.dim, c.moe_dim)
        self.shared = SwiGLU(config.dim, c.n_shared_experts * c.moe_dim) if c.n_shared_experts else None
        self.dispatcher = Local()  # replaced from outside where experts live on other ranks

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Routes]:
        routes = self.router(x_TD)
        y_TD = self.dispatcher(x_TD, routes, self.experts)
        return (y_TD if self.shared is None else y_TD + self.shared(x_TD)), routes
