"""Draws follow the distribution that was asked for; a seed fixes them; drafts never bend it."""

from ctypes import c_double, c_uint64
from math import nan

import pytest
import torch

from shoal.data.draws import MASK, uniform
from shoal.engine.request import Sampling, Token
from shoal.engine.sampler import (
    DRAW,
    NUCLEUS,
    Row,
    accept_or_redraw,
    check,
    choose,
    draw,
    edited,
    nucleus,
    propose,
    shaped,
)
from shoal.errors import RequestError
from shoal.ops import cpu

P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])


def row(position: int = 1, **sampling) -> Row:
    return Row(Sampling(**sampling), sampling.get("seed", 0), range(position), position)


def chi_squared(tokens: torch.Tensor, p_V: torch.Tensor) -> float:
    """Around its degrees of freedom (V - 1) where tokens follow p; V = 5: above 23 once in 10,000 times."""
    counts, expected = torch.bincount(tokens, minlength=len(p_V)).double(), p_V.double() * len(tokens)
    assert (counts[expected == 0] == 0).all()
    return ((counts - expected).square() / expected.clamp_min(1e-9)).sum().item()


def drawn(n: int = 8000, **sampling) -> torch.Tensor:
    tokens = choose(P.log().expand(n, -1), [row(i, **sampling) for i in range(n)])
    return torch.tensor([t.id for t in tokens])


@pytest.mark.parametrize(
    "sampling, weights",
    [
        ({}, P),
        ({"temperature": 0.5}, P**2),
        ({"top_k": 2}, P * torch.tensor([1, 1, 0, 0, 0])),
        ({"top_p": 0.71}, P * torch.tensor([1, 1, 1, 0, 0])),  # the one that crosses stays
        ({"top_p": 0.69}, P * torch.tensor([1, 1, 0, 0, 0])),
        ({"min_p": 0.3}, P * torch.tensor([1, 1, 1, 0, 0])),
        ({"top_k": 3, "top_p": 0.5, "temperature": 2.0}, P.sqrt() * torch.tensor([1, 1, 0, 0, 0])),
        ({"logit_bias": {4: 2.0}}, P * torch.tensor([1, 1, 1, 1, 2.718281828**2])),
    ],
)
def test_draws_follow_what_was_asked(sampling, weights):
    assert chi_squared(drawn(**sampling), weights / weights.sum()) < 23


def test_a_row_is_drawn_the_same_in_any_batch():
    generator = torch.Generator().manual_seed(0)
    logits_RV = torch.randn(40, 300, generator=generator)
    kinds = [{}, {"top_p": 0.9}, {"top_k": 280}, {"temperature": 0}, {"min_p": 0.1, "logprobs": 2}, {"seed": 3}]
    kinds.append({"temperature": 50.0, "top_p": 0.999})
    rows = [row(i, **kinds[i % len(kinds)]) for i in range(40)]
    together = choose(logits_RV, rows)
    assert together == [choose(logits_RV[i : i + 1], [rows[i]])[0] for i in range(40)]
    assert together[::-1] == choose(logits_RV.flip(0), rows[::-1])


def test_only_seed_and_position_matter_to_a_draw():
    assert uniform(1, 5, 0) == uniform(1, 5, 0)
    assert len({uniform(s, i, p) for s in range(10) for i in range(10) for p in range(4)}) == 400
    u = torch.tensor([uniform(7, i, 0) for i in range(20000)], dtype=torch.float64)
    assert u.min() >= 0 and u.max() < 1
    assert chi_squared((u * 5).long(), torch.full((5,), 0.2)) < 23
    assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 0.03
    logits = P.log()[None]
    many = {choose(logits, [Row(Sampling(), 5, [t] * 9, 3)])[0].id for t in range(20)}
    assert len(many) == 1  # other tokens, same position


