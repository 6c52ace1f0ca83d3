"""The bytes of a training step, part by part, before anything is allocated; and those of a cached token.

    weights      2 a number in bf16 (norms, router and biases stay fp32)        4 throughout in fp32
    masters      4 a number beside bf16 weights                                 none: fp32 weights are their own
    moments      AdamW 2 × 4; Muon 4 on the matrices it moves, AdamW's 8 on embedding, head and vectors; half in bf16
    gradients    as wide as the weights they belong to, and an fp32 sum of them where batches are accumulated
    activations  what autograd keeps of a token between forward and backward, layer by layer
    logits       one chunk of fp32 logits and its gradient; they never stand whole
    transients   in backward, the gradients of one layer's activations
    libraries    on a CPU in bf16, kernels that oneDNN builds and keeps for each number of rows experts have had; fewer
                 where layers' products are our own

Activations are counted from the equations of each layer (V2 section 2.1, DeepSeekMoE section 3): the inputs of every
product, norm and SwiGLU, and what fused attention saves; plain attention in fp32 also keeps T scores a head and token,
which is not counted. With recomputation only each layer's input stays, and one layer at a time is rebuilt. In fp8
(precision/policy.py) the inputs of a block's products are kept in 8 bits, that of attention's out projection in 12,
SwiGLU's two inputs in 8 and its output not at all; what norms, router and attention keep stays as it is.

`LIBRARIES` and `OVERHEAD` are measured, not derived: resident memory grows over the first 30 steps or so, and ended 15%
above to 11% below what is foretold for 9M parameters (mixture, bf16 and fp32) and 107.5M (bf16) with 4,096 tokens.
With products of our own: 776 MiB resident for 3.9M parameters, of which the interpreter's 240 are left out, where 535
are foretold. Fewer tokens need fewer kernels, and then too much is foretold.
"""

from dataclasses import asdict, dataclass, replace
from typing import Literal

from shoal.errors import ResourceError
from shoal.model.config import MLAConfig, ModelConfig
from shoal.model.counts import count_parameters

OVERHEAD = 1.15  # on everything counted: fragmentation, temporaries of one operation
LIBRARIES, FEW_LIBRARIES = 768 << 20, 192 << 20  # of oneDNN's kernels: once its cache is full; without those of layers
LOGITS_CHUNK = 1024  # tokens whose logits stand at once
SCALED = 1 + 1 / 128  # bytes of a number in 8 bits with its share of a tile's one-byte scale
SCALED_FP32 = 1 + 4 / 128


@dataclass(frozen=True)
class Step:
    """How a step is computed, as far as memory cares. `tokens` are those of one micro batch."""

    tokens: int
    optimizer: Literal["adamw", "muon"] = "adamw"
    dtype: Literal["bf16", "fp32"] = "bf16"
    precision: Literal["plain", "fp8"] = "plain"
    scales: Literal["ue8m0", "fp32"] = "ue8m0"  # of fp8
    moments: Literal["bf16", "fp32"] = "fp32"
    accumulates: bool = False
    recompute: bool = False
    logits_chunk: int = LOGITS_CHUNK
    device: Literal["cpu", "cuda"] = "cpu"
    own_products: bool = False  # by ops/native/gemm.c

    @property
    def width(self) -> int:
        return 2 if self.dtype == "bf16" else 4


@dataclass(frozen=True)
class Bytes:
    weights: int
    masters: int
    moments: int
    gradients: int
    activations: int
    logits: int
    transients: int
    libraries: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Numbers:
    """A model's stored parameters by the treatment they get: `hidden` matrices are the ones Muon may move."""

    hidden: int
    embedding: int  # and head
    vectors: int  # norms, biases, and the router, which stays fp32

    @property
    def total(self) -> int:
        return self.hidden + self.embedding + self.vectors


def numbers(config: ModelConfig) -> Numbers:
    counts = count_parameters(config)
    vectors = config.dim * (1 + 3 * config.n_mtp)
    vectors += sum(in_vectors(config, i) for i in range(config.n_layers + config.n_mtp))
    embedding = counts.embedding + counts.head
    return Numbers(counts.total + counts.mtp_total - embedding - vectors, embedding, vectors)


