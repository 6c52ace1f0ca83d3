"""Grouped-query attention on flat tokens (arXiv 2305.13245): the layers of Llama-3 and Qwen2, R1's students.

G key-value heads serve H query heads. As in mla.py, this module projects and turns; `attend` does the rest.

Shapes: T tokens, D model, H query heads, G key-value heads, K head dims.
"""

from torch import Tensor, nn

from shoal.model.attend import Attend
from shoal.model.config import GQAConfig, ModelConfig
from shoal.model.layers import Linear
from shoal.model.rope import Angles
from shoal.ops import dispatch as ops


class GroupedAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        a = config.attention
        assert isinstance(a, GQAConfig)
        self.layer, self.scale, self.head_dim = layer, config.softmax_scale, a.head_dim
        self.q = Linear(config.dim, a.n_heads * a.head_dim, a.bias)
        self.k = Linear(config.dim, a.n_kv_heads * a.head_dim, a.bias)
        self.v = Linear(config.dim, a.n_kv_heads * a.head_dim, a.bias)
        self.out = Linear(a.n_heads * a.head_dim, config.dim)

    def forward(self, x_TD: Tensor, rope: Angles, attend: Attend) -> Tensor:
        q_THK, k_TGK, v_TGK = (proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q, self.k, self.v))
        q_THK, k_TGK = ops.rotate_halves(q_THK, *rope), ops.rotate_halves(k_TGK, *rope)
        return self.out(attend.heads(self.layer, q_THK, k_TGK, v_TGK, self.scale).flatten(1))
