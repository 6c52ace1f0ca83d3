"""Models as GGUF files, written by the `gguf` package as llama.cpp's converter lays them out: what the reader is held
against. Names and settings are spelled out here again on purpose."""

from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from bench.peers.gguf_file import LAYER, OUTER
from shoal.model.config import GQAConfig, Llama3RopeConfig, MLAConfig, ModelConfig, YarnConfig
from shoal.model.transformer import Transformer

Type = gguf.GGMLQuantizationType
NAMES = LAYER | {"attn.k": "attn_k", "attn.v": "attn_v"}
MTP = {
    "embed_norm": "nextn.enorm",
    "hidden_norm": "nextn.hnorm",
    "proj": "nextn.eh_proj",
    "norm": "nextn.shared_head_norm",
}


def architecture(config: ModelConfig) -> str:
    a = config.attention
    return "deepseek2" if isinstance(a, MLAConfig) else "qwen2" if a.bias else "llama"


def write(
    model: Transformer,
    path: Path,
    kind: Callable[[str], Type] = lambda name: Type.F32,
    settings: dict | None = None,
    whole_kv_b: bool = False,
    merged: bool = False,
    tokenizer: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    **how,
) -> dict[str, Tensor]:
    """Matrices as `kind` of their name says. Returns, by our names, the numbers that were written."""
    writer = gguf.GGUFWriter(path, architecture(model.config), **how)
    for key, value in (described(model.config) | (settings or {})).items():
        add(writer, f"{architecture(model.config)}.{key}", value)
    tokenizer(writer)
    stands_for = {}
    for ours, name, x, back in tensors(model, whole_kv_b, merged):
        as_kind = kind(name) if x.dim() > 1 and "ffn_gate_inp" not in name else Type.F32
        data = gguf.quants.quantize(x.float().contiguous().numpy(), as_kind)
        writer.add_tensor(name, data, raw_dtype=as_kind)
        stands_for.setdefault(ours, []).append(
            back(torch.from_numpy(gguf.quants.dequantize(data, as_kind)).view(x.shape))
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    a = model.config.attention
    for ours, found in stands_for.items():
        if ours.endswith("kv_up.weight") and len(found) == 2:
            assert isinstance(a, MLAConfig)
            stands_for[ours] = [torch.cat(found, 1).flatten(0, 1)]
        elif len(found) == 2:
            stands_for[ours] = [torch.cat(found, 1)]
    return {ours: found[0] for ours, found in stands_for.items()}


def add(writer: gguf.GGUFWriter, key: str, value) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(key, value)


def described(c: ModelConfig) -> dict:
    a, yarn = c.attention, c.rope_scaling
    found = {
        "vocab_size": c.vocab_size,
        "context_length": c.max_positions,
        "embedding_length": c.dim,
        "block_count": c.n_layers + c.n_mtp,
        "feed_forward_length": c.hidden_dim,
        "attention.head_count": a.n_heads,
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "rope.freq_base": c.rope_theta,
        "rope.dimension_count": c.rope_dim,
    }
    if isinstance(a, GQAConfig):
        return found | {
            "attention.head_count_kv": a.n_kv_heads,
            "attention.key_length": a.head_dim,
            "attention.value_length": a.head_dim,
        }
    found |= {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": a.kv_lora_rank,
        "attention.key_length": a.kv_lora_rank + a.qk_rope_head_dim,
        "attention.value_length": a.kv_lora_rank,
        "attention.key_length_mla": a.qk_nope_head_dim + a.qk_rope_head_dim,
        "attention.value_length_mla": a.v_head_dim,
    }
    found |= {"attention.q_lora_rank": a.q_lora_rank} if a.q_lora_rank else {}
    found |= {"nextn_predict_layers": c.n_mtp} if c.n_mtp else {}
    if isinstance(yarn, YarnConfig):
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": yarn.factor,
            "rope.scaling.original_context_length": yarn.original,
            "rope.scaling.yarn_log_multiplier": 0.1 * yarn.mscale_all_dim,
            "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
        }
    return found | (experts_described(c) if c.moe else {})


