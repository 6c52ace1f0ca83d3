"""Who is chosen, and what it counts: V3's and V2's routers by hand, and the mixture against a loop over tokens."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from shoal.model.config import MoEConfig
from shoal.model.moe import MoE, Router, Routes
from shoal.model.presets import PRESETS

V3 = MoEConfig(8, 1, 2, 16, n_group=4, topk_group=2, routed_scaling_factor=2.5)
V2 = replace(V3, scoring="softmax", norm_topk_prob=False, routed_scaling_factor=1.0)


def routed(config: MoEConfig, logits: list[float], bias: list[float] | None = None) -> Routes:
    """What a router with these logits chooses for one token."""
    router = Router(8, config)
    router.weight.data = torch.diag(torch.tensor(logits, dtype=torch.float32))
    router.bias[:] = torch.tensor(bias) if bias else 0.0
    return router(torch.ones(1, 8))


def chosen(routes: Routes) -> dict[int, float]:
    return dict(zip(routes.experts_TK[0].tolist(), routes.weights_TK[0].tolist(), strict=True))


def test_v3_weighs_the_chosen_by_their_share_of_scores():
    weights = chosen(routed(replace(V3, n_group=1, topk_group=1), [0, 3, 0, 0, 1, 0, 0, 0]))
    s = torch.tensor([3.0, 1.0]).sigmoid()
    assert weights == pytest.approx({1: 2.5 * (s[0] / s.sum()).item(), 4: 2.5 * (s[1] / s.sum()).item()})


def test_v3_groups_are_worth_their_two_best_and_limit_the_choice():
    """Groups (0 1), (2 3), (4 5), (6 7). Expert 0 is the best of all, but its group's two are worth the least."""
    logits = [3.0, -9.0, 1.0, 1.1, 1.2, 1.3, 0.0, 0.1]
    assert chosen(routed(V3, logits)).keys() == {4, 5}
    assert chosen(routed(replace(V3, n_activated=4), logits)).keys() == {2, 3, 4, 5}
    assert chosen(routed(replace(V3, n_group=1, topk_group=1), logits)).keys() == {0, 5}


def test_bias_steers_the_choice_but_not_the_weights():
    config, logits = replace(V3, n_group=1, topk_group=1), [2.0, 1.0, 0.0, -1.0, -9, -9, -9, -9]
    plain, steered = routed(config, logits), routed(config, logits, [0, -1, 0, 1, 0, 0, 0, 0])
    assert chosen(plain).keys() == {0, 1} and chosen(steered).keys() == {0, 3}
    s = torch.tensor([2.0, -1.0]).sigmoid()
    assert chosen(steered)[3] == pytest.approx(2.5 * (s[1] / s.sum()).item())
    assert torch.equal(plain.scores_TE, steered.scores_TE)


def test_v2_greedy_takes_the_likeliest_and_keeps_their_probabilities():
    logits = [0.0, 3.0, 2.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    p = torch.tensor(logits).softmax(0).tolist()
    assert chosen(routed(replace(V2, n_group=1, topk_group=1), logits)) == pytest.approx({1: p[1], 2: p[2]})


def test_v2_groups_are_worth_their_best():
    """By their two best, groups (2 3) and (4 5) would win; by their best, (0 1) and (4 5) do."""
    logits = [1.25, -9.0, 1.0, 1.1, 1.2, 1.3, 0.0, 0.1]
    p = torch.tensor(logits).softmax(0).tolist()
    assert chosen(routed(V2, logits)) == pytest.approx({0: p[0], 5: p[5]})
    assert chosen(routed(replace(V2, n_activated=4), logits)).keys() == {0, 1, 4, 5}


def test_a_mixture_is_the_shared_expert_and_the_weighted_chosen_ones():
    config = PRESETS["tiny"]
    moe = MoE(config)
    generator = torch.Generator().manual_seed(0)
    for p in moe.parameters():
        p.data.normal_(0, 0.2, generator=generator)
    x_TD = torch.randn(40, config.dim, generator=generator)
    y_TD, routes = moe(x_TD)
    assert moe.shared is not None
    expected = moe.shared(x_TD)
    for t, (experts, weights) in enumerate(zip(routes.experts_TK, routes.weights_TK)):
        for e, weight in zip(experts, weights):
            gate, up = (moe.experts.gate_up[e] @ x_TD[t]).chunk(2)
            expected[t] = expected[t] + weight * (moe.experts.down[e] @ (F.silu(gate) * up))
    torch.testing.assert_close(y_TD, expected, atol=1e-5, rtol=1e-4)


def test_a_routers_product_is_in_fp32_and_keeps_what_it_read():
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
    router, d = Router(16, V3), torch.randn(12, 8, generator=torch.Generator().manual_seed(4))
    router.weight.data.normal_(generator=torch.Generator().manual_seed(5))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scores = router.scores(x)
    scores.backward(d)
    assert [t.data_ptr() for t in kept if t.shape == x.shape] == [x.data_ptr()]
    found, weight = x.grad, router.weight.grad
    x.grad, router.weight.grad = None, None
    F.linear(x.float(), router.weight).sigmoid().backward(d)
    assert found is not None and weight is not None and x.grad is not None and router.weight.grad is not None
    assert torch.equal(found, x.grad) and torch.equal(weight, router.weight.grad)
