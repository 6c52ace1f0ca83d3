"""One layer: attention and feed-forward, each on the normed residual stream and added back to it.

Shapes: T tokens, D model.
"""

from torch import Tensor, nn

from shoal.model.attend import Attend
from shoal.model.config import MLAConfig, ModelConfig
from shoal.model.gqa import GroupedAttention
from shoal.model.layers import RMSNorm, SwiGLU
from shoal.model.mla import LatentAttention
from shoal.model.moe import MoE, Routes
from shoal.model.rope import Angles


class Block(nn.Module):
    """x + attention(norm x), then x + feed-forward(norm x)."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.dim, config.norm_eps)
        latent = isinstance(config.attention, MLAConfig)
        self.attn = LatentAttention(config, layer) if latent else GroupedAttention(config, layer)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.is_moe = config.is_moe(layer)
        self.ffn = MoE(config) if self.is_moe else SwiGLU(config.dim, config.hidden_dim)

    def forward(self, x_TD: Tensor, rope: Angles, attend: Attend) -> tuple[Tensor, Routes | None]:
        x_TD = x_TD + self.attn(self.attn_norm(x_TD), rope, attend)
        h_TD = self.ffn_norm(x_TD)
        y_TD, routes = self.ffn(h_TD) if self.is_moe else (self.ffn(h_TD), None)
        return x_TD + y_TD, routes
