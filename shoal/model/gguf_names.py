"""The names of tensors in llama.cpp's files, for those of Hugging Face folders (hf_names). Torch-free."""

import re

OUTER = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
    "embed_tokens": "nextn.embed_tokens",
}
EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.\d+\.(gate|up|down)_proj\.weight")
OF_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
FREQUENCIES = "rope_freqs.weight"  # Llama-3.1's stretching, as factors


def stored_name(name: str) -> str:
    """Of the tensor that holds a piece, or that matrix of all experts."""
    if expert := EXPERT.fullmatch(name):
        return f"blk.{expert[1]}.ffn_{expert[2]}_exps.weight"
    layer = OF_LAYER.fullmatch(name)
    if layer and layer[2] == "mlp.gate.e_score_correction_bias":
        return f"blk.{layer[1]}.exp_probs_b.bias"
    module, _, leaf = (layer[2] if layer else name).rpartition(".")
    return f"blk.{layer[1]}.{LAYER[module]}.{leaf}" if layer else f"{OUTER[module]}.{leaf}"


def split_name(name: str, half: str) -> str:
    """Of the keys' or values' half (k, v) of the latent's up-projection."""
    return name.replace("attn_kv_b", f"attn_{half}_b")


def merged_name(name: str) -> str:
    """Of gate and up of all experts in one, for either."""
    return re.sub(r"ffn_(gate|up)_exps", "ffn_gate_up_exps", name)
