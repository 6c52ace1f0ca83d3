"""Our engine as `shoal serve` opens it, one stream, no speculation. Variants: what is measured, and the model."""

import time

from bench import models
from bench.shape import THREADS
from shoal import runtime
from shoal.engine.engine import LocalEngine
from shoal.engine.request import Request, Sampling, Step
from shoal.precision import weights

CACHE_BYTES = 2**28


def missing() -> None:
    return None


def build(variant: str) -> "OneStream":
    return OneStream(*variant.split())


class OneStream:
    """To "decode" takes the seconds from the first token to the last, to "prefill" those to the first one."""

    def __init__(self, what: str, name: str):
        runtime.setup(THREADS)
        self.what, self.engine = what, LocalEngine(weights.load(models.folder(name)), CACHE_BYTES)

    def step(self, number: int) -> dict[str, float]:
        if self.what == "prefill":
            asked, (first,) = self.tokens(number, models.PREFILL, 1)
            return {"seconds": first - asked}
        _, (first, *_, last) = self.tokens(number, models.PROMPT, 1 + models.DECODE)
        return {"seconds": last - first}

    def tokens(self, number: int, n_prompt: int, n: int) -> tuple[float, list[float]]:
        """When the request was made, and when each of its `n` tokens came."""
        times: list[float] = []

        def note(step: Step) -> None:
            times.extend(time.perf_counter() for _ in step.tokens)

        prompt = tuple(models.prompt(number, n_prompt))
        asked = time.perf_counter()
        (result,) = self.engine.generate([Request(prompt, n, note, Sampling(temperature=0))])
        assert len(times) == n, result
        return asked, times