def in_vectors(config: ModelConfig, layer: int) -> int:
    """One layer's norms and biases, and its router."""
    a, d = config.attention, config.dim
    router = config.moe.n_routed_experts * d if config.moe and config.is_moe(layer) else 0
    if isinstance(a, MLAConfig):
        return 2 * d + a.kv_lora_rank + (a.q_lora_rank or 0) + router
    return 2 * d + a.bias * a.head_dim * (a.n_heads + 2 * a.n_kv_heads) + router


def of_training(config: ModelConfig, step: Step) -> Bytes:
    """Bytes of one training step at its peak, before `OVERHEAD`."""
    n = numbers(config)
    mixed = step.dtype == "bf16"
    matrices = n.hidden + n.embedding
    return Bytes(
        weights=matrices * step.width + n.vectors * 4,
        masters=matrices * 4 if mixed else 0,
        moments=(2 if step.moments == "bf16" else 4) * (2 * n.total - n.hidden * (step.optimizer == "muon")),
        gradients=matrices * (step.width + 4 * step.accumulates) + n.vectors * 4 * (1 + step.accumulates),
        activations=step.tokens * activation_bytes(config, step),
        logits=2 * 4 * min(step.logits_chunk, step.tokens) * config.vocab_size,
        transients=step.tokens * transient_bytes(config, step),
        libraries=library_bytes(config, step),
    )


def transient_bytes(config: ModelConfig, step: Step) -> int:
    """What backward holds of a token beside what forward left: the gradients of the largest layer's activations."""
    return step.width * max(saved(config, i) for i in range(config.n_layers + config.n_mtp))


def library_bytes(config: ModelConfig, step: Step) -> int:
    if not config.moe or step.device == "cuda" or step.dtype == "fp32":
        return 0
    return FEW_LIBRARIES if step.own_products else LIBRARIES


def activation_bytes(config: ModelConfig, step: Step) -> int:
    """What a token leaves behind for backward."""
    d, w = config.dim, step.width
    layers = [layer_bytes(config, i, step) for i in range(config.n_layers)]
    outside = 6 * d * w  # a module's embedding, two norms, their pair, final norm
    modules = config.n_mtp * [layer_bytes(config, config.n_layers, step) + outside]
    if step.recompute:
        return w * len(layers) * d + max(layers + modules) + w * (config.n_mtp * 7 * d + 2 * d)
    return sum(layers) + sum(modules) + w * 2 * d


def layer_bytes(config: ModelConfig, layer: int, step: Step) -> int:
    """What one layer keeps of a token."""
    if step.precision == "plain":
        return step.width * saved(config, layer)
    eight, twelve = saved_in_few_bits(config, layer)
    scaled = SCALED if step.scales == "ue8m0" else SCALED_FP32
    return round(2 * saved_beside(config, layer) + scaled * eight + (0.5 + SCALED) * twelve)


def saved(config: ModelConfig, layer: int) -> int:
    """Numbers one layer keeps of a token: inputs of norms and products, q, k, v and output of attention, SwiGLU."""
    a, m, d = config.attention, config.moe, config.dim
    if isinstance(a, MLAConfig):
        qk = a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim)
        attention = 2 * qk + 2 * a.n_heads * a.v_head_dim + 2 * (a.q_lora_rank or 0) + 2 * a.kv_lora_rank
    else:
        attention = 2 * a.head_dim * (a.n_heads + a.n_kv_heads)
    if m is None or not config.is_moe(layer):
        feed_forward = 3 * config.hidden_dim  # gate, up, silu(gate) · up
    else:
        rows = m.n_activated * (2 * d + 3 * m.moe_dim)  # gathered input, output before it is weighted
        router = 4 * m.n_routed_experts  # fp32, so twice as wide: its scores twice
        feed_forward = rows + 3 * m.n_shared_experts * m.moe_dim + router
    return attention + feed_forward + 4 * d


