"""llama-bench, a process a step: it loads the model, warms up, and times two repetitions by itself.

Variants as in engine.py. The second repetition counts: in the first, pages of the file are seen for the first time.
Flash attention is its faster setting, and fp16 the faster cache (with bf16 it reads prompts at half the speed).
llama-bench draws no tokens and starts from an empty context: ours does a little more.
"""

import json
import subprocess

from bench import models
from bench.peers import llama
from bench.servers import environment
from bench.shape import THREADS


def missing() -> str | None:
    return llama.missing()


def build(variant: str) -> "LlamaBench":
    return LlamaBench(*variant.split())


class LlamaBench:
    def __init__(self, what: str, name: str):
        self.n = {"prefill": models.PREFILL, "decode": models.DECODE}[what]
        work = ["-p", "0", "-n", str(self.n)] if what == "decode" else ["-p", str(self.n), "-n", "0"]
        fixed = ["-r", "2", "-fa", "1", "-t", str(THREADS), "-o", "json"]
        self.command = [str(llama.program("llama-bench")), "-m", str(llama.file(name)), *work, *fixed]

    def step(self, number: int) -> dict[str, float]:
        done = subprocess.run(self.command, capture_output=True, text=True, env=environment())
        if done.returncode:
            raise RuntimeError(f"llama-bench ended with {done.returncode}:\n{done.stderr[-2000:]}")
        (found,) = json.loads(done.stdout)
        return {"seconds": self.n / found["samples_ts"][-1]}
