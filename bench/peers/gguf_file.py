"""One of our models as a GGUF file, llama.cpp's format: architecture `deepseek2`, whose names `LAYER` translates.

Most tensors lie there as ours do, experts stacked and gate and up in one (apart, llama.cpp decodes 3% slower).
The up-projection of the latent is split by head into keys, transposed so that they can be absorbed into the query, and
values; attention then is of one key-value head as wide as the latent. Matrices are written in the model's dtype, norms
and routers in fp32, as llama.cpp's own converter does; or matrices in q8_0, or in q4_0 but for the head in q8_0.

The tokenizer's pieces and merges go along; llama.cpp knows only the patterns of published models to split text by, so
prompts have to be given as ids.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from shoal.data.tokenizer import Tokenizer, parse
from shoal.model.config import MLAConfig
from shoal.model.transformer import Transformer

OUTER = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
LAYER = {
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "attn.q": "attn_q",
    "attn.q_down": "attn_q_a",
    "attn.q_norm": "attn_q_a_norm",
    "attn.q_up": "attn_q_b",
    "attn.kv_down": "attn_kv_a_mqa",
    "attn.kv_norm": "attn_kv_a_norm",
    "attn.out": "attn_output",
    "ffn.gate": "ffn_gate",
    "ffn.up": "ffn_up",
    "ffn.down": "ffn_down",
    "ffn.router": "ffn_gate_inp",
    "ffn.experts.gate_up": "ffn_gate_up_exps",
    "ffn.experts.down": "ffn_down_exps",
    "ffn.shared.gate": "ffn_gate_shexp",
    "ffn.shared.up": "ffn_up_shexp",
    "ffn.shared.down": "ffn_down_shexp",
}


def write(model: Transformer, tokenizer: Tokenizer, path: Path, form: str | None = None) -> None:
    """Tensor by tensor, so that nothing stands in memory twice."""
    import gguf

    writer = gguf.GGUFWriter(path, "deepseek2")
    describe(writer, model)
    add_tokenizer(writer, tokenizer)
    found = list(tensors(model))
    kinds = [gguf.GGMLQuantizationType[kind(name, x, form)] for name, x in found]
    for (name, x), k in zip(found, kinds):
        numbers, n_bytes = gguf.GGML_QUANT_SIZES[k]
        writer.add_tensor_info(name, x.shape, as_numpy(x[:0]).dtype, x.numel() // numbers * n_bytes, k)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (_, x), k in zip(found, kinds):
        few = gguf.GGML_QUANT_SIZES[k][0] > 1
        writer.write_tensor_data(gguf.quantize(x.float().numpy(), k) if few else as_numpy(x.contiguous()))
    writer.close()


def kind(name: str, x: Tensor, form: str | None) -> str:
    if x.dtype == torch.float32 or not form:
        return {torch.bfloat16: "BF16", torch.float32: "F32"}[x.dtype]
    return "Q8_0" if name == "output.weight" else form.upper()


def describe(writer, model: Transformer) -> None:
    """What config.json holds, under llama.cpp's keys."""
    import gguf

    c, a, m = model.config, model.config.attention, model.config.moe
    assert isinstance(a, MLAConfig) and m and not c.rope_scaling and not c.n_mtp and not c.tie_embeddings
    sigmoid = m.scoring == "sigmoid"
    writer.add_vocab_size(c.vocab_size)
    writer.add_context_length(c.max_positions)
    writer.add_embedding_length(c.dim)
    writer.add_block_count(c.n_layers)
    writer.add_feed_forward_length(c.hidden_dim)
    writer.add_leading_dense_block_count(m.n_dense_layers)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_head_count(a.n_heads)
    writer.add_head_count_kv(1)
    if a.q_lora_rank:
        writer.add_q_lora_rank(a.q_lora_rank)
    writer.add_kv_lora_rank(a.kv_lora_rank)
    writer.add_key_length(a.kv_lora_rank + a.qk_rope_head_dim)
    writer.add_value_length(a.kv_lora_rank)
    writer.add_key_length_mla(a.qk_nope_head_dim + a.qk_rope_head_dim)
    writer.add_value_length_mla(a.v_head_dim)
    writer.add_rope_dimension_count(a.qk_rope_head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_expert_count(m.n_routed_experts)
    writer.add_expert_used_count(m.n_activated)
    writer.add_expert_shared_count(m.n_shared_experts)
    writer.add_expert_feed_forward_length(m.moe_dim)
    writer.add_expert_group_count(m.n_group)
    writer.add_expert_group_used_count(m.topk_group)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID if sigmoid else gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_weights_norm(m.norm_topk_prob)
    writer.add_expert_weights_scale(m.routed_scaling_factor)


def add_tokenizer(writer, tokenizer: Tokenizer) -> None:
    import gguf

    added = tokenizer.full.get_added_tokens_decoder()
    normal, control, user = gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED
    names = [tokenizer.name(i) for i in range(tokenizer.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(
        [normal if i not in added else control if added[i].special else user for i in range(len(names))]
    )
    merges = parse(tokenizer.text)["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_add_bos_token(False)


def tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(their name, our numbers) of all that the file holds, as views."""
    a = model.config.attention
    assert isinstance(a, MLAConfig)
    for ours, x in model.state_dict().items():
        where, _, rest = ours.partition(".")
        if where != "layers":
            yield f"{OUTER[where]}.{rest}", x
            continue
        layer, _, rest = rest.partition(".")
        block = f"blk.{layer}"
        module, _, leaf = rest.rpartition(".")
        if module == "attn.kv_up":
            up_HXC = x.unflatten(0, (a.n_heads, -1))
            yield f"{block}.attn_k_b.weight", up_HXC[:, : a.qk_nope_head_dim].transpose(1, 2)
            yield f"{block}.attn_v_b.weight", up_HXC[:, a.qk_nope_head_dim :]
        elif module == "ffn.experts":
            yield f"{block}.{LAYER[rest]}.weight", x
        elif rest == "ffn.router.bias":
            yield f"{block}.exp_probs_b.bias", x
        else:
            yield f"{block}.{LAYER[module]}.{leaf}", x


def as_numpy(x: Tensor):
    """numpy has no bf16: two bytes are two bytes."""
    return (x.view(torch.int16) if x.dtype == torch.bfloat16 else x).numpy()
