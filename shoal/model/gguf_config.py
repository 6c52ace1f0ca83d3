"""What a GGUF file's settings say of its model: llama.cpp's keys for config.json's, which hf_config reads and writes.

| architecture | model_type |
|---|---|
| deepseek2, gating by sigmoid / by softmax, or not said | deepseek_v3 / deepseek_v2 |
| llama | llama |
| qwen2 | qwen2 |

llama.cpp's converters leave things out. What is read into the gaps is what they were converted from:
- `yarn_log_multiplier` of deepseek2 is a tenth of mscale_all_dim; mscale is taken for the same, as V2 and V3 have it.
- Llama-3.1's stretching is a tensor of factors, `rope_freqs.weight`; 8192, 1 and 4 are tried for it (gguf.py).
- Old files have no groups of experts: one group is read, as llama.cpp does, and V2 and V3 then choose a bit otherwise.
Torch-free.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import ModelError
from shoal.model.config import MLAConfig, ModelConfig, YarnConfig
from shoal.model.hf_config import read_config, to_hf_config

if TYPE_CHECKING:
    from shoal.model.gguf_file import Value

ARCHITECTURES = ("deepseek2", "llama", "qwen2")
COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
GROUPED = {"attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim"}
LATENT = {
    "attention.q_lora_rank": "q_lora_rank",
    "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
}
EXPERTS = {
    "expert_count": "n_routed_experts",
    "expert_shared_count": "n_shared_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_weights_norm": "norm_topk_prob",
    "expert_weights_scale": "routed_scaling_factor",
}
YARN = {
    "rope.scaling.factor": "factor",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
}
GATING = {None: "softmax", 1: "softmax", 2: "sigmoid"}
NEUTRAL = {  # what the model doesn't do, and the value that says so
    "attention.causal": True,
    "attention.sliding_window": 0,
    "attention.scale": 0,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attention.temperature_scale": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "logit_scale": 0,
    "residual_scale": 0,
    "embedding_scale": 0,
    "rope.scale_linear": 1,
    "rope.scaling.attn_factor": 1,
    "rope.scaling.yarn_attn_factor": 1,
    "rope.scaling.yarn_ext_factor": 1,
}
REAL = ("attention.layer_norm_rms_epsilon", "rope.freq_base", "expert_weights_scale")
NO_EXPERTS = {"expert_shared_count": 0, "expert_feed_forward_length": 1}  # which llama.cpp asks for all the same
FIX = "open the file with llama.cpp, or take the model's Hugging Face folder"


class Settings:
    """Those of the file's architecture, without its prefix."""

    def __init__(self, metadata: "Mapping[str, Value]", where: str):
        self.metadata, self.where = metadata, where
        kind = metadata.get("general.architecture")
        if kind not in ARCHITECTURES:
            raise ModelError(f"{where} is of architecture {str(kind)[:80]}", " or ".join(ARCHITECTURES), FIX)
        self.architecture = str(kind)

    def get(self, key: str, default=None):
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def whole(self, key: str) -> int:
        value = self.get(key)
        if type(value) is not int:
            raise self.bad(key, "a whole number")
        return value

    def bad(self, key: str, expected: str) -> ModelError:
        value = str(self.get(key, "not there"))[:80]
        return ModelError(f"{self.where}: {self.architecture}.{key} is {value}", expected, FIX)

    def translated(self, keys: Mapping[str, str]) -> dict:
        return {theirs: self.get(ours) for ours, theirs in keys.items() if self.get(ours) is not None}


def is_gguf(path: Path | str) -> bool:
    """Whether it names a file of llama.cpp's."""
    return Path(path).suffix == ".gguf"


def model_config(metadata: "Mapping[str, Value]", where: str, vocab_size: int, tied: bool, n_mtp: int) -> ModelConfig:
    """`vocab_size` rows of the embedding, whether there is no head, and how many multi-token modules are there."""
    raw = as_hf(Settings(metadata, where), vocab_size, tied, n_mtp)
    try:
        return read_config(raw)
    except ModelError as e:
        raise ModelError(f"{where}, translated: {e.got}", e.expected, FIX) from None


def as_hf(s: Settings, vocab_size: int, tied: bool, n_mtp: int) -> dict:
    for key, neutral in NEUTRAL.items():
        if s.get(key, neutral) != neutral:
            raise s.bad(key, f"{neutral}, or nothing")
    grouped = s.architecture != "deepseek2"
    n_nextn = 0 if s.get("nextn_predict_layers") is None else s.whole("nextn_predict_layers")
    return {
        "model_type": s.architecture,
        "vocab_size": s.get("vocab_size", vocab_size),
        "num_hidden_layers": s.whole("block_count") - n_nextn,
        "num_nextn_predict_layers": n_mtp,
        "tie_word_embeddings": tied,
        **s.translated(COMMON),
        "rope_scaling": rope_scaling(s),
        **(as_grouped(s) if grouped else as_latent(s) | as_experts(s)),
    }


