"""Multi-head latent attention on flat tokens (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The keys and values of all heads are rebuilt from one small latent per token, so a cache holds only

    c = norm(W_down x)   [T, C]    and    k_rope = rope(W_rope x)   [T, R]

with k_nope, v = W_up c and scores q_nope·k_nope + q_rope·k_rope. This module projects. What attends to what, and
whether keys are rebuilt (training, prefill) or W_up is absorbed into the query (decoding), is `attend`'s business:
there is no mask, no cache and no batch dimension here.

Shapes: T tokens, D model, H heads, C latent, N nope, R rope, V value dims.
"""

from torch import Tensor, nn

from shoal.model.attend import Attend
from shoal.model.config import MLAConfig, ModelConfig
from shoal.model.layers import Linear, RMSNorm
from shoal.model.rope import Angles
from shoal.ops import dispatch as ops

LATENT_EPS = 1e-6  # of both latents' norms, whatever the model's is: so DeepSeek's own code has it, and transformers


class LatentAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        a = config.attention
        assert isinstance(a, MLAConfig)
        self.layer, self.scale, self.a = layer, config.softmax_scale, a
        q_dims = a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        if a.q_lora_rank is None:
            self.q = Linear(config.dim, q_dims)
        else:
            self.q_down = Linear(config.dim, a.q_lora_rank)
            self.q_norm = RMSNorm(a.q_lora_rank, LATENT_EPS)
            self.q_up = Linear(a.q_lora_rank, q_dims)
        self.kv_down = Linear(config.dim, a.kv_lora_rank + a.qk_rope_head_dim)
        self.kv_norm = RMSNorm(a.kv_lora_rank, LATENT_EPS)
        self.kv_up = Linear(a.kv_lora_rank, a.n_heads * (a.qk_nope_head_dim + a.v_head_dim))
        self.out = Linear(a.n_heads * a.v_head_dim, config.dim)

    def forward(self, x_TD: Tensor, rope: Angles, attend: Attend) -> Tensor:
        a = self.a
        q_TQ = self.q(x_TD) if a.q_lora_rank is None else self.q_up(self.q_norm(self.q_down(x_TD)))
        q_THK = q_TQ.unflatten(-1, (a.n_heads, -1))
        q_nope_THN, q_rope_THR = q_THK.split([a.qk_nope_head_dim, a.qk_rope_head_dim], dim=-1)
        c_TC, k_rope_TR = self.kv_down(x_TD).split([a.kv_lora_rank, a.qk_rope_head_dim], dim=-1)
        q_rope_THR, k_rope_TR = ops.rotate_pairs(q_rope_THR, *rope), ops.rotate_pairs(k_rope_TR, *rope)
        c_TC = self.kv_norm(c_TC)
        o_THV = attend.latent(self.layer, q_nope_THN, q_rope_THR, c_TC, k_rope_TR, self.kv_up, self.scale)
        return self.out(o_THV.flatten(1))
