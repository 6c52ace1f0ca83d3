"""transformers' own models with random weights, as an oracle. Says so where transformers is missing.

Weights are drawn so that every part matters: activations of size one, norms around one, biases and router biases that
change what is chosen. Freshly initialised weights would hide mistakes: their logits are nearly constant.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.model.config import ModelConfig
from shoal.model.hf_config import to_hf_config

try:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as e:
    raise SystemExit("transformers is missing: pip install 'shoal-lm[interop]'") from e

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def random_peer(config: ModelConfig, seed: int) -> Any:
    """transformers' model of this configuration in fp32."""
    raw = to_hf_config(config, "float32")
    theirs = AutoConfig.for_model(raw.pop("model_type"), **raw)
    model = AutoModelForCausalLM.from_config(theirs, dtype=torch.float32, attn_implementation="eager").eval()
    randomise(model, torch.Generator().manual_seed(seed), config.tie_embeddings)
    return model


@torch.no_grad()
def randomise(model: torch.nn.Module, generator: torch.Generator, tied: bool) -> None:
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("norm.weight"):
            p.copy_(0.5 + torch.rand(p.shape, generator=generator))
        elif name.endswith(("bias", "e_score_correction_bias")):
            p.normal_(0, 0.2, generator=generator)
        elif "embed" in name:  # a tied one is the head too
            p.normal_(0, 2 * p.shape[-1] ** -0.5 if tied else 1, generator=generator)
        elif p.dim() > 1:
            p.normal_(0, p.shape[-1] ** -0.5, generator=generator)


def open_folder(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def log_probs(peer, tokens_T: Tensor) -> Tensor:
    """Natural logarithms of every next token's probability, [T, V]."""
    return peer(tokens_T[None]).logits[0].log_softmax(-1)
