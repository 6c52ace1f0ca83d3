"""A run directory as training leaves it, made up: curves of the usual shape, samples, a plan and how it came out."""

import json
import random
from math import exp
from pathlib import Path

from shoal import config as configs
from shoal.model.presets import PRESETS

SAMPLE = '''self, path, mode="r"):
        """Open the member called `path` and return a file object."""
        if self.closed:
            raise ValueError("I/O operation on closed archive")
        info = self.getinfo(path)
        with self._lock:
            self._file.seek(info.offset)
            return self._reader(info, mode)

    def close(self):
        if self._file is not None:
            self._file.close()
            self._file = None
'''
TRACE = """Question: 17 + 48 * 2
<think>
48 * 2 = 96
17 + 96 = 113
</think>
<answer>113</answer>"""


def write_run(folder: Path, steps: int = 1400, seed: int = 0) -> Path:
    for name in ("samples", "evals"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    model = configs.to_toml(PRESETS["mini"]).replace("[", "[model.")
    (folder / "config.toml").write_text("seed = 0\n\n[optim]\nlr = 0.02\n\n[model]\n" + model)
    put(folder / "config.origin.json", {"optim.lr": "flag", "model.dim": "recipe quickstart", "seed": "default"})
    (folder / "command.txt").write_text("shoal quickstart --minutes 10 --optim.lr 0.02\n")
    versions = {"shoal-lm": "0.1.0", "torch": "2.13.0", "numpy": "2.3.5"}
    machine = {"cpu": "a CPU with two threads", "cores": 2, "memory_gib": 7.8}
    put(folder / "env.json", {"python": "3.11.7", "commit": "1a2b3c4d5e6f", "versions": versions} | machine)
    put(folder / "status.json", {"state": "finished", "step": steps, "recipe": "quickstart"})
    lines = "".join(json.dumps(line) + "\n" for line in metrics(steps, random.Random(seed)))
    (folder / "metrics.jsonl").write_text(lines)
    write_outcome(folder, steps)
    return folder


def write_reinforced(folder: Path, steps: int = 200, seed: int = 0) -> Path:
    """A run of `shoal rl`: it learns to show its work, and with that to be right."""
    for name in ("samples", "evals"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "config.toml").write_text('tasks = "chain_sum,addition"\nminutes = 10.0\n')
    (folder / "command.txt").write_text("shoal rl r1_zero --model runs/latest --minutes 10\n")
    put(folder / "status.json", {"state": "done", "step": steps})
    for name, better, step in (("before", -0.45, None), ("after", 0.05, steps)):
        put(folder / f"evals/{name}.json", solved(name, better) | {"step": step})
    chance = random.Random(seed)
    lines = [reinforced(step, steps, chance) for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = [rolled(step, index, s) for step in (1, steps) for index in (2 * step, 2 * step + 1) for s in range(4)]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
    (folder / "samples/rollouts.jsonl").write_text(text, "utf-8")
    return folder


def reinforced(step: int, steps: int, chance: random.Random) -> dict:
    x, noise = step / steps, chance.gauss(0, 0.03)
    right = 0.27 + 0.55 * (1 - exp(-4 * x)) + noise
    found = {
        "step": step, "time/seconds": 3.0 * step, "speed/samples_per_second": 171.0 + 100 * noise,
        "rl/accuracy": right, "rl/format": min(1.0, 0.93 + 0.07 * x + noise / 9), "rl/reward": right + 0.1,
        "rl/length": 18 + 13 * x + 20 * noise, "rl/entropy": 0.24 * exp(-2 * x) + abs(noise), "rl/unfinished": 0.0,
        "rl/teaching": 0.85 - 0.5 * x + noise, "gap/k3": 10 ** (-4.6 + 9 * noise),
        "moe/load_max_over_mean": 1.5 + noise,
    }  # fmt: skip
    rates = {"addition/1": 0.99, "addition/2": 0.9, "chain_sum/1": 0.8, "chain_sum/2": 0.45, "letter_count/2": 0.7}
    return found | {f"solved/{name}": 0.3 + (rate - 0.3) * (1 - exp(-5 * x)) for name, rate in rates.items()}


def rolled(step: int, index: int, sample: int) -> dict:
    worked = step > 1 or sample == 3
    thinking = "Step by step.\n17 + 48 = 65\n65 - 9 = 56\n" if worked else ""
    said = f"</think><answer>{56 if worked else 61}</answer>"
    return {
        "step": step, "index": index, "sample": sample, "task": "chain_sum", "level": 2, "expected": "56",
        "prompt": "What is 17 + 48 - 9?", "text": thinking + said, "outcome": "right" if worked else "wrong",
        "reward": 1.1 if worked else 0.1, "advantage": 0.25, "tokens": [], "logprobs": [], "ratios": [],
    }  # fmt: skip


def metrics(steps: int, chance: random.Random):
    seconds = 0.0
    for step in range(1, steps + 1):
        seconds += chance.gauss(0.405, 0.012) + (1.1 if step % 100 == 0 else 0.0)
        loss = 2.45 + 3.6 * exp(-step / 90) + 2.2 * exp(-step / 520) + chance.gauss(0, 0.07)
        line = {"step": step, "train/loss": loss, "train/mtp_loss": 1.22 * loss + 0.35 + chance.gauss(0, 0.05)}
        line |= {"eval/mtp_accept": 0.43 * (1 - exp(-step / 400)) + chance.gauss(0, 0.012)}
        line |= {
            "train/tokens": 4096 * step,
            "time/seconds": seconds,
            "train/grad_norm": 0.4 + abs(chance.gauss(0, 0.1)),
        }
        rate = 4096 / 0.405 * (0.97 + chance.gauss(0, 0.015)) * min(1.0, 0.6 + step / 40)
        line |= {"speed/tokens_per_second": rate, "speed/mfu": rate * 5.6e7 / 8.1e11}
        line |= {"moe/load_max_over_mean": 1.12 + 2.1 * exp(-step / 130) + abs(chance.gauss(0, 0.05))}
        if step % 70 == 0:
            line["eval/bits_per_byte"] = 0.82 + 1.9 * exp(-step / 110) + 0.55 * exp(-step / 480)
        yield line


def write_outcome(folder: Path, steps: int) -> None:
    sampling = {"step": steps, "temperature": 0.8, "top_p": 0.95, "seed": 1}
    put(
        folder / "samples/1.json", {"prompt": "class Archive:\n    def open(", "text": SAMPLE, "tokens": 118} | sampling
    )
    question, answer = TRACE.split("\n", 1)
    put(folder / "samples/2.json", {"prompt": question + "\n", "text": answer, "tokens": 33} | sampling)
    yardsticks = {"gzip -9": 1.71, "xz -9e": 1.354}
    held_out = {"name": "held-out text", "metric": "bits_per_byte", "value": 0.8617, "better": "lower"}
    put(folder / "evals/held_out.json", held_out | {"measured_on": "1.9 MB of python-stdlib", "yardsticks": yardsticks})
    put(folder / "evals/tasks.json", solved("countdown, chain_sum", 0.0))
    chance = random.Random(1)
    load = [[max(0.02, chance.gauss(1, 0.22)) for _ in range(8)] for _ in range(4)]
    put(folder / "evals/expert_load.json", {"layers": [1, 2, 3, 4], "load": load})
    ten_minutes = {"tokens": 5734400, "seconds": 582.0, "flops": 3.21e14, "tokens_per_second": 9850, "mfu": 0.68}
    planned = ten_minutes | {"energy_kwh_estimate": 0.0026, "usd": 0.0162, "steps": 1400, "peak_memory_bytes": 1.31e9}
    took = planned | {"seconds": 573.4, "tokens_per_second": 10000, "mfu": 0.69, "peak_memory_bytes": 1.22e9}
    why = ["a micro batch of 4,096 tokens took 0.40 s here, 10,240 tokens/s; the update takes 0.02 s more"]
    put(folder / "plan.json", planned | {"why": why, "machine": {"name": "two threads"}})
    again = 'shoal generate runs/latest --prompt "class Archive:"'
    put(folder / "receipt.json", took | {"bits_per_byte": 0.8617, "next_command": again})


def solved(name: str, better: float) -> dict:
    """An evaluation as `shoal eval` leaves it: two tasks, three levels, five budgets."""
    places = [(None, None), ("countdown", 1), ("countdown", 2), ("chain_sum", 1), ("chain_sum", 2), ("chain_sum", 3)]
    budgets = [
        {"budget": b, "rows": [solved_row(task, level, b, better) for task, level in places]}
        for b in (0, 16, 64, 256, 1024)
    ]
    value, rules = budgets[-1]["rows"][0]["accuracy"], {"samples": 16, "temperature": 0.6, "top_p": 0.95}
    whole = {"name": name, "metric": "accuracy", "value": value, "better": "higher", "rules": rules}
    return whole | {"measured_on": "200 held-out problems, 16 attempts each", "budgets": budgets}


def solved_row(task: str | None, level: int | None, budget: int, better: float) -> dict:
    p = (0.9 - 0.16 * (level or 2) + (0.1 if task == "countdown" else 0.0)) * (1 - exp(-(budget + 12) / 90)) + better
    p = max(0.0, p)
    ks = [1, 2, 4, 8, 16]
    votes = {"k": ks, "pass_at_k": [1 - (1 - p) ** k**0.7 for k in ks], "cons_at_k": [p + 0.02 * i for i in range(5)]}
    sure = {"items": 40 if task else 200, "attempts": 3200, "failed": 0, "unanswered": 3, "accuracy": p}
    interval = [max(0.0, p - 0.05), p + 0.05]
    return {"task": task, "level": level, "interval": interval, "thinking_tokens": 0.7 * budget} | sure | votes


def put(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value))
