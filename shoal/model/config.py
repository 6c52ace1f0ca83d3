"""What a model is, in numbers: one frozen description that every room reads. Torch-free.

`attention` is latent (MLA, DeepSeek-V2 arXiv 2405.04434) or grouped-query (GQA: Llama-3 and Qwen2, R1's students).
`moe` is None for a dense model; otherwise layers from `n_dense_layers` on are mixtures of experts (arXiv 2401.06066).
Names follow the papers; `hf.py` translates them to the names of `config.json`.
"""

from dataclasses import dataclass
from math import log
from typing import Literal


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention. Without `q_lora_rank` the query is one full matrix (V2-Lite)."""

    n_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    q_lora_rank: int | None = None


@dataclass(frozen=True)
class GQAConfig:
    """Grouped-query attention. `bias` puts biases on q, k and v (Qwen2)."""

    n_heads: int
    n_kv_heads: int
    head_dim: int
    bias: bool = False


@dataclass(frozen=True)
class MoEConfig:
    """Routed experts of width `moe_dim`, `n_activated` of them a token, and shared ones that see every token.

    `scoring` "sigmoid" is V3's noaux_tc: selection uses scores plus a bias, a group is worth its two best experts.
    `scoring` "softmax" is V2's: no bias, a group is worth its best expert (greedy where `n_group` is 1).
    """

    n_routed_experts: int
    n_shared_experts: int
    n_activated: int
    moe_dim: int
    n_dense_layers: int = 1
    n_group: int = 1
    topk_group: int = 1
    scoring: Literal["sigmoid", "softmax"] = "sigmoid"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0


@dataclass(frozen=True)
class YarnConfig:
    """YaRN (arXiv 2309.00071) as DeepSeek uses it: `original` is the context before stretching by `factor`."""

    factor: float
    original: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


@dataclass(frozen=True)
class Llama3RopeConfig:
    """Llama-3.1's frequency-dependent stretching of the rotary wavelengths."""

    factor: float
    original: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int
    dim: int
    n_layers: int
    hidden_dim: int  # of the dense feed-forward layers
    attention: MLAConfig | GQAConfig
    moe: MoEConfig | None = None
    n_mtp: int = 0  # multi-token prediction modules after the last layer
    tie_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig | Llama3RopeConfig | None = None
    norm_eps: float = 1e-6
    max_positions: int = 4096
    init_std: float = 0.006

    def is_moe(self, layer: int) -> bool:
        """Multi-token modules count as layers after the last one, and are mixtures wherever the model is."""
        return self.moe is not None and layer >= self.moe.n_dense_layers

    @property
    def rope_dim(self) -> int:
        a = self.attention
        return a.qk_rope_head_dim if isinstance(a, MLAConfig) else a.head_dim

    @property
    def softmax_scale(self) -> float:
        """1/sqrt(query dims), times YaRN's temperature squared for latent attention (FACTS of V2/V3)."""
        a, yarn = self.attention, self.rope_scaling
        if isinstance(a, GQAConfig):
            return a.head_dim**-0.5
        scale = (a.qk_nope_head_dim + a.qk_rope_head_dim) ** -0.5
        if isinstance(yarn, YarnConfig) and yarn.mscale_all_dim and yarn.factor > 1:
            scale *= (0.1 * yarn.mscale_all_dim * log(yarn.factor) + 1.0) ** 2
        return scale
