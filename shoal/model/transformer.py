"""The model on flat tokens: `head(body(embed(tokens)))`, so that a pipeline stage can hold a piece.

One Transformer composes both kinds of model: attention is latent or grouped-query, feed-forward is dense or a mixture
of experts. There is no batch dimension, no cache and no `if training`: `attend` says what a token sees.

Shapes: T tokens, D model, V vocabulary.
"""

import torch
from torch import Tensor, nn

from shoal.model.config import MLAConfig, ModelConfig
from shoal.model.gqa import GroupedAttention
from shoal.model.layers import Embedding, Linear, RMSNorm, SwiGLU
from shoal.model.mla import LatentAttention
from shoal.model.moe import MoE, Router, Routes
from shoal.model.rope import Angles, angles


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        latent = isinstance(config.attention, MLAConfig)
        self.attn = LatentAttention(config, layer) if latent else GroupedAttention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = MoE(config) if config.is_moe(layer) else SwiGLU(config.dim, config.hidden_dim)

    def forward(self, x_TD: Tensor, rope: Angles, attend) -> tuple[Tensor, Routes | None]:
        x_TD = x_TD + self.attn(self.attn_norm(x_TD), rope, attend)
        y = self.ffn(self.ffn_norm(x_TD))
        y_TD, routes = y if isinstance(y, tuple) else (y, None)
        return x_TD + y_TD, routes


class Transformer(nn.Module):
    """`model(tokens_T, positions_T, attend)` → logits [T, V] in the weights' dtype."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        from shoal.model.mtp import MTP  # an MTP module holds a Block

        self.config = config
        self.embed = Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.head = Linear(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.mtp = nn.ModuleList(MTP(config, k) for k in range(config.n_mtp))

    def body(self, h_TD: Tensor, positions_T: Tensor, attend, run=None) -> tuple[Tensor, list[Routes]]:
        """All layers and the final norm; what each mixture's router chose, in layer order.

        `run(layer, h_TD, rope, attend)` runs a layer some other way, recomputing its activations for example.
        """
        rope, chosen = angles(positions_T, self.config), []
        for layer in self.layers:
            h_TD, routes = run(layer, h_TD, rope, attend) if run else layer(h_TD, rope, attend)
            chosen += [routes] if routes else []
        return self.norm(h_TD), chosen

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend) -> Tensor:
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
    def init_weights(self, seed: int) -> "Transformer":
        """Norms at one, router biases and vectors at zero, every matrix normal with `init_std`."""
        generator = torch.Generator(self.embed.weight.device).manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif p.dim() == 1:
                p.zero_()
            else:
                p.normal_(0.0, self.config.init_std, generator=generator)
        for module in self.modules():
            if isinstance(module, Router):
                module.bias.zero_()
        return self
