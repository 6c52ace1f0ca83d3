"""How a training job talks to whoever started it: a live line on a terminal, an aligned one now and then elsewhere."""

import sys
import time
from collections.abc import Mapping

from shoal.recipes._teller import Teller

PLAIN_SECONDS = 10.0  # between two lines where nobody watches live
BAR = 24


def teller() -> Teller:
    display = Display(live=sys.stdout.isatty())
    return Teller(display.say, display.show)


def silent() -> Teller:
    return Teller(lambda words: None, lambda metrics: None)


class Display:
    def __init__(self, live: bool):
        self.live, self.last, self.step = live, 0.0, 0
        self.score: float | None = None
        self.status = None
        if live:
            from rich.console import Console

            self.console = Console(highlight=False)

    def say(self, words: str) -> None:
        if not self.live:
            print(words, flush=True)
            return
        self.stop()
        head, _, rest = words.partition(" ")
        self.console.print(f"[bold cyan]{head}[/] {rest}" if rest.startswith(" ") else words, soft_wrap=True)

    def show(self, m: Mapping) -> None:
        if m["step"] < self.step:
            self.score = None  # another stage began
        self.step = m["step"]
        if "eval/bits_per_byte" in m:
            self.score = m["eval/bits_per_byte"]
        last, now = m["step"] == m["total_steps"], time.monotonic()
        if self.live:
            self.draw(m)
        elif last or now - self.last > PLAIN_SECONDS or "eval/bits_per_byte" in m:
            self.last = now
            print(line(m, self.score), flush=True)

    def draw(self, m: Mapping) -> None:
        if self.status is None:
            from rich.live import Live

            self.status = Live(console=self.console, refresh_per_second=4, transient=False)
            self.status.start()
        share = m["step"] / max(m["total_steps"], 1)
        full = int(share * BAR)
        bar = f"[cyan]{'━' * full}[/][dim]{'━' * (BAR - full)}[/]"
        self.status.update(f"{bar} {share:4.0%}  {line(m, self.score)}")
        if m["step"] == m["total_steps"]:
            self.stop()

    def stop(self) -> None:
        if self.status is not None:
            self.status.stop()
            self.status = None


def line(m: Mapping, score: float | None) -> str:
    """step 120/1480  loss 3.214  held-out 1.402 bits/byte  9,120 tokens/s  mfu 61%  load 1.4  4:12 left

    Of reinforcement: step 12/150  right 47%  82 tokens  teaching 71%  210 answers/s  4:12 left
    """
    parts = [
        f"step {m['step']:>5}/{m['total_steps']:<5}",
        *(reinforced(m) if "rl/accuracy" in m else trained(m, score)),
    ]
    if "moe/load_max_over_mean" in m:
        parts.append(f"load {m['moe/load_max_over_mean']:.2f}")
    left = int(m["time/eta"])
    return "  ".join([*parts, f"{left // 60}:{left % 60:02d} left"])


def trained(m: Mapping, score: float | None) -> list[str]:
    parts = [f"loss {m['train/loss']:6.3f}"]
    if score is not None:
        parts.append(f"held-out {score:.3f} bits/byte")
    parts.append(f"{m['speed/tokens_per_second']:>6,.0f} tokens/s")
    return [*parts, f"mfu {m['speed/mfu']:3.0%}"] if "speed/mfu" in m else parts


def reinforced(m: Mapping) -> list[str]:
    return [
        f"right {m['rl/accuracy']:4.0%}",
        f"{m['rl/length']:5.1f} tokens each",
        f"teaching {m['rl/teaching']:4.0%}",
        f"{m['speed/samples_per_second']:>5,.0f} answers/s",
    ]
