"""The model on flat tokens: `head(body(embed(tokens)))`, so that a pipeline stage can hold a piece.

One Transformer composes both kinds of model: attention is latent or grouped-query, feed-forward is dense or a mixture
of experts. There is no batch dimension, no cache and no `if training`: `attend` says what a token sees.

Shapes: T tokens, D model, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shoal.model.attend import Attend
from shoal.model.block import Block
from shoal.model.config import ModelConfig
from shoal.model.layers import Embedding, Linear, RMSNorm
from shoal.model.moe import Router, Routes
from shoal.model.mtp import MTP
from shoal.model.rope import Angles, angles

Run = Callable[[nn.Module, Tensor, Angles, Attend], tuple[Tensor, Routes | None]]

WRITERS = ("attn.out.weight", ".down.weight", "experts.down")  # into the residual stream


class Transformer(nn.Module):
    """`model(tokens_T, positions_T, attend)` → logits [T, V] in the weights' dtype."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.mtp = nn.ModuleList(MTP(config, k) for k in range(config.n_mtp))

    def body(
        self, h_TD: Tensor, positions_T: Tensor, attend: Attend, run: Run | None = None
    ) -> tuple[Tensor, list[Routes]]:
        """All layers and the final norm; what each mixture's router chose, in layer order.

        `run(layer, h_TD, rope, attend)` runs a layer some other way, recomputing its activations for example.
        """
        rope, chosen = angles(positions_T, self.config), []
        for layer in self.layers:
            h_TD, routes = run(layer, h_TD, rope, attend) if run else layer(h_TD, rope, attend)
            chosen += [routes] if routes else []
        return self.norm(h_TD), chosen

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        h_TD, _ = self.body(self.embed(tokens_T), positions_T, attend)
        return self.head(h_TD)

    def set_dtype(self, dtype: torch.dtype) -> "Transformer":
        """Matrices in `dtype`; norms and routers stay fp32 (V3, section 3.3.1: what is kept in high precision)."""
        high = {id(p) for m in self.modules() if isinstance(m, (RMSNorm, Router)) for p in m.parameters()}
        for p in self.parameters():
            if id(p) not in high:
                p.data = p.data.to(dtype)
        return self

    @torch.no_grad()
    def init_weights(self, seed: int, embed_std: float | None = None, out_std: float | None = None) -> "Transformer":
        """Norms at one, router biases and vectors at zero, every matrix normal with the config's `init_std`.

        `embed_std` and `out_std` are for the embedding and for the matrices that write into the residual stream.
        """
        generator = torch.Generator(self.embed.weight.device).manual_seed(seed)
        std = self.config.init_std
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif p.dim() == 1:
                p.zero_()
            else:
                special = embed_std if name == "embed.weight" else out_std if name.endswith(WRITERS) else None
                p.normal_(0.0, std if special is None else special, generator=generator)
        for module in self.modules():
            if isinstance(module, Router):
                module.bias.zero_()
        return self
