"""TRL's GRPOTrainer with transformers' own generation, stepping when it is asked to. Variants: tokens, dtype, experts.

Its fastest honest setting: one update a batch of answers (so no second forward for old log-probabilities), no
reference, no checkpointing of activations, nothing logged, prompts in the order of the data. "bf16" holds weights and
moments in bf16, without masters; "fp32" everything in fp32.
"""

import os
import time
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from tempfile import mkdtemp
from threading import Thread

from bench import grpo

FOLDER = Path("build/bench/tiny")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
STEPS = 1000


def missing() -> str | None:
    install = "pip install trl==1.16 transformers torch, in an environment of its own whose python PEER_PYTHON names"
    return None if find_spec("trl") else install


def build(variant: str) -> "TrlStep":
    tokens, dtype, experts = variant.split()
    return TrlStep(int(tokens), dtype, experts)


class TrlStep:
    """The trainer's loop runs on a thread of its own, and waits before each step until it may go on."""

    def __init__(self, tokens: int, dtype: str, experts: str):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from datasets import Dataset
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        asked, done = self.asked, self.done = SimpleQueue(), SimpleQueue()
        self.answers: list[str] = []

        class Turns(TrainerCallback):
            def on_step_begin(self, args, state, control, **_):
                asked.get()

            def on_step_end(self, args, state, control, **_):
                done.put(None)

        def reward(prompts, completions, **_):
            self.answers = completions
            return [grpo.reward(text) for text in completions]

        config = GRPOConfig(
            mkdtemp(), per_device_train_batch_size=grpo.ANSWERS, num_generations=grpo.GROUP, max_steps=STEPS,
            max_completion_length=tokens, generation_kwargs={"eos_token_id": None}, shuffle_dataset=False, beta=0.0,
            loss_type="grpo", learning_rate=grpo.LEARNING_RATE, adam_beta1=grpo.BETAS[0], adam_beta2=grpo.BETAS[1],
            optim="adamw_torch_fused", lr_scheduler_type="constant", gradient_checkpointing=False, use_cpu=True,
            bf16=False, logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=DTYPES[dtype], experts_implementation=experts)
        rows = [f"<｜User｜>{grpo.prompt(i)}<｜Assistant｜><think>" for i in range(grpo.PROMPTS * STEPS)]
        self.trainer = GRPOTrainer(
            model, reward, config, Dataset.from_dict({"prompt": rows}),
            processing_class=AutoTokenizer.from_pretrained(FOLDER), callbacks=[Turns()],
        )  # fmt: skip
        self.thread = Thread(target=self._train, daemon=True)
        self.thread.start()

    def _train(self) -> None:
        try:
            self.trainer.train()
        except BaseException as error:
            self.done.put(error)
            raise

    def step(self, number: int) -> dict[str, float]:
        began = time.perf_counter()
        self.asked.put(None)
        if error := self.done.get():
            raise error
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "reward": sum(map(grpo.reward, self.answers)) / len(self.answers)}
