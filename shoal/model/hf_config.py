"""`config.json` both ways: Hugging Face's keys to `ModelConfig` and back. Torch-free.

Every value is checked for type and range as it is read, and whatever would change the arithmetic in a way the model
does not know (another activation, biases elsewhere, sliding windows, other rotary stretchings) is refused by name,
never ignored. Both spellings of rotary settings are read: `rope_theta` + `rope_scaling`, which everyone understands and
we write, and `rope_parameters`, which transformers 5 writes.

`auto_map`, a request to run Python code from the folder, stands even in DeepSeek's published config.json. Where the
architecture is one of ours it is not needed and never followed; where it is not, the folder is refused.

| attention, feed-forward | model_type |
|---|---|
| latent, sigmoid experts or dense | deepseek_v3 |
| latent, softmax experts | deepseek_v2 |
| grouped, sigmoid experts | glm4_moe (GLM-4.5: V3's mixture on grouped-query attention) |
| grouped, dense, with biases / without | qwen2 / llama |
"""

from dataclasses import dataclass
from math import isfinite
from typing import Any

from shoal.errors import ModelError
from shoal.model.config import GQAConfig, Llama3RopeConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig

CLASSES = {
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}
MISSING: Any = object()
WIDEST = 2**20  # no dimension of a layer is wider; the vocabulary may be 16 times that
FIX = "open the folder with the program that wrote it, or correct config.json"