def saved_in_few_bits(config: ModelConfig, layer: int) -> tuple[int, int]:
    """Numbers that a layer in fp8 keeps in 8 and in 12 bits: what its products read, SwiGLU's inputs."""
    a, m, d = config.attention, config.moe, config.dim
    if isinstance(a, MLAConfig):
        attention, heads = d + (a.q_lora_rank or 0) + a.kv_lora_rank, a.n_heads * a.v_head_dim
    else:
        attention, heads = d, a.n_heads * a.head_dim
    if m is None or not config.is_moe(layer):
        return attention + d + 2 * config.hidden_dim, heads
    shared = d + 2 * m.n_shared_experts * m.moe_dim if m.n_shared_experts else 0
    return attention + m.n_activated * (d + 2 * m.moe_dim) + shared, heads


def saved_beside(config: ModelConfig, layer: int) -> int:
    """Numbers of two bytes that a layer in fp8 keeps for norms, attention, router and the weights of its rows."""
    a, m, d = config.attention, config.moe, config.dim
    if isinstance(a, MLAConfig):
        heads = 2 * a.n_heads * (a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim)
        attention = heads + (a.q_lora_rank or 0) + a.kv_lora_rank + a.qk_rope_head_dim
    else:
        attention = 2 * a.head_dim * (a.n_heads + a.n_kv_heads)
    routed = m is not None and config.is_moe(layer)
    rows = m.n_activated * d + d + 4 * m.n_routed_experts if m and routed else 0
    return attention + 2 * d + rows


def check(config: ModelConfig, step: Step, memory_bytes: int) -> Bytes:
    """The bytes of a step that fits; raises ResourceError, saying what would fit, for one that does not."""
    need = of_training(config, step)
    if need.total * OVERHEAD <= memory_bytes:
        return need
    raise ResourceError(
        f"a training step of {step.tokens:,} tokens needs about {gib(need.total * OVERHEAD)}: "
        + ", ".join(f"{name} {gib(n)}" for name, n in asdict(need).items() if n),
        f"at most {gib(memory_bytes)}, the memory this machine can give",
        what_fits(config, step, memory_bytes),
    )


def what_fits(config: ModelConfig, step: Step, memory_bytes: int) -> str:
    """The nearest change that fits, as advice: fewer tokens, recomputation, or a smaller model."""
    for recompute in dict.fromkeys((step.recompute, True)):
        tokens = largest_tokens(config, replace(step, recompute=recompute), memory_bytes)
        if tokens:
            also = " with activation recomputation" if recompute and not step.recompute else ""
            return f"at most {tokens:,} tokens a micro batch{also} fit: lower the micro batch or the context"
    empty = of_training(config, replace(step, tokens=0))
    each = (empty.total - empty.libraries) / numbers(config).total
    share = max(0, int((memory_bytes / OVERHEAD - empty.libraries) / each))
    return f"a model of up to about {share / 1e6:,.0f}M parameters fits here: take a smaller preset"


def largest_tokens(config: ModelConfig, step: Step, memory_bytes: int) -> int:
    """The largest micro batch that fits, in whole multiples of 64 tokens; 0 where none does."""
    room = memory_bytes / OVERHEAD - of_training(config, replace(step, tokens=0)).total
    room -= 2 * 4 * step.logits_chunk * config.vocab_size
    return max(0, int(room / (activation_bytes(config, step) + transient_bytes(config, step)))) // 64 * 64


def cache_bytes_per_token(config: ModelConfig, width: int = 2) -> int:
    """What serving keeps of a token: per layer the latent and the rotary key (absorbed MLA), or keys and values."""
    a = config.attention
    per_layer = a.kv_lora_rank + a.qk_rope_head_dim if isinstance(a, MLAConfig) else 2 * a.n_kv_heads * a.head_dim
    return width * config.n_layers * per_layer


def grouped_cache_bytes_per_token(config: ModelConfig, heads_per_group: int, width: int = 2) -> int:
    """The same model with grouped-query attention; one head a group is plain multi-head attention."""
    a = config.attention
    head_dim = a.qk_nope_head_dim + a.qk_rope_head_dim + a.v_head_dim if isinstance(a, MLAConfig) else 2 * a.head_dim
    return width * config.n_layers * max(1, a.n_heads // heads_per_group) * head_dim


def gib(n: float) -> str:
    """In the unit that leaves a digit to read."""
    return f"{n / 2**30:,.2f} GiB" if n >= 2**30 / 10 or not n else f"{n / 2**20:,.1f} MiB"
