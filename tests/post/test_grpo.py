"""The objective on numbers alone, against what the papers write."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.post import grpo
from shoal.post.grpo import VARIANTS, Gap, advantages, answer_weights, importance, k3, overlong_penalty, surrogate

LENGTHS = torch.tensor([2, 3, 1])
N = int(LENGTHS.sum())


def numbers(seed: int, n: int = N) -> torch.Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def objective(variant: str, logp_N, old_N, advantage_N=None, behaviour_N=None, reference_N=None, kl=0.0, most=2.0):
    v = VARIANTS[variant]
    weight_N = answer_weights(LENGTHS, v.average, 5).repeat_interleave(LENGTHS)
    advantage_N = torch.ones(N) if advantage_N is None else advantage_N
    behaviour_N = old_N if behaviour_N is None else behaviour_N
    return surrogate(v, logp_N, old_N, behaviour_N, advantage_N, weight_N, LENGTHS, most, reference_N, kl)


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=8))
def test_advantages_are_relative_to_the_group(rewards):
    rewards_SG = torch.tensor([rewards])
    for by_std in (False, True):
        a = advantages(rewards_SG, by_std)
        assert abs(a.sum().item()) < 1e-3
    assert torch.allclose(advantages(rewards_SG, False), rewards_SG - rewards_SG.mean())


def test_a_group_of_equals_teaches_nothing():
    rewards_SG = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    assert grpo.teaches(rewards_SG).tolist() == [False, True, False]
    assert advantages(rewards_SG, True)[[0, 2]].abs().max() == 0


def test_what_a_token_counts():
    assert torch.allclose(answer_weights(LENGTHS, "answers", 5), torch.tensor([1 / 6, 1 / 9, 1 / 3]))
    assert torch.allclose(answer_weights(LENGTHS, "tokens", 5), torch.full((3,), 1 / 6))
    assert torch.allclose(answer_weights(LENGTHS, "fixed", 5), torch.full((3,), 1 / 15))
    for average in ("answers", "tokens"):
        assert (answer_weights(LENGTHS, average, 5) * LENGTHS).sum() == pytest.approx(1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_on_policy_the_gradient_is_reinforce(variant):
    logp_N, advantage_N = numbers(0).requires_grad_(), numbers(1)
    objective(variant, logp_N, logp_N.detach(), advantage_N).loss.backward()
    weight_N = answer_weights(LENGTHS, VARIANTS[variant].average, 5).repeat_interleave(LENGTHS)
    assert logp_N.grad is not None and torch.allclose(logp_N.grad, -weight_N * advantage_N, atol=1e-6)


def test_the_clip_is_higher_above_and_only_takes_what_would_gain():
    old_N = torch.zeros(N)
    for ratio, advantage, moves in (
        (1.27, 1, True),
        (1.29, 1, False),
        (0.79, 1, True),
        (0.79, -1, False),
        (1.29, -1, True),
    ):
        logp_N = torch.full((N,), ratio).log().requires_grad_()
        found = objective("dapo", logp_N, old_N, torch.full((N,), float(advantage)))
        found.loss.backward()
        assert logp_N.grad is not None
        assert bool((logp_N.grad != 0).all()) == moves and found.clipped == float(not moves), (ratio, advantage)


def test_gspo_takes_the_ratio_of_the_whole_answer():
    old_N = numbers(2)
    logp_N = (old_N + torch.tensor([2e-4, -2e-4, 1e-4, 1e-4, -2e-4, 5e-4])).requires_grad_()
    found = objective("gspo", logp_N, old_N)
    assert found.clipped == pytest.approx(1 / 6)  # the last answer's one token; the others cancel to a mean of 0
    found.loss.backward()
    assert logp_N.grad is not None
    assert bool((logp_N.grad[:5] != 0).all()) and logp_N.grad[5] == 0


def test_kl_is_never_negative_and_zero_at_the_reference():
    a, b = numbers(3, 1000), numbers(4, 1000)
    assert k3(a, b).min() >= 0 and k3(a, a).abs().max() == 0
    logp_N = numbers(3).requires_grad_()
    without = objective("grpo", logp_N, logp_N.detach())
    with_kl = objective("grpo", logp_N, logp_N.detach(), reference_N=numbers(4), kl=0.5)
    assert with_kl.loss > without.loss and with_kl.kl > 0


def test_importance_is_cut_at_most():
    old_N, behaviour_N = torch.zeros(N), torch.tensor([0.0, -0.5, -3.0, 0.5, 0.0, 3.0])
    expected_N = torch.tensor([1.0, 1.6487, 2.0, 0.6065, 1.0, 0.0498])
    assert torch.allclose(importance(old_N, behaviour_N, 2.0), expected_N, atol=1e-4)
    assert objective("grpo", old_N, old_N, behaviour_N=behaviour_N).truncated == pytest.approx(1 / 6)


def test_overlong_answers_lose_little_by_little():
    assert [overlong_penalty(n, 100, 0.2) for n in (10, 80, 90, 100, 120)] == [0, 0, -0.5, -1, -1]


def test_the_gap_sees_other_weights():
    a = numbers(5, 500)
    same, other = Gap.between(a, a), Gap.between(a, a + 0.1)
    assert same == (0, 0, 0) and other.mean == pytest.approx(0.1, rel=1e-3) and other.k3 > 1e-3
