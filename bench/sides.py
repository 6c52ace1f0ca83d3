"""Side by side: each side of a comparison is a process of its own that sleeps on a pipe until it is asked for a step.

Machines drift: other work, heat, clocks. So sides never run one after the other but in rounds, one step each, the order
turned by one every round, and what counts is the ratio *within* a round. While one side works, the others wait in a
blocking read and hold no core. `worker.py` is the other end of the pipe.

A peer that can't live in Shoal's environment (litgpt pins an older huggingface_hub) runs in another: set PEER_PYTHON to
that environment's interpreter. Peers are never installed by a bench.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

from bench.shape import THREADS
from shoal.runtime import idle_cores

LOGS = Path("build/bench")
T = TypeVar("T")

T = TypeVar("T")


class SideFailed(Exception):
    """A side's process ended. Holds the end of what it said."""


class Side:
    """One adapter of `bench/peers` in one of its variants, started and waiting, or `missing` (what to do about it)."""

    def __init__(self, adapter: str, variant: str = "", peer: bool = True):
        self.name = f"{adapter} {variant}".strip()
        LOGS.mkdir(parents=True, exist_ok=True)
        self.log = LOGS / f"{self.name.replace(' ', '-')}.log"
        python = os.environ.get("PEER_PYTHON", sys.executable) if peer else sys.executable
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-m", "bench.peers.worker", adapter, variant],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={"GOMP_SPINCOUNT": "2000"} | os.environ | {"OMP_NUM_THREADS": str(THREADS)},  # as `shoal` sets it
            )
        self.missing: str | None = self.answer().get("missing")

    def ask(self, *words) -> dict:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it has ended: `answer` says so
            print(*words, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> dict:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            raise SideFailed(f"{self.name} ended with {code}:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def start(*sides: tuple) -> list[Side]:
    """Those that are installed; says what is missing for the others, and whether the machine is free to be measured."""
    idle = idle_cores(1.0)
    if idle < THREADS:
        print(f"{idle} idle cores for {THREADS} threads: others work here, the seconds below are not this machine's")
    started = [Side(*side) for side in sides]
    for side in started:
        if side.missing:
            print(f"{side.name}: missing: {side.missing}")
            side.close()
    return [side for side in started if not side.missing]


def interleave(sides: Sequence[Side], rounds: int, warmup: int) -> dict[str, list[dict]]:
    """Answers to `step`, per side, of the rounds after `warmup` ones. Every side sees the same batch in a round."""
    answers: dict[str, list[dict]] = {side.name: [] for side in sides}
    for i in range(warmup + rounds):
        for side in turned(sides, i):
            answer = side.ask("step", i)
            print(f"  {'warm-up' if i < warmup else 'round'} {i}  {side.name:28} {answer['seconds']:.3f} s", flush=True)
            if i >= warmup:
                answers[side.name].append(answer)
    return answers


def turned(sides: Sequence[T], i: int) -> list[T]:
    first = i % len(sides)
    return [*sides[first:], *sides[:first]]


@dataclass(frozen=True)
class Ratio:
    """Of pairs measured in the same round: the median, and the smallest and largest."""

    median: float
    spread: tuple[float, float]

    @classmethod
    def of(cls, numerators: Sequence[float], denominators: Sequence[float]) -> "Ratio":
        ratios = [a / b for a, b in zip(numerators, denominators, strict=True)]
        return cls(median(ratios), (min(ratios), max(ratios)))
