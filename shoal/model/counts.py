"""How many parameters a configuration has, and how many of them a token meets. Torch-free and exact.

"Active" is what a token is multiplied with: everything but the routed experts that were not chosen and the embedding,
which is a lookup of one row. So counted V3 has 36.63B (published as 36.7B; 37.55B with the whole embedding), V2 20.85B
(21B), V2-Lite 2.45B (2.4B). A tied head is multiplied with, and counts. A multi-token module stands on its own:
`mtp_total` is what it adds, `mtp_active` what one pass through it touches, the model's embedding and head included, as
DeepSeek publishes it; their 11.5B and 2.4B leave out the projection that joins the two halves (0.1B), these numbers
don't. The router's bias is a buffer, not a parameter.
"""

from dataclasses import dataclass

from shoal.model.config import GQAConfig, MLAConfig, ModelConfig


@dataclass(frozen=True)
class Counts:
    total: int  # the model without its multi-token modules
    active: int
    embedding: int
    head: int  # 0 where it is tied to the embedding
    mtp_total: int
    mtp_active: int


def count_parameters(config: ModelConfig) -> Counts:
    c = config
    embedding = c.vocab_size * c.dim
    head = 0 if c.tie_embeddings else embedding
    layers = [layer_parameters(c, i) for i in range(c.n_layers)]
    modules = [layer_parameters(c, c.n_layers + k) for k in range(c.n_mtp)]
    join = 2 * c.dim * c.dim + 3 * c.dim  # the projection of [embedding; hidden], their norms and the last one
    return Counts(
        total=embedding + head + c.dim + sum(total for total, _ in layers),  # c.dim: the last norm
        active=embedding
        + c.dim
        + sum(active for _, active in layers),  # the head, tied or not, has the embedding's size
        embedding=embedding,
        head=head,
        mtp_total=sum(total + join for total, _ in modules),
        mtp_active=sum(active + join + 2 * embedding for _, active in modules),
    )


def layer_parameters(config: ModelConfig, layer: int) -> tuple[int, int]:
    """(all, active) parameters of one layer: two norms, attention, feed-forward."""
    c = config
    common = 2 * c.dim + attention_parameters(c.dim, c.attention)
    if not c.is_moe(layer):
        dense = common + 3 * c.dim * c.hidden_dim
        return dense, dense
    assert c.moe is not None
    expert = 3 * c.dim * c.moe.moe_dim
    common += c.moe.n_routed_experts * c.dim + c.moe.n_shared_experts * expert  # router and shared experts
    return common + c.moe.n_routed_experts * expert, common + c.moe.n_activated * expert


def attention_parameters(dim: int, attention: MLAConfig | GQAConfig) -> int:
    a = attention
    if isinstance(a, GQAConfig):
        q, kv = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
        return 2 * dim * q + 2 * dim * kv + (q + 2 * kv if a.bias else 0)
    q = a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
    query = (dim + 1 + q) * a.q_lora_rank if a.q_lora_rank else dim * q
    down = dim * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank  # and the norm of the latent
    up = a.kv_lora_rank * a.n_heads * (a.qk_nope_head_dim + a.v_head_dim)
    return query + down + up + a.n_heads * a.v_head_dim * dim
