"""Group-relative policy optimisation and its descendants, as small functions of numbers a token.

A group is the answers to one prompt; an answer is as good as its reward says beside the others of its group. Nothing
here knows a model: log-probabilities come in, a loss comes out, and autograd does the rest.

    ρ = exp(log π − log π_old)      L = −Σ_t w_t · c_t · min(ρ_t A_t, clip(ρ_t, 1 − ε_low, 1 + ε_high) A_t) + β · KL

A is the advantage, w how tokens are averaged, c the truncated importance weight that corrects for answers drawn by an
engine (or by older weights) whose probabilities differ from the trainer's. The variants differ in A, w and ρ:

    GRPO      A = (r − mean) / std, each answer counts the same whatever its length         (arXiv 2402.03300)
    Dr. GRPO  A = r − mean, every token counts 1 / most tokens: no reward for brevity       (arXiv 2503.20783)
    DAPO      every token of the step counts the same, the upper clip is wider, prompts     (arXiv 2503.14476)
              whose answers are all right or all wrong are replaced by others
    GSPO      ρ of a whole answer, its length's root: the ratio that its reward belongs to  (arXiv 2507.18071)

Shapes: N completion tokens, S answers of a step, G answers of a group.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class Variant:
    by_std: bool  # advantages in standard deviations of their group
    average: Literal["answers", "tokens", "fixed"]  # over which tokens are averaged
    ratio: Literal["token", "answer"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    refill: bool = False  # replace groups that teach nothing
    overlong: float = 0.0  # share of the longest length in which an answer begins to lose reward


VARIANTS = {
    "grpo": Variant(by_std=True, average="answers"),
    "dr_grpo": Variant(by_std=False, average="fixed"),
    "dapo": Variant(by_std=True, average="tokens", clip_high=0.28, refill=True, overlong=0.2),
    "gspo": Variant(by_std=True, average="answers", ratio="answer", clip_low=3e-4, clip_high=4e-4),
}


class Surrogate(NamedTuple):
    loss: Tensor  # to differentiate
    clipped: float  # share of tokens whose gradient the clip took
    kl: float  # to the reference, mean a token
    truncated: float  # share of tokens whose importance weight was cut


def advantages(rewards_SG: Tensor, by_std: bool) -> Tensor:
    """Each reward beside its group's mean [S, G], 0 throughout where all are equal."""
    centred_SG = rewards_SG - rewards_SG.mean(1, keepdim=True)
    return centred_SG / (rewards_SG.std(1, keepdim=True) + 1e-6) if by_std else centred_SG


def teaches(rewards_SG: Tensor) -> Tensor:
    """Groups [S] whose answers differ in reward; the others have no gradient."""
    return rewards_SG.amax(1) > rewards_SG.amin(1)


def overlong_penalty(length: int, most: int, share: float) -> float:
    """0 up to (1 − share) · most tokens, falling to −1 at `most` (DAPO, equation 13)."""
    soft = share * most
    return max(-1.0, min(0.0, (most - soft - length) / soft))


def answer_weights(lengths_S: Tensor, average: str, most: int) -> Tensor:
    """What each token of an answer counts [S]. `lengths_S` are the whole step's, none of them above `most`."""
    S, each_S = len(lengths_S), lengths_S.float()
    if average == "answers":
        return 1 / (S * each_S)
    if average == "tokens":
        return torch.full_like(each_S, 1 / each_S.sum().item())
    return torch.full_like(each_S, 1 / (S * most))


def log_ratio(logp_N: Tensor, old_N: Tensor, lengths_S: Tensor, ratio: str) -> Tensor:
    """log ρ of each token [N]; of GSPO's an answer's mean, whose gradient still reaches each token's own log π."""
    delta_N = logp_N - old_N
    if ratio == "token":
        return delta_N
    owner_N = torch.arange(len(lengths_S), device=logp_N.device).repeat_interleave(lengths_S)
    sum_S = torch.zeros(len(lengths_S), dtype=delta_N.dtype, device=delta_N.device).index_add(0, owner_N, delta_N)
    mean_N = (sum_S / lengths_S)[owner_N].detach()
    return mean_N + logp_N - logp_N.detach()


def k3(logp_N: Tensor, other_N: Tensor) -> Tensor:
    """An estimate of KL(π ‖ other) a token, never negative (FACTS of R1: π_ref/π − log(π_ref/π) − 1)."""
    delta_N = other_N - logp_N
    return delta_N.exp() - delta_N - 1


def importance(old_N: Tensor, behaviour_N: Tensor, most: float) -> Tensor:
    """π_old / π_behaviour, at most `most`: the behaviour drew what the trainer takes for its own."""
    return (old_N - behaviour_N).exp().clamp_max(most)


def surrogate(
    variant: Variant,
    logp_N: Tensor,
    old_N: Tensor,
    behaviour_N: Tensor,
    advantage_N: Tensor,
    weight_N: Tensor,
    lengths_S: Tensor,
    most_importance: float,
    reference_N: Tensor | None = None,
    kl_weight: float = 0.0,
) -> Surrogate:
    """The loss of some answers, a part of a step's: `weight_N` say which. Only `logp_N` has a gradient."""
    rho_N = log_ratio(logp_N, old_N, lengths_S, variant.ratio).exp()
    kept_N = rho_N.clamp(1 - variant.clip_low, 1 + variant.clip_high)
    free_N, bound_N = rho_N * advantage_N, kept_N * advantage_N
    correction_N = importance(old_N, behaviour_N, most_importance)
    loss = -(weight_N * correction_N * torch.minimum(free_N, bound_N)).sum()
    kl = 0.0
    if reference_N is not None:
        kl_N = k3(logp_N, reference_N)
        loss, kl = loss + kl_weight * (weight_N * kl_N).sum(), kl_N.mean().item()
    clipped, cut = (bound_N < free_N).float().mean().item(), (correction_N >= most_importance).float().mean().item()
    return Surrogate(loss, clipped, kl, cut)


class Gap(NamedTuple):
    """How far the engine's log-probabilities are from the trainer's, on the same tokens and weights."""

    mean: float  # |Δ log p|
    most: float
    k3: float

    @classmethod
    def between(cls, trainer_N: Tensor, engine_N: Tensor) -> "Gap":
        delta_N = (trainer_N - engine_N).double()
        return cls(delta_N.abs().mean().item(), delta_N.abs().max().item(), (delta_N.exp() - delta_N - 1).mean().item())
