"""transformers' own `generate`, greedy, bf16, SDPA, its cache. Variants: its experts implementation, and the model."""

import time
from importlib.util import find_spec
from typing import Any

import torch

from bench import models


def missing() -> str | None:
    return None if find_spec("transformers") else "pip install transformers"


def build(variant: str) -> "Generate":
    return Generate(*variant.split())


class Generate:
    def __init__(self, experts: str, name: str):
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            models.folder(name),
            dtype=torch.bfloat16,
            attn_implementation="sdpa",
            experts_implementation=experts,
        ).eval()

    @torch.inference_mode()
    def step(self, number: int) -> dict[str, float]:
        """Seconds from the first token to the last, as for our engine."""
        prompt, clock = torch.tensor([models.prompt(number, models.PROMPT)]), Clock()
        asked = {"do_sample": False, "temperature": None, "top_p": None, "max_new_tokens": 1 + models.DECODE}
        self.model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=clock, **asked)
        _, first, *_, last = clock.times
        assert len(clock.times) == 2 + models.DECODE, f"{len(clock.times) - 1} tokens"
        return {"seconds": last - first}


class Clock:
    """What `generate` calls a streamer: it is given the prompt, then each token."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, tokens) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass
