"""Muon and AdamW against their definitions."""

import pytest
import torch

from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.train.config import LossConfig, OptimConfig, ScheduleConfig
from shoal.train.optim import Optimizer, norm, orthogonal
from shoal.train.schedule import learning_rate, mtp_weight

STEPS = OptimConfig().newton_schulz_steps


@pytest.mark.parametrize("steps", [STEPS, 5])
@pytest.mark.parametrize("shape", [(32, 64), (64, 32), (48, 48)])
def test_orthogonal_moves_singular_values_towards_one_and_keeps_the_vectors(shape: tuple[int, int], steps: int):
    torch.manual_seed(0)
    g = torch.randn(shape)
    u = orthogonal(g, steps)
    values = torch.linalg.svdvals(u)
    assert values.min() > 0.5 and values.max() < 1.35
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    assert torch.nn.functional.cosine_similarity(u.flatten(), (left @ right).flatten(), 0) > 0.97


@pytest.mark.parametrize("steps", [STEPS, 5, 8])
def test_a_matrix_of_rank_one_stays_of_one_size_however_its_norm_is_rounded(steps: int):
    torch.manual_seed(0)
    direction = torch.outer(torch.randn(32), torch.randn(64))
    loud = torch.stack([direction * (1 + i / 100) for i in range(100)])
    largest = torch.linalg.svdvals(orthogonal(loud, steps))[:, 0]
    assert largest.min() > 0.5 and largest.max() < 1.35


def test_each_expert_is_orthogonalised_on_its_own():
    stacked = torch.randn(5, 24, 40, generator=torch.Generator().manual_seed(0))
    stacked[3] *= 1000  # one loud expert must not quiet the others
    alone = torch.stack([orthogonal(g, STEPS) for g in stacked])
    torch.testing.assert_close(orthogonal(stacked, STEPS), alone, atol=0.02, rtol=0.02)


def with_gradients(model: Transformer, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) for p in model.parameters()]


def inside(name: str, p: torch.nn.Parameter) -> bool:
    return p.dim() >= 2 and name not in ("embed.weight", "head.weight") and not name.endswith("router.weight")


def test_adamw_equals_torch_with_decay_inside_blocks_only():
    model, twin = (Transformer(PRESETS["tiny"]).init_weights(0) for _ in range(2))
    config = OptimConfig("adamw", lr=0.01, embed_lr=3.0, weight_decay=0.2)
    ours = Optimizer(model, config)
    rates = {"embed.weight": 0.03}
    groups = [
        {"params": [p], "lr": rates.get(name, 0.01), "weight_decay": 0.2 if inside(name, p) else 0.0}
        for name, p in twin.named_parameters()
    ]
    theirs = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    for step in range(1, 4):
        gradients = with_gradients(model, step)
        for p, g in zip(twin.parameters(), gradients, strict=True):
            p.grad = 0.5 * g
        theirs.step()
        ours.step(gradients, step, 0.01, 0.5)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5, msg=name)


def test_muon_takes_the_blocks_matrices_and_its_steps_have_adamws_size():
    model = Transformer(PRESETS["tiny"]).init_weights(0)
    optimizer = Optimizer(model, OptimConfig("muon", weight_decay=0.0, muon_rms=0.2))
    muon = {s.name for s in optimizer.slots if s.muon}
    assert "layers.1.ffn.experts.gate_up" in muon and "layers.0.attn.kv_up.weight" in muon
    assert not any(n.startswith(("embed", "head")) or "router" in n or "norm" in n for n in muon)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step(with_gradients(model, 0), 1, 0.01, 1.0)
    for name, p in model.named_parameters():
        if name in muon:
            rms = (p - before[name]).square().mean().sqrt().item()
            assert rms == pytest.approx(0.2 * 0.01, rel=0.35), name


def test_norm_sees_every_gradient_and_anything_not_finite():
    gradients = [torch.tensor([3.0]), None, torch.tensor([[4.0]])]
    assert norm(gradients) == pytest.approx(5.0)
    assert not torch.isfinite(torch.tensor(norm([*gradients, torch.tensor([float("inf")])])))


def test_v3s_schedule_at_its_corners():
    """Shares of 2.2e-4 after 14.8T tokens: FACTS of arXiv 2412.19437, section 4.2."""
    v3 = ScheduleConfig("v3", warmup=0.0)
    rate = {tokens: 2.2e-4 * learning_rate(v3, tokens / 14.8) for tokens in (5, 9.99, 14.31, 14.7)}
    assert rate[5] == rate[9.99] == 2.2e-4
    assert rate[14.31] == pytest.approx(2.2e-5) and rate[14.7] == pytest.approx(7.3e-6)
    loss = LossConfig(mtp_until=10 / 14.8)
    assert mtp_weight(loss, 9 / 14.8) == 0.3 and mtp_weight(loss, 11 / 14.8) == 0.1


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_rates_rise_then_fall_to_the_final_share(kind):
    c = ScheduleConfig(kind, warmup=0.1, decay=0.5, final=0.05)
    assert learning_rate(c, 0.05) == pytest.approx(0.5) and learning_rate(c, 0.1) == pytest.approx(1.0)
    assert learning_rate(c, 1.0) == pytest.approx(0.05)
    falling = [learning_rate(c, p / 20) for p in range(3, 21)]
    assert falling == sorted(falling, reverse=True)
