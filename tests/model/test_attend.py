"""The seam between projections and what attends to what."""

from dataclasses import replace

import pytest
import torch

from shoal.model.attend import Absorbed, Attend, Packed
from shoal.model.config import GQAConfig
from shoal.model.mla import LatentAttention
from shoal.model.presets import PRESETS
from shoal.model.rope import angles
from shoal.model.transformer import Transformer

TINY = replace(PRESETS["tiny"], init_std=0.2)  # scores far from equal
LENGTHS = [5, 1, 30, 12]


def positions(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])


def test_absorbed_attention_equals_rebuilt_keys():
    torch.manual_seed(0)
    attention = LatentAttention(TINY, 0)
    for p in attention.parameters():
        p.data.normal_(0, 0.3)
    x_TD = torch.randn(48, TINY.dim)
    rope = angles(positions(LENGTHS), TINY)
    ways: list[Attend] = [Packed(LENGTHS), Absorbed(LENGTHS)]
    rebuilt, absorbed = (attention(x_TD, rope, attend) for attend in ways)
    torch.testing.assert_close(absorbed, rebuilt, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(attention(x_TD, rope, Absorbed([48])), rebuilt, atol=1e-2)  # the segments mattered


@pytest.mark.parametrize("attention", [TINY.attention, GQAConfig(4, 2, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_document_is_blind_to_its_neighbours(attention, dtype):
    config = replace(TINY, attention=attention)
    model = Transformer(config).init_weights(0).set_dtype(dtype)
    tokens_T = torch.randint(config.vocab_size, (48,), generator=torch.Generator().manual_seed(0))
    others_T = tokens_T.clone()
    others_T[:6], others_T[36:] = 1, 2  # all but the third segment
    a, b = (model(t, positions(LENGTHS), Packed(LENGTHS)) for t in (tokens_T, others_T))
    torch.testing.assert_close(a[6:36], b[6:36], atol=2e-2 if dtype is torch.bfloat16 else 1e-5, rtol=1e-2)
    assert not torch.allclose(a[36:], b[36:], atol=0.5)


def test_a_token_is_blind_to_later_ones():
    model = Transformer(TINY).init_weights(0)
    tokens_T = torch.randint(TINY.vocab_size, (20,), generator=torch.Generator().manual_seed(0))
    whole, start = (model(t, torch.arange(len(t)), Packed([len(t)])) for t in (tokens_T, tokens_T[:13]))
    torch.testing.assert_close(whole[:13], start, atol=1e-5, rtol=1e-4)
