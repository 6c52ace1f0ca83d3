"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): module k predicts the token k + 1 ahead.

    h'_i = W [norm(emb(t_{i+k})); norm(h_i)]      h^k = block(h')      logits = head(norm(h^k))

Embedding and head are the model's own. The paper writes the hidden state first; the published weights are read with the
embedding first, and so are ours. The first module takes the main model's output after its final norm, as serving
engines do with the published weights.

Shapes: T tokens, D model.
"""

import torch
from torch import Tensor, nn

from shoal.model.attend import Attend
from shoal.model.block import Block
from shoal.model.config import ModelConfig
from shoal.model.layers import Linear, RMSNorm
from shoal.model.moe import Routes
from shoal.model.rope import angles


class MTP(nn.Module):
    def __init__(self, config: ModelConfig, depth: int):
        super().__init__()
        self.config = config
        self.embed_norm = RMSNorm(config.dim, config.norm_eps)
        self.hidden_norm = RMSNorm(config.dim, config.norm_eps)
        self.proj = Linear(2 * config.dim, config.dim)
        self.block = Block(config, config.n_layers + depth)
        self.norm = RMSNorm(config.dim, config.norm_eps)

    def forward(
        self, h_TD: Tensor, next_embed_TD: Tensor, positions_T: Tensor, attend: Attend
    ) -> tuple[Tensor, Routes | None]:
        """`next_embed_TD` embeds each token's successor (k ahead). The result is normed, ready for the model's head."""
        both = torch.cat([self.embed_norm(next_embed_TD), self.hidden_norm(h_TD)], -1)
        h_TD, routes = self.block(self.proj(both), angles(positions_T, self.config), attend)
        return self.norm(h_TD), routes
