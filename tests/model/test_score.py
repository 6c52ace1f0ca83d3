"""Scoring agrees with the model's logits, in one window or many."""

import pytest
import torch

from shoal.model.attend import Packed
from shoal.model.presets import PRESETS
from shoal.model.score import HEAD_ROWS, log_probs
from shoal.model.transformer import Transformer


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = Transformer(PRESETS["tiny"]).init_weights(0)
    with torch.no_grad():
        model.head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    return model


def tokens(n: int) -> torch.Tensor:
    return torch.randint(512, (n,), generator=torch.Generator().manual_seed(1))


def whole(m: Transformer, tokens_T: torch.Tensor) -> torch.Tensor:
    T = len(tokens_T)
    logp_TV = m(tokens_T, torch.arange(T), Packed([T])).log_softmax(-1)
    return logp_TV[:-1].gather(1, tokens_T[1:, None])[:, 0]


def test_log_probs_are_those_of_one_whole_forward(model):
    T = HEAD_ROWS + 40
    assert torch.allclose(log_probs(model, tokens(T), T), whole(model, tokens(T)), atol=1e-5)
    assert log_probs(model, tokens(1), 8).shape == (0,)


@pytest.mark.parametrize("T", [2, 15, 16, 17, 24, 25, 41])
@pytest.mark.parametrize("window", [16, 15])
def test_each_token_is_judged_once_with_half_a_window_before_it(model, T, window):
    tokens_T, found = tokens(T), log_probs(model, tokens(T), window)
    assert len(found) == T - 1
    for i in range(1, T):
        starts = range(0, T, window // 2)
        begin = next(s for s in starts if i < s + window)  # the first window that holds it
        expected = whole(model, tokens_T[begin : i + 1])[-1]
        assert torch.allclose(found[i - 1], expected, atol=1e-5), i
        assert i < window or i - begin >= window // 2
