"""The model's seams: how layers are run, and what a multi-token module is made of."""

import torch
from torch import nn

from shoal.model.attend import Packed
from shoal.model.mtp import MTP
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer

TINY = PRESETS["tiny"]
TOKENS = torch.arange(12)


def test_body_runs_every_layer_as_it_is_told():
    model, attend, order = Transformer(TINY).init_weights(0), Packed([12]), []

    def twice(layer, h_TD, rope, attend):
        order.append(layer)
        h_TD, routes = layer(h_TD, rope, attend)
        return 2 * h_TD, routes

    h_TD = model.embed(TOKENS)
    plain_TD, routes = model.body(h_TD, TOKENS, attend)
    told_TD, told_routes = model.body(h_TD, TOKENS, attend, twice)
    assert order == list(model.layers) and len(told_routes) == len(routes) == sum(layer.is_moe for layer in order)
    assert not torch.allclose(plain_TD, told_TD)
    same_TD, _ = model.body(h_TD, TOKENS, attend, lambda layer, *args: layer(*args))
    assert torch.equal(plain_TD, same_TD)


class Through(nn.Module):
    def forward(self, x_TD, rope, attend):
        return x_TD, None


def test_a_multi_token_module_joins_the_embedding_first():
    """The published projection [D, 2D] has the embedding's half on the left."""
    module = MTP(TINY, 0)
    module.block = Through()  # pyright: ignore[reportAttributeAccessIssue]
    for norm in (module.embed_norm, module.hidden_norm, module.norm):
        nn.init.ones_(norm.weight)
    h_TD, next_TD = torch.randn(2, 5, TINY.dim, generator=torch.Generator().manual_seed(0))
    eye, zero = torch.eye(TINY.dim), torch.zeros(TINY.dim, TINY.dim)
    normed = lambda x: x * x.square().mean(-1, keepdim=True).rsqrt()  # noqa: E731
    for halves, expected in (([eye, zero], next_TD), ([zero, eye], h_TD)):
        module.proj.weight.data = torch.cat(halves, 1)
        y_TD, routes = module(h_TD, next_TD, torch.arange(5), Packed([5]))
        torch.testing.assert_close(y_TD, normed(expected), atol=1e-4, rtol=1e-4)
        assert routes is None
