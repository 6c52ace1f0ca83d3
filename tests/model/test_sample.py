"""Sampling draws what it says, and scoring agrees with the model's logits."""

import torch

from shoal.model.attend import Packed
from shoal.model.presets import PRESETS
from shoal.model.sample import HEAD_ROWS, choose, generate, log_probs
from shoal.model.transformer import Transformer


def model() -> Transformer:
    model = Transformer(PRESETS["tiny"]).init_weights(0)
    with torch.no_grad():
        model.head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    return model


def test_a_stop_token_is_given_and_ends_it():
    greedy = list(generate(model(), [1, 2], 8, temperature=0))
    stopped = list(generate(model(), [1, 2], 8, temperature=0, stop=(greedy[3],)))
    assert stopped == greedy[: greedy.index(greedy[3]) + 1]


def test_draws_follow_the_softmax_inside_the_nucleus():
    p_V = torch.tensor([0.5, 0.25, 0.15, 0.1])
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([choose(p_V.log() * 0.7, 0.7, 0.8, generator) for _ in range(4000)])
    share_V = torch.bincount(draws, minlength=4) / len(draws)
    assert share_V[3] == 0  # 0.5 + 0.25 + 0.15 reach 0.8
    assert (share_V[:3] - p_V[:3] / 0.9).abs().max() < 0.03


def test_log_probs_are_those_of_one_whole_forward():
    m, T = model(), HEAD_ROWS + 40
    tokens_T = torch.randint(512, (T,), generator=torch.Generator().manual_seed(1))
    whole_TV = m(tokens_T, torch.arange(T), Packed([T])).log_softmax(-1)
    expected = whole_TV[:-1].gather(1, tokens_T[1:, None])[:, 0]
    assert torch.allclose(log_probs(m, tokens_T), expected, atol=1e-5)
    assert log_probs(m, tokens_T[:1]).shape == (0,)
