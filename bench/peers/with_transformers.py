"""transformers' own model of the shape, bf16, SDPA. Variants are its experts implementations: grouped_mm, eager."""

from importlib.util import find_spec

import torch

from bench.peers.modules import ModuleTrainer
from bench.shape import SHAPE
from shoal.model.hf_config import to_hf_config


def missing() -> str | None:
    return None if find_spec("transformers") else "pip install transformers"


def build(experts: str) -> ModuleTrainer:
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = to_hf_config(SHAPE, "bfloat16")
    config = AutoConfig.for_model(raw.pop("model_type"), **raw)
    config.use_cache = False
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation=experts
    )

    def loss(rows: torch.Tensor) -> torch.Tensor:
        targets = rows[:, 1:].contiguous()  # already shifted: it would drop a column of the forward otherwise
        return model(input_ids=rows[:, :-1], labels=targets, shift_labels=targets).loss

    return ModuleTrainer(model, loss)
