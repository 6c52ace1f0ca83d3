"""The far end of a `bench.sides.Side`: python -m bench.peers.worker ADAPTER [VARIANT]

Commands come as lines on stdin, each is answered by one line of JSON on stdout:

    (at the start)   {"missing": null}, or how to get what is missing
    build            {"seconds"}: the model and its optimizer stand
    step N           {"seconds", …}: one whole step on batch N (forward, backward, update) and what the adapter reports
    memory           {"peak", "baseline", parts…} in bytes: VmHWM, resident size after imports, tensors by use

An adapter is a module with `missing() -> str | None` and `build(variant) -> Trainer`. Where a step is generating tokens
the adapter reports the seconds that count, and there are no parts.
"""

import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Protocol

from bench.shape import THREADS


class Trainer(Protocol):
    def step(self, number: int) -> dict[str, float]:
        """Train on batch `number`; returns at least the loss."""
        ...

    def parts(self) -> dict[str, int]:
        """Bytes of the tensors held between steps, by use."""
        ...


def main(name: str, variant: str = "") -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log

    def answer(**values) -> None:
        print(json.dumps(values), file=answers, flush=True)

    adapter = importlib.import_module(f"bench.peers.{name}")
    answer(missing=adapter.missing())
    trainer: Trainer | None = None
    baseline = 0
    for line in sys.stdin:
        command, *words = line.split()
        if trainer is None:
            baseline = resident()
            began = time.perf_counter()
            trainer = start(adapter, variant)
            if command == "build":
                answer(seconds=time.perf_counter() - began)
        if command == "step":
            began = time.perf_counter()
            report = trainer.step(int(words[0]))
            answer(**{"seconds": time.perf_counter() - began} | report)
        elif command == "memory":
            answer(peak=status("VmHWM"), baseline=baseline, **trainer.parts())


def start(adapter, variant: str) -> Trainer:
    import torch

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    return adapter.build(variant)


def resident() -> int:
    """Bytes in memory after imports; also forgets the peak so far (writing 5 to clear_refs, Linux)."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return status("VmRSS")


def status(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