def experts_described(c: ModelConfig) -> dict:
    m = c.moe
    assert m
    return {
        "leading_dense_block_count": m.n_dense_layers,
        "expert_count": m.n_routed_experts,
        "expert_used_count": m.n_activated,
        "expert_shared_count": m.n_shared_experts,
        "expert_feed_forward_length": m.moe_dim,
        "expert_group_count": m.n_group,
        "expert_group_used_count": m.topk_group,
        "expert_gating_func": 2 if m.scoring == "sigmoid" else 1,
        "expert_weights_scale": m.routed_scaling_factor,
        **({"expert_weights_norm": True} if m.norm_topk_prob else {}),
    }


def tensors(model: Transformer, whole_kv_b: bool, merged: bool) -> Iterator[tuple[str, str, Tensor, Callable]]:
    """(our name, their name, their numbers, the way back) of all that a file holds."""
    c = model.config
    for ours, x in model.state_dict().items():
        where, _, rest = ours.partition(".")
        if where in OUTER:
            if not (where == "head" and c.tie_embeddings):
                yield ours, f"{OUTER[where]}.{rest}", x, same
            continue
        number, _, rest = rest.partition(".")
        block = f"blk.{int(number) + (c.n_layers if where == 'mtp' else 0)}"
        rest = rest.removeprefix("block.")
        module, _, leaf = rest.rpartition(".")
        if rest == "ffn.router.bias":
            if c.moe and c.moe.scoring == "sigmoid":
                yield ours, f"{block}.exp_probs_b.bias", x, same
        elif module == "attn.kv_up" and not whole_kv_b:
            a = c.attention
            assert isinstance(a, MLAConfig)
            up_HXC = x.unflatten(0, (a.n_heads, -1))
            yield ours, f"{block}.attn_k_b.weight", up_HXC[:, : a.qk_nope_head_dim].mT, lambda x: x.mT
            yield ours, f"{block}.attn_v_b.weight", up_HXC[:, a.qk_nope_head_dim :], same
        elif module == "attn.kv_up":
            yield ours, f"{block}.attn_kv_b.weight", x, same
        elif rest == "ffn.experts.gate_up" and not merged:
            gate, up = x.chunk(2, 1)
            yield ours, f"{block}.ffn_gate_exps.weight", gate, same
            yield ours, f"{block}.ffn_up_exps.weight", up, same
        elif module == "ffn.experts":
            yield ours, f"{block}.{NAMES[rest]}.weight", x, same
        elif module in ("attn.q", "attn.k") and architecture(c) == "llama":
            a = c.attention
            assert isinstance(a, GQAConfig)
            there = x.view(-1, 2, a.head_dim // 2, x.shape[1]).transpose(1, 2).reshape(x.shape)
            yield ours, f"{block}.{NAMES[module]}.weight", there, lambda x, d=a.head_dim: halves(x, d)
        else:
            yield ours, f"{block}.{(NAMES | MTP)[module]}.{leaf}", x, same
    if isinstance(c.rope_scaling, Llama3RopeConfig):
        yield "rope_freqs", "rope_freqs.weight", llama3_factors(c, c.rope_scaling), same


def same(x: Tensor) -> Tensor:
    return x


def halves(x: Tensor, head_dim: int) -> Tensor:
    return x.view(-1, head_dim // 2, 2, x.shape[1]).transpose(1, 2).reshape(x.shape)


def llama3_factors(c: ModelConfig, s: Llama3RopeConfig) -> Tensor:
    """By wavelengths, as the converter reckons them."""
    found = []
    for i in range(0, c.rope_dim, 2):
        wavelength = 2 * np.pi * c.rope_theta ** (i / c.rope_dim)
        if wavelength < s.original / s.high_freq_factor:
            found.append(1.0)
        elif wavelength > s.original / s.low_freq_factor:
            found.append(s.factor)
        else:
            smooth = (s.original / wavelength - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
            found.append(1 / ((1 - smooth) / s.factor + smooth))
    return torch.tensor(found)
