"""Log-probabilities with a gradient, packing, and routes taken again: each against its slow twin."""

import pytest
import torch

from shoal.model.attend import Packed
from shoal.model.moe import Replayed
from shoal.post import policy
from shoal.post.policy import Graded, Objective, log_probs, packed, replayed, scored
from shoal.post.rl_config import PolicyConfig
from shoal.post.rollout import Sample
from tests.post.talks import TINY, model


def answers(n: int = 6, version: int = 3, seed: int = 0) -> list[Graded]:
    g = torch.Generator().manual_seed(seed)
    made = []
    for i in range(n):
        p, c = 3 + i % 4, 2 + 3 * (i % 3)
        prompt = tuple(torch.randint(0, TINY.vocab_size, (p,), generator=g).tolist())
        tokens = torch.randint(0, TINY.vocab_size, (c,), generator=g).tolist()
        made.append(Graded(prompt, Sample(i, tokens, [-1.0] * c, [version] * c, "stop"), float(i - 2), 0.1 * i))
    return made


@pytest.mark.parametrize("rows", [70, 16])  # in a chunk of logits
def test_log_probs_and_their_gradient_are_those_of_whole_logits(monkeypatch, rows):
    monkeypatch.setattr(policy, "CHUNK_BYTES", 4 * 40 * rows)
    torch.manual_seed(0)
    h, w, y = torch.randn(70, 16), torch.randn(40, 16), torch.arange(70) % 40
    grad = torch.randn(70)
    ours, theirs = [x.clone().requires_grad_() for x in (h, w)], [x.clone().requires_grad_() for x in (h, w)]
    a = log_probs(ours[0], ours[1], y)
    b = (theirs[0] @ theirs[1].t()).log_softmax(-1).gather(1, y[:, None])[:, 0]
    assert torch.allclose(a, b, atol=1e-5)
    a.backward(grad)
    b.backward(grad)
    for x, z in zip(ours, theirs):
        assert x.grad is not None and z.grad is not None and torch.allclose(x.grad, z.grad, atol=1e-4)


@pytest.mark.parametrize("most_tokens", [1, 20, 10_000])
def test_packing_changes_no_log_probability(most_tokens):
    m, made = model(), answers()
    found = []
    for rollout in packed(made, 3, most_tokens):
        assert sum(rollout.batch.lengths) == len(rollout.batch.tokens_T) == len(rollout.attend.branches.first_T)
        assert not len(rollout.batch.tokens_T) % policy.ROUND
        assert len(rollout.engine_N) == int((rollout.batch.targets_T >= 0).sum()) == int(rollout.lengths_S.sum())
        found += scored(m, rollout).split(rollout.lengths_S.tolist())
    for answer, logp in zip(made, found, strict=True):
        whole = torch.tensor([*answer.prompt, *answer.sample.tokens])
        logits = m(whole, torch.arange(len(whole)), Packed([len(whole)])).float().log_softmax(-1)
        n = len(answer.prompt)
        expected = logits[n - 1 : -1].gather(1, whole[n:, None])[:, 0]
        assert torch.allclose(logp, expected, atol=1e-5)


def group(n: int = 3) -> list[Graded]:
    """Answers to one prompt, then one to another."""
    made = answers(n + 1)
    return [a._replace(prompt=made[1].prompt) for a in made[:n]] + made[n:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_shared_prompt_is_computed_once_and_gets_the_gradient_of_all(dtype):
    m, made = model().set_dtype(dtype), group()
    (shared,) = packed(made, 3, 10_000)
    alone = [rollout for answer in made for rollout in packed([answer], 3, 10_000)]
    assert len(shared.batch.tokens_T) == policy.ROUND
    stretches = shared.batch.lengths[: 2 + len(made)]  # two prompts, and what was said to them
    assert sum(stretches) == sum(fed(a) for a in made) - 2 * (len(made[0].prompt) - 1)

    def learnt(rollouts) -> tuple[torch.Tensor, list[torch.Tensor]]:
        m.zero_grad()
        found = []
        for r in rollouts:
            h, _ = m.body(m.embed(r.batch.tokens_T), r.batch.positions_T, r.attend)
            drawn = r.batch.targets_T >= 0
            logp = log_probs(h[drawn], m.head.weight, r.batch.targets_T[drawn])
            (r.advantage_N * logp).sum().backward()
            found.append(logp.detach())
        return torch.cat(found), [p.grad.float().clone() for p in m.parameters() if p.grad is not None]

    (logp, gradients), (expected, theirs) = learnt([shared]), learnt(alone)
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    assert (logp - expected).abs().max() < tolerance
    for a, b in zip(gradients, theirs, strict=True):
        assert (a - b).norm() <= tolerance * (1e-3 + b.norm())


def test_tokens_keep_their_advantage_weight_and_version():
    made = answers(4)
    made[1].sample.versions[0] = 2
    (rollout,) = packed(made, 3, 10_000)
    parts = list(
        zip(*(x.split(rollout.lengths_S.tolist()) for x in (rollout.advantage_N, rollout.weight_N, rollout.fresh_N)))
    )
    for i, (advantage, weight, fresh) in enumerate(parts):
        assert bool((advantage == i - 2).all()) and torch.allclose(weight, torch.tensor(0.1 * i))
        assert fresh.tolist() == [not (i == 1 and t == 0) for t in range(len(fresh))]


def fed(answer: Graded) -> int:
    return len(answer.prompt) + len(answer.sample.tokens) - 1


def take_routes(m, rollout, answers) -> torch.Tensor:
    """Give each answer the experts that the trainer chose for it: all of them, segment by segment."""
    b = rollout.batch
    with torch.no_grad():
        _, routes = m.body(m.embed(b.tokens_T), b.positions_T, rollout.attend)
    own = torch.stack([r.experts_TK for r in routes], 1)[rollout.attend.branches.rows_M]
    for answer, its in zip(answers, own.split(rollout.attend.lengths)):
        answer.sample.routes_TLK = its.clone()
    return own


def test_routes_are_taken_again_and_flips_counted():
    m, made = model(), answers(3)
    (plain,) = packed(made, 3, 10_000)
    own = take_routes(m, plain, made)
    (same,) = packed(made, 3, 10_000)
    with replayed(m, [same]) as routers:
        with torch.no_grad():
            m.body(m.embed(same.batch.tokens_T), same.batch.positions_T, same.attend)
        assert sum(r.flips for r in routers) == 0
    assert torch.allclose(scored(m, same, replay=True), scored(m, plain), atol=1e-6)
    made[0].sample.routes_TLK = (own[: fed(made[0])] + 1) % 8
    (other,) = packed(made, 3, 10_000)
    assert not torch.allclose(scored(m, other, replay=True), scored(m, plain), atol=1e-6)
    assert not any(isinstance(module, Replayed) for module in m.modules())


def test_the_objective_reports_gap_and_ratios():
    m, made = model(), answers(3)
    (rollout,) = packed(made, 3, 10_000)
    objective = Objective(PolicyConfig(variant="grpo"), [rollout], [None], [None])
    b = rollout.batch
    h, _ = m.body(m.embed(b.tokens_T), b.positions_T, rollout.attend)
    loss = objective(b, h, m.head.weight, 1)
    assert loss.requires_grad
    gap, ratios = objective.gap(), objective.ratios()
    assert gap is not None and gap.mean > 1  # the samples claim −1 a token, the model says otherwise
    assert {seed: len(r) for seed, r in ratios.items()} == {a.sample.seed: len(a.sample.tokens) for a in made}