def as_grouped(s: Settings) -> dict:
    found = s.translated(GROUPED)
    head_dim = found.get("head_dim") or s.whole("embedding_length") // max(s.whole("attention.head_count"), 1)
    for key in ("attention.value_length", "rope.dimension_count"):
        if s.get(key, head_dim) != head_dim:
            raise s.bad(key, f"{head_dim}, as wide as a key")
    if s.get("expert_count"):
        raise s.bad("expert_count", "none: experts are read of deepseek2 alone")
    return found


def as_latent(s: Settings) -> dict:
    """Widths of a head's key and value: the `_mla` keys since heads are absorbed, plain ones before."""
    mla = "_mla" if s.get("attention.key_length_mla") is not None else ""
    key, value = s.whole(f"attention.key_length{mla}"), s.whole(f"attention.value_length{mla}")
    found = s.translated(LATENT)
    if found.get("q_lora_rank") == 0:
        del found["q_lora_rank"]
    return found | {"qk_nope_head_dim": key - s.whole("rope.dimension_count"), "v_head_dim": value}


def as_experts(s: Settings) -> dict:
    gating = s.get("expert_gating_func")
    if gating not in GATING:
        raise s.bad("expert_gating_func", "1, softmax, or 2, sigmoid")
    found, sigmoid = s.translated(EXPERTS), GATING[gating] == "sigmoid"
    softmax_method = "greedy" if found.get("n_group", 1) == 1 else "group_limited_greedy"
    return {
        "model_type": "deepseek_v3" if sigmoid else "deepseek_v2",
        "scoring_func": GATING[gating],
        "topk_method": "noaux_tc" if sigmoid else softmax_method,
        "first_k_dense_replace": s.get("leading_dense_block_count", 0) if found.get("n_routed_experts") else 2**16,
        "norm_topk_prob": False,
        **found,
    }


def rope_scaling(s: Settings) -> dict | None:
    """None where nothing is stretched; Llama's factors are a tensor's."""
    kind = s.get("rope.scaling.type", "none")
    if kind == "none" or (kind == "linear" and s.get("rope.scaling.factor", 1) == 1):
        return None
    if kind != "yarn" or s.architecture != "deepseek2":
        raise s.bad("rope.scaling.type", "yarn in a deepseek2 model, or none")
    tenth = s.get("rope.scaling.yarn_log_multiplier", 0.0)
    if type(tenth) is not float:
        raise s.bad("rope.scaling.yarn_log_multiplier", "a number")
    all_dim = float(f"{10 * tenth:.6g}")
    return {"type": "yarn", "mscale": all_dim or 1.0, "mscale_all_dim": all_dim, **s.translated(YARN)}


def settings_of(config: ModelConfig, where: str) -> dict[str, bool | int | float | str]:
    """A model's settings, its multi-token modules left out, as llama.cpp's converter does. Raises ModelError."""
    config = replace(config, n_mtp=0)
    raw = to_hf_config(config, "bfloat16", None, None)
    kind = raw["model_type"]
    architecture = "deepseek2" if kind.startswith("deepseek") else kind
    if architecture not in ARCHITECTURES:
        raise ModelError(
            f"{where} is a {kind} model", "a model of DeepSeek's, Llama or Qwen2", "export a folder instead"
        )
    known = COMMON | (LATENT | EXPERTS if architecture == "deepseek2" else GROUPED)
    found = {ours: raw[theirs] for ours, theirs in known.items() if raw.get(theirs) is not None}
    found |= {key: float(found[key]) for key in REAL if key in found}
    found |= {"vocab_size": config.vocab_size, "block_count": config.n_layers, "rope.dimension_count": config.rope_dim}
    found |= latent_settings(config) if isinstance(config.attention, MLAConfig) else {}
    found |= stretching(config, where) if isinstance(config.rope_scaling, YarnConfig) else {}
    return {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in found.items()}


def latent_settings(c: ModelConfig) -> dict:
    """One key-value head as wide as the latent, to which the heads are absorbed; what their own widths are."""
    a = c.attention
    assert isinstance(a, MLAConfig)
    return {
        "attention.head_count_kv": 1,
        "attention.key_length": a.kv_lora_rank + a.qk_rope_head_dim,
        "attention.value_length": a.kv_lora_rank,
        "attention.key_length_mla": a.qk_nope_head_dim + a.qk_rope_head_dim,
        "attention.value_length_mla": a.v_head_dim,
        "leading_dense_block_count": c.moe.n_dense_layers if c.moe else c.n_layers,
        **({"expert_gating_func": 2 if c.moe.scoring == "sigmoid" else 1} if c.moe else NO_EXPERTS),
    }


def stretching(c: ModelConfig, where: str) -> dict:
    yarn = c.rope_scaling
    assert isinstance(yarn, YarnConfig)
    if yarn.mscale != yarn.mscale_all_dim or not isinstance(c.attention, MLAConfig):
        got = f"{where} has mscale {yarn.mscale:g} and mscale_all_dim {yarn.mscale_all_dim:g}"
        raise ModelError(got, "the same in both: llama.cpp knows one of them", "export a folder instead")
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn.factor),
        "rope.scaling.original_context_length": yarn.original,
        "rope.scaling.yarn_log_multiplier": 0.1 * yarn.mscale_all_dim,
        "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
        "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
    }