def test_a_nucleus_wider_than_the_first_look():
    p_RV = torch.full((2, 4 * NUCLEUS), 1 / (4 * NUCLEUS), dtype=torch.float64)
    p_RV[1], p_RV[1, 5] = 1e-6, 1.0
    p_RV /= p_RV.sum(-1, keepdim=True)
    V = p_RV.shape[1]
    kept = nucleus(p_RV, torch.tensor([V, V]), torch.tensor([0.5, 0.5], dtype=torch.float64), NUCLEUS) > 0
    assert abs(int(kept[0].sum()) - V // 2) <= 1 and kept[1].nonzero().tolist() == [[5]]
    by_rank = nucleus(p_RV, torch.tensor([NUCLEUS + 7, 1]), torch.ones(2, dtype=torch.float64), NUCLEUS) > 0
    assert by_rank.sum(-1).tolist() == [NUCLEUS + 7, 1]


def test_penalties_and_masks_come_before_everything():
    logits_RV = torch.tensor([[2.0, -1.0, 0.5, 1.9]])
    s = Sampling(0.0, repetition_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5)
    seen = Row(s, 0, [0, 1, 2, 2], n_prompt=2)
    assert choose(logits_RV, [seen])[0].id == 3  # 2.0 → 1.0, −1 → −2, 0.5 → 0.25 − 0.25 − 2 · 0.5
    assert edited(logits_RV, [seen])[0].tolist() == pytest.approx([1.0, -2.0, -1.0, 1.9])
    assert logits_RV[0, 0] == 2.0  # the raw ones are untouched
    ahead = edited(logits_RV, [seen._replace(ahead=(3,))])[0].tolist()
    assert ahead == pytest.approx([1.0, -2.0, -1.0, 1.9 / 2 - 0.75])
    masked = Row(Sampling(0.7), 0, [1], 1, mask=torch.tensor([False, True, False, False]))
    assert choose(logits_RV, [masked])[0].id == 1
    assert choose(logits_RV, [masked._replace(forced=2)])[0].id == 2


def test_logprobs_are_those_of_the_raw_distribution():
    logits_RV = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = [row(temperature=0.3, top_k=4, logprobs=3), row(temperature=0, logprobs=0), row()]
    tokens, log_p = choose(logits_RV, rows), logits_RV.log_softmax(-1)
    for r in (0, 1):
        assert tokens[r].logprob == pytest.approx(log_p[r, tokens[r].id].item(), abs=1e-6)
    best = log_p[0].topk(3)
    assert tokens[0].top == tuple(zip(best.indices.tolist(), best.values.tolist()))
    assert tokens[1].top == () and tokens[2].logprob is None


def test_the_likeliest_of_equals_are_the_same_whatever_others_ask_for():
    logits_RV = torch.randn(100, 8192, generator=torch.Generator().manual_seed(0)).mul(8).bfloat16().float()
    few, many = row(temperature=0, logprobs=3), row(temperature=0, logprobs=20)
    alone = choose(logits_RV, [few] * 100)
    assert choose(torch.cat([logits_RV, logits_RV[:1]]), [few] * 100 + [many])[:100] == alone


def test_redrawing_keeps_the_distribution_and_accepts_all_it_can():
    n, q_V = 40000, torch.tensor([0.1, 0.5, 0.0, 0.2, 0.2])
    u = [[uniform(9, i, purpose) for i in range(n)] for purpose in range(3)]
    drafts = draw(q_V.expand(n, -1), u[0])
    assert chi_squared(drafts, q_V) < 23
    tokens = accept_or_redraw(P.expand(n, -1), q_V.expand(n, -1), drafts, u[1], u[2])
    assert chi_squared(tokens, P) < 23
    assert (tokens == drafts).float().mean().item() == pytest.approx(torch.minimum(P, q_V).sum().item(), abs=0.01)


def test_a_draft_like_the_model_is_always_taken():
    logits_RV = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    for sampling in ({"temperature": 0.8, "top_p": 0.9}, {"temperature": 0}):
        rows = [row(i, **sampling) for i in range(500)]
        drafts = propose(logits_RV, rows)
        tokens = choose(logits_RV, [r._replace(draft=d) for r, d in zip(rows, drafts)])
        assert [t.id for t in tokens] == [d.token for d in drafts]


def test_seeded_rows_draw_the_same_with_a_draft():
    logits_RV = torch.randn(200, 40, generator=torch.Generator().manual_seed(0))
    rows = [row(i, seed=5) for i in range(200)]
    drafts = propose(logits_RV, rows)
    assert all(d.q_V is None for d in drafts)
    assert choose(logits_RV, rows) == choose(logits_RV, [r._replace(draft=d) for r, d in zip(rows, drafts)])


def test_shaped_rows_are_distributions():
    logits_RV = torch.randn(4, 600, generator=torch.Generator().manual_seed(0)) * 5
    p_RV = shaped(logits_RV, [Sampling(), Sampling(0.01), Sampling(top_p=0.3, top_k=500), Sampling(100, min_p=1.0)])
    torch.testing.assert_close(p_RV.sum(-1), torch.ones(4, dtype=torch.float64))
    assert (p_RV[3] > 0).sum() == 1


def test_no_temperature_overflows():
    logits_RV = torch.tensor([[1.0, 3.0, -torch.inf, 2.0]])
    assert shaped(logits_RV, [Sampling(1e-308)]).tolist() == [[0, 1, 0, 0]]
    with pytest.raises(AssertionError, match="distribution"):
        draw(torch.full((1, 4), nan), [0.5])


@pytest.mark.parametrize(
    "name, value",
    [
        *[
            ("temperature", -1),
            ("temperature", nan),
            ("temperature", 9e-4),
            ("top_p", 2),
            ("top_p", 0),
            ("top_k", -1),
            ("min_p", 1.1),
        ],
        *[("logprobs", -1), ("logprobs", 10**6), ("seed", 2**64), ("repetition_penalty", 0)],
        *[("logit_bias", {9: 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {1: nan}), ("logit_bias", {1: 1e39})],
    ],
)
def test_what_no_draw_could_follow_is_refused(name, value):
    with pytest.raises(RequestError) as error:
        check(Sampling(**{name: value}), vocab_size=9)
    assert error.value.param == name
    check(Sampling(1e-3, seed=2**64 - 1, logprobs=9, logit_bias={8: -100.0}), vocab_size=9)


@pytest.mark.skipif("native" not in cpu.status(), reason=cpu.status())
def test_native_draws_equal_those_in_fp64():
    native_uniform = cpu._library()[0].uniform  # type: ignore[union-attr]
    native_uniform.restype = c_double
    numbers = [(s, i, p) for s in (0, 7, -3 & MASK, MASK) for i in (0, 1, 9, 2**40) for p in range(4)]
    assert all(native_uniform(*map(c_uint64, n)) == uniform(*n) for n in numbers)
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 0.6, 1.7, 1e-3, 100.0):
        logits_RV = torch.randn(1000, 528, generator=generator).mul(4).bfloat16().float()
        rows = [row(i, temperature=temperature, seed=i, logprobs=0) for i in range(1000)]
        tokens, logprobs = cpu.draw(logits_RV, [temperature] * 1000, range(1000), range(1000))
        exact = draw(shaped(logits_RV, [r.sampling for r in rows]), [r.uniform(DRAW) for r in rows])
        assert tokens == exact.tolist()
        assert choose(logits_RV, rows) == [Token(t, p) for t, p in zip(tokens, logprobs)]
        log_p = logits_RV.double().log_softmax(-1).gather(1, exact[:, None])[:, 0]
        assert (log_p - torch.tensor(logprobs, dtype=torch.float64)).abs().max() < 1e-6


@pytest.mark.skipif("native" not in cpu.status(), reason=cpu.status())
def test_native_draws_at_the_edges():
    """The likeliest of equals is the first; the last token can be drawn; what isn't finite draws nothing."""
    logits_RV = torch.zeros(5, 160)
    logits_RV[1, 150:] = 200.0
    logits_RV[2, 3], logits_RV[3, 9], logits_RV[4, 159] = torch.nan, torch.inf, 1000.0
    assert cpu.draw(logits_RV, [0.0] * 5, [0] * 5, [1] * 5)[0] == [0, 150, -1, -1, 159]
    drawn = torch.tensor(cpu.draw(logits_RV[:2].repeat(2000, 1), [1.0] * 4000, range(4000), [1] * 4000)[0])
    assert set(drawn[::2].tolist()) == set(range(160)) and set(drawn[1::2].tolist()) == set(range(150, 160))
