"""litgpt's GPT with latent attention and grouped experts, its own loss. Variants: eager, and compiled as its
`pretrain` command does. litgpt trains its router through the same sigmoid scores, groups and shared expert.
"""

from importlib.util import find_spec

import torch

from bench.peers.modules import ModuleTrainer
from bench.shape import CONTEXT, SHAPE
from shoal.model.config import MLAConfig


def missing() -> str | None:
    install = "pip install litgpt, in an environment of its own that PEER_PYTHON names (it pins huggingface_hub<1.4)"
    return None if find_spec("litgpt") else install


def build(mode: str) -> ModuleTrainer:
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    a, m = SHAPE.attention, SHAPE.moe
    assert isinstance(a, MLAConfig) and m
    config = Config(
        block_size=CONTEXT,
        vocab_size=SHAPE.vocab_size,
        padded_vocab_size=SHAPE.vocab_size,
        n_layer=SHAPE.n_layers,
        n_embd=SHAPE.dim,
        n_head=a.n_heads,
        latent_attention={
            "q_lora_rank": a.q_lora_rank,
            "kv_lora_rank": a.kv_lora_rank,
            "qk_rope_head_dim": a.qk_rope_head_dim,
            "qk_nope_head_dim": a.qk_nope_head_dim,
            "v_head_dim": a.v_head_dim,
        },
        rotary_percentage=1.0,
        rope_interleave=True,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=SHAPE.norm_eps,
        mlp_class_name="LLaMAMoE",
        intermediate_size=SHAPE.hidden_dim,
        moe_intermediate_size=m.moe_dim,
        n_expert=m.n_routed_experts,
        n_shared_expert=m.n_shared_experts,
        n_expert_per_token=m.n_activated,
        n_expert_groups=m.n_group,
        n_topk_groups=m.topk_group,
        n_topk_scores_per_group=2,
        first_k_dense_replace=m.n_dense_layers,
        routed_scaling_factor=m.routed_scaling_factor,
        norm_topk_prob=m.norm_topk_prob,
    )
    model = GPT(config)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, 0.0, SHAPE.init_std)
    model = model.to(torch.bfloat16)
    forward = torch.compile(model) if mode == "compiled" else model
    return ModuleTrainer(model, lambda rows: chunked_cross_entropy(forward(rows[:, :-1]), rows[:, 1:]))