@dataclass(frozen=True)
class Fields:
    """The values of one JSON object, each asked for with the type and range it must have."""

    raw: dict

    def whole(self, key: str, low: int, high: int, default: Any = MISSING) -> int:
        value = self.given(key, default)
        if value is default:
            return value
        if type(value) is not int or not low <= value <= high:
            raise self.bad(key, f"a whole number from {low} to {high}")
        return value

    def real(self, key: str, low: float, high: float, default: Any = MISSING) -> float:
        value = self.given(key, default)
        if value is default:
            return value
        if type(value) not in (int, float) or not isfinite(value) or not low <= value <= high:
            raise self.bad(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def word(self, key: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self.given(key, default)
        if value not in allowed:
            raise self.bad(key, " or ".join(allowed))
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.given(key, default)
        if type(value) is not bool:
            raise self.bad(key, "true or false")
        return value

    def must_be(self, key: str, expected, default: Any = MISSING) -> None:
        """For settings of which the model knows one value only; absent means `default`, or that value."""
        value = self.given(key, expected if default is MISSING else default)
        if type(value) is not type(expected) or value != expected:
            raise self.bad(key, f"{expected!r}, the only one supported")

    def given(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        if value is not None:
            return value
        if default is MISSING:
            raise ModelError(f"config.json has no {key}", f"{key}", FIX)
        return default

    def bad(self, key: str, expected: str) -> ModelError:
        return ModelError(f"config.json says {key} = {str(self.raw.get(key))[:80]}", expected, FIX)


def read_config(raw: dict) -> ModelConfig:
    """What `config.json` describes, or a ModelError that names the setting we cannot follow."""
    f, kind = Fields(raw), raw.get("model_type")
    if not isinstance(kind, str) or kind not in CLASSES:
        wants_code = "; it asks to run its own code (auto_map), which is never done" if "auto_map" in raw else ""
        raise ModelError(f"model_type {str(kind)[:80]!r}{wants_code}", " or ".join(CLASSES), "choose another model")
    f.must_be("hidden_act", "silu")
    f.must_be("mlp_bias", False)
    f.must_be("use_sliding_window", False)
    layer_types = f.given("layer_types", [])
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise f.bad("layer_types", "full_attention in every layer")
    theta, scaling = read_rope(f)
    n_layers, n_mtp = f.whole("num_hidden_layers", 1, 1024), f.whole("num_nextn_predict_layers", 0, 64, 0)
    latent = kind.startswith("deepseek")
    return ModelConfig(
        vocab_size=f.whole("vocab_size", 1, 16 * WIDEST),
        dim=f.whole("hidden_size", 1, WIDEST),
        n_layers=n_layers,
        hidden_dim=f.whole("intermediate_size", 1, WIDEST),
        attention=read_latent(f) if latent else read_grouped(f, kind),
        moe=read_moe(f, kind, n_layers + n_mtp) if latent or kind == "glm4_moe" else None,
        n_mtp=n_mtp,
        tie_embeddings=f.flag("tie_word_embeddings", False),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=f.real("rms_norm_eps", 1e-12, 0.1, 1e-6),
        max_positions=f.whole("max_position_embeddings", 1, 2**31),
        init_std=f.real("initializer_range", 0.0, 10.0, 0.02),
    )


def read_latent(f: Fields) -> MLAConfig:
    f.must_be("attention_bias", False)
    f.must_be("rope_interleave", True)
    rope = f.whole("qk_rope_head_dim", 2, WIDEST)
    if rope % 2:
        raise f.bad("qk_rope_head_dim", "an even number: rotary dimensions come in pairs")
    return MLAConfig(
        n_heads=f.whole("num_attention_heads", 1, 4096),
        kv_lora_rank=f.whole("kv_lora_rank", 1, WIDEST),
        qk_nope_head_dim=f.whole("qk_nope_head_dim", 1, WIDEST),
        qk_rope_head_dim=rope,
        v_head_dim=f.whole("v_head_dim", 1, WIDEST),
        q_lora_rank=f.whole("q_lora_rank", 1, WIDEST, None),
    )


def read_grouped(f: Fields, kind: str) -> GQAConfig:
    n_heads = f.whole("num_attention_heads", 1, 4096)
    n_kv_heads = f.whole("num_key_value_heads", 1, 4096, n_heads)
    head_dim = f.whole("head_dim", 2, WIDEST, f.whole("hidden_size", 1, WIDEST) // n_heads)
    if n_heads % n_kv_heads:
        raise f.bad("num_key_value_heads", f"a divisor of the {n_heads} heads")
    if head_dim < 2 or head_dim % 2:
        raise f.bad("head_dim", "an even number: rotary dimensions come in pairs")
    if kind == "llama":
        f.must_be("attention_bias", False)
    if kind == "glm4_moe":
        f.must_be("use_qk_norm", False)
    return GQAConfig(n_heads, n_kv_heads, head_dim, bias=kind == "qwen2" or f.flag("attention_bias", False))


def read_moe(f: Fields, kind: str, n_layers: int) -> MoEConfig | None:
    """`n_layers` counts the multi-token modules. None where no layer is a mixture."""
    n_dense = f.whole("first_k_dense_replace", 0, 2**16, 0 if kind == "deepseek_v2" else MISSING)
    if n_dense >= n_layers:
        return None
    f.must_be("moe_layer_freq", 1)
    sigmoid = kind != "deepseek_v2"
    methods = ("noaux_tc",) if sigmoid else ("greedy", "group_limited_greedy")
    method = f.word("topk_method", methods[0], methods)
    f.must_be("scoring_func", "sigmoid" if sigmoid else "softmax")
    if not sigmoid:  # DeepSeek's code renormalises then, transformers' does not
        f.must_be("norm_topk_prob", False)
    grouped = method != "greedy"
    moe = MoEConfig(
        n_routed_experts=f.whole("n_routed_experts", 1, 4096),
        n_shared_experts=f.whole("n_shared_experts", 0, 256, 0),
        n_activated=f.whole("num_experts_per_tok", 1, 4096),
        moe_dim=f.whole("moe_intermediate_size", 1, WIDEST),
        n_dense_layers=n_dense,
        n_group=f.whole("n_group", 1, 4096, 1) if grouped else 1,
        topk_group=f.whole("topk_group", 1, 4096, 1) if grouped else 1,
        scoring="sigmoid" if sigmoid else "softmax",
        norm_topk_prob=sigmoid and f.flag("norm_topk_prob", True),
        routed_scaling_factor=f.real("routed_scaling_factor", 1e-6, 1e6, 1.0),
    )
    experts_in_reach = moe.n_routed_experts // moe.n_group * moe.topk_group
    if moe.n_routed_experts % moe.n_group or moe.topk_group > moe.n_group:
        raise f.bad("n_group", f"groups that divide {moe.n_routed_experts} experts, and topk_group of them")
    if moe.n_activated > experts_in_reach:
        raise f.bad("num_experts_per_tok", f"at most {experts_in_reach}, the experts in the chosen groups")
    if sigmoid and moe.n_group > moe.topk_group and moe.n_routed_experts < 2 * moe.n_group:
        raise f.bad("n_group", "groups of two experts or more: a group is worth its two best")
    return moe


def read_rope(f: Fields) -> tuple[float, YarnConfig | Llama3RopeConfig | None]:
    rope = f.given("rope_parameters", f.given("rope_scaling", {}))
    if not isinstance(rope, dict):
        raise f.bad("rope_parameters", "an object")
    r = Fields(rope)
    default = 0.5 if f.raw.get("model_type") == "glm4_moe" else 1.0
    Fields(f.raw | rope).must_be("partial_rotary_factor", 1.0, default)
    theta = r.real("rope_theta", 1.0, 1e12, f.real("rope_theta", 1.0, 1e12, 10000.0))
    kind = r.word("rope_type", rope.get("type", "default"), ("default", "yarn", "llama3"))
    if kind == "default":
        return theta, None
    factor, original = r.real("factor", 1.0, 1e6), r.whole("original_max_position_embeddings", 1, 2**31)
    if kind == "llama3":
        low, high = r.real("low_freq_factor", 1e-3, 1e6, 1.0), r.real("high_freq_factor", 1e-3, 1e6, 4.0)
        if low >= high:
            raise r.bad("high_freq_factor", f"more than low_freq_factor, {low}")
        return theta, Llama3RopeConfig(factor, original, low, high)
    r.must_be("truncate", True)
    if rope.get("attention_factor") is not None:
        raise r.bad("attention_factor", "none: mscale and mscale_all_dim say it")
    return theta, YarnConfig(
        factor=factor,
        original=original,
        beta_fast=r.real("beta_fast", 1e-3, 1e6, 32.0),
        beta_slow=r.real("beta_slow", 1e-3, 1e6, 1.0),
        mscale=r.real("mscale", 0.0, 100.0, 1.0),
        mscale_all_dim=r.real("mscale_all_dim", 0.0, 100.0, 0.0),
    )


def architecture(config: ModelConfig) -> str:
    """The model_type others know this by. Not every mixture of mechanisms has one."""
    a, moe = config.attention, config.moe
    if isinstance(a, GQAConfig) and moe is None:
        return "qwen2" if a.bias else "llama"
    if moe is None or moe.scoring == "sigmoid":
        return "deepseek_v3" if isinstance(a, MLAConfig) else "glm4_moe"
    if isinstance(a, GQAConfig):
        raise nobody("grouped-query attention with softmax routing", "set moe.scoring = 'sigmoid'")
    if moe.norm_topk_prob:
        raise nobody("softmax routing with renormalised weights", "set moe.norm_topk_prob = false")
    return "deepseek_v2"


def nobody(what: str, fix: str) -> ModelError:
    return ModelError(what, "an architecture that Hugging Face folders have a name for", fix)


def to_hf_config(
    config: ModelConfig, dtype: str = "bfloat16", bos_id: int | None = None, eos_id: int | None = None
) -> dict:
    """`config.json` as DeepSeek, Qwen and Meta write it. `dtype` is that of the matrices."""
    c, kind = config, architecture(config)
    common = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "intermediate_size": c.hidden_dim,
        "num_hidden_layers": c.n_layers,
        "num_nextn_predict_layers": c.n_mtp,
        "num_attention_heads": c.attention.n_heads,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_positions,
        "initializer_range": c.init_std,
        "rms_norm_eps": c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "rope_theta": c.rope_theta,
        "rope_scaling": write_rope(c.rope_scaling),
        "attention_dropout": 0.0,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    return common | write_attention(c, kind) | (write_moe(c, kind) if kind.startswith(("deepseek", "glm4")) else {})


def write_rope(scaling: YarnConfig | Llama3RopeConfig | None) -> dict | None:
    s = scaling
    if s is None:
        return None
    common = {"factor": s.factor, "original_max_position_embeddings": s.original}
    if isinstance(s, Llama3RopeConfig):
        return common | {
            "rope_type": "llama3",
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
        }
    return common | {
        "type": "yarn",
        "rope_type": "yarn",
        "beta_fast": s.beta_fast,
        "beta_slow": s.beta_slow,
        "mscale": s.mscale,
        "mscale_all_dim": s.mscale_all_dim,
    }


def write_attention(c: ModelConfig, kind: str) -> dict:
    a = c.attention
    if isinstance(a, GQAConfig):
        grouped = {"num_key_value_heads": a.n_kv_heads, "head_dim": a.head_dim}
        glm = {"attention_bias": a.bias, "use_qk_norm": False, "partial_rotary_factor": 1.0}
        return grouped | {"qwen2": {"use_sliding_window": False}, "llama": {"attention_bias": False}}.get(kind, glm)
    return {
        "num_key_value_heads": a.n_heads,
        "attention_bias": False,
        "q_lora_rank": a.q_lora_rank,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
    }


def write_moe(c: ModelConfig, kind: str) -> dict:
    if c.moe is None:
        return {"first_k_dense_replace": c.n_layers + c.n_mtp}
    m = c.moe
    softmax_method = "greedy" if m.n_group == 1 else "group_limited_greedy"
    return {
        "first_k_dense_replace": m.n_dense_layers,
        "moe_layer_freq": 1,
        "n_routed_experts": m.n_routed_experts,
        "n_shared_experts": m.n_shared_experts,
        "num_experts_per_tok": m.n_activated,
        "moe_intermediate_size": m.moe_dim,
        "n_group": m.n_group,
        "topk_group": m.topk_group,
        "topk_method": softmax_method if kind == "deepseek_v2" else "noaux_tc",
        "scoring_func": m.scoring,
        "norm_topk_prob": m.norm_topk_prob,
        "routed_scaling_factor": m.routed_scaling_factor,
    }
