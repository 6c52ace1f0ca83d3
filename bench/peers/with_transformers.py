"""transformers' DeepseekV3ForCausalLM. Variants are its experts implementations: grouped_mm, eager."""

from importlib.util import find_spec

import torch

from bench.peers.modules import ModuleTrainer
from bench.shape import CONTEXT, SHAPE
from shoal.model.config import MLAConfig


def missing() -> str | None:
    return None if find_spec("transformers") else "pip install transformers"


def build(experts: str) -> ModuleTrainer:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    a, m = SHAPE.attention, SHAPE.moe
    assert isinstance(a, MLAConfig) and m
    config = DeepseekV3Config(
        vocab_size=SHAPE.vocab_size,
        hidden_size=SHAPE.dim,
        num_hidden_layers=SHAPE.n_layers,
        intermediate_size=SHAPE.hidden_dim,
        num_attention_heads=a.n_heads,
        num_key_value_heads=a.n_heads,
        q_lora_rank=a.q_lora_rank,
        kv_lora_rank=a.kv_lora_rank,
        qk_nope_head_dim=a.qk_nope_head_dim,
        qk_rope_head_dim=a.qk_rope_head_dim,
        v_head_dim=a.v_head_dim,
        n_routed_experts=m.n_routed_experts,
        n_shared_experts=m.n_shared_experts,
        num_experts_per_tok=m.n_activated,
        moe_intermediate_size=m.moe_dim,
        first_k_dense_replace=m.n_dense_layers,
        n_group=m.n_group,
        topk_group=m.topk_group,
        routed_scaling_factor=m.routed_scaling_factor,
        num_mtp_layers=0,
        max_position_embeddings=CONTEXT,
        initializer_range=SHAPE.init_std,
        use_cache=False,
    )
    model = DeepseekV3ForCausalLM._from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation=experts
    )

    def loss(rows: torch.Tensor) -> torch.Tensor:
        targets = rows[:, 1:].contiguous()  # already shifted: it would drop a column of the forward otherwise
        return model(input_ids=rows[:, :-1], labels=targets, shift_labels=targets).loss

    return ModuleTrainer(model, loss)
