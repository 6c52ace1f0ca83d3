"""How much arithmetic a token costs, counted from the configuration alone.

The convention, the same for every figure Shoal prints: a matrix [out, in] that multiplies a token costs 2·out·in FLOPs
forward and twice that backward, so training costs

    6 · N_active  +  attention        N_active: parameters in matrices that multiply the token

The head counts, and counts again for every multi-token module that uses it. Looking up an embedding, norms, rotary
angles and the choice of experts multiply no matrix and count as nothing. Attention counts only what the causal mask
lets through: in a segment of T tokens a token meets (T+1)/2 keys on average, each costing 2·(query dims + value dims)
a head. Many published figures count the masked half too; at 4K tokens and V3's shape that alone would add 12%.
Recomputed activations are work, but not progress: they are left out, so this is the F of MFU, not of "hardware" FLOPs.

Sources: Kaplan et al. (arXiv 2001.08361) for 6N; PaLM (arXiv 2204.02311, appendix B) for MFU; DeepSeek-V2
(arXiv 2405.04434, section 2.1) for latent attention, whose keys and values are rebuilt in training.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from shoal.model.config import GQAConfig, MLAConfig, ModelConfig

BACKWARD = 2  # one product for the input's gradient, one for the weight's, each as large as the forward one


@dataclass(frozen=True)
class Flops:
    """FLOPs a token, by where they are spent. `mtp` holds whole multi-token modules: layer, projection and head."""

    projections: float = 0.0  # of attention: queries, keys, values, output
    attention: float = 0.0  # scores and weighted values
    feed_forward: float = 0.0  # dense layers, chosen and shared experts
    router: float = 0.0
    head: float = 0.0
    mtp: float = 0.0

    @property
    def total(self) -> float:
        return sum(astuple(self))

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, n: float) -> "Flops":
        return Flops(*(n * a for a in astuple(self)))

    __rmul__ = __mul__


def mean_keys(lengths: Sequence[int]) -> float:
    """Keys a token meets on average under causal attention inside segments of these lengths."""
    return sum(n * (n + 1) / 2 for n in lengths) / sum(lengths)


def mean_context(lengths: Sequence[int]) -> float:
    """The length of equal segments in which a token meets as many keys as in these."""
    return 2 * mean_keys(lengths) - 1


def forward(config: ModelConfig, context: float) -> Flops:
    """Reading one token of a document as long as `context`, keys and values rebuilt from the latent."""
    return of_token(config, (context + 1) / 2)


def training(config: ModelConfig, context: float, mtp_share: float = 1.0) -> Flops:
    """Forward and backward of one token in training: the numerator of MFU.

    Multi-token modules that rest are no work: `mtp_share` of a run's tokens go through them.
    """
    once = (1 + BACKWARD) * forward(config, context)
    return replace(once, mtp=once.mtp * mtp_share)


def of_token(config: ModelConfig, keys: float) -> Flops:
    """Forward of one token that meets `keys` keys in every layer, multi-token modules included."""
    layers = sum((of_layer(config, i, keys) for i in range(config.n_layers)), Flops())
    module = of_layer(config, config.n_layers, keys).total + 2.0 * 2 * config.dim**2 + head(config)
    return layers + Flops(head=head(config), mtp=config.n_mtp * module)


def of_layer(config: ModelConfig, layer: int, keys: float) -> Flops:
    a, m, d = config.attention, config.moe, config.dim
    per_key = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim if isinstance(a, MLAConfig) else 2 * a.head_dim
    shared = Flops(projections=2.0 * attention_parameters(a, d), attention=2.0 * a.n_heads * per_key * keys)
    if m is None or not config.is_moe(layer):
        return shared + Flops(feed_forward=2.0 * 3 * d * config.hidden_dim)
    experts = (m.n_activated + m.n_shared_experts) * 3 * d * m.moe_dim
    return shared + Flops(feed_forward=2.0 * experts, router=2.0 * d * m.n_routed_experts)


def attention_parameters(a: MLAConfig | GQAConfig, dim: int) -> int:
    """Numbers in one layer's attention matrices; all of them multiply every token."""
    if isinstance(a, GQAConfig):
        return dim * a.head_dim * 2 * (a.n_heads + a.n_kv_heads)
    q_dim = a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    query = a.q_lora_rank * (dim + q_dim) if a.q_lora_rank else dim * q_dim
    latent = dim * (a.kv_lora_rank + a.qk_rope_head_dim)
    rebuilt = a.kv_lora_rank * a.n_heads * (a.qk_nope_head_dim + a.v_head_dim)
    return query + latent + rebuilt + dim * a.n_heads * a.v_head_dim


def head(config: ModelConfig) -> float:
    return 2.0 * config.dim * config.vocab_size
