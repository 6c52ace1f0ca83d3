"""A chain's directory as the quickstart leaves it, made up: the base in the run itself, three stages beside it."""

import json
from pathlib import Path
from typing import Any

from tests.report.synthetic import put, solved, write_run

MODELS = {
    "base": "checkpoints/step-000150",
    "R1-Zero": "stages/1_r1_zero/checkpoints/step-000020",
    "R1": "stages/6_r1/checkpoints/step-000009",
    "student": "stages/8_student/checkpoints/step-000040",
}
BETTER = {"base": -0.3, "R1-Zero": 0.0, "R1": 0.08, "student": 0.02}
PROBLEMS = (*(("chain_sum", f"What is {a} + 4 + 8?") for a in range(9, 16)), ("countdown", "Use 3, 4, 5 to make 9."))
FILES = (
    "pipeline.json",
    "evals/problems.json",
    "evals/problems.jsonl",
    "stages/6_r1/evals/problems.json",
    "stages/6_r1/evals/problems.jsonl",
    "stages/1_r1_zero/metrics.jsonl",
)


def write_chain(folder: Path) -> Path:
    write_run(folder, steps=150)
    for name, at in MODELS.items():
        home = folder / at.partition("checkpoints")[0]
        (home / "evals").mkdir(parents=True, exist_ok=True)
        record: dict[str, Any] = solved("problems", BETTER[name])
        record["budgets"][-1]["budget"] = None
        record |= {"format": 0.9, "language": 0.95}
        put(home / "evals/problems.json", record)
        lines = [json.dumps(line) for line in attempts(name)]
        (home / "evals/problems.jsonl").write_text("\n".join(lines) + "\n")
    for name in ("1_r1_zero", "6_r1"):
        lines = [json.dumps(metrics(step)) for step in range(1, 21)]
        (folder / "stages" / name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        (folder / "stages" / name / "config.toml").write_text("seed = 0\n")
    rows = [
        stage("1_r1_zero", "rl", {"steps": 20, "answers": 10240}),
        stage("4_samples", "samples", {"verdicts": {"kept": 300, "wrong": 700}, "general": 75, "lessons": 375}),
        stage("6_r1", "rl", {"steps": 9, "answers": 4608}),
        stage("8_student", "sft", {"steps": 40, "lessons": 900, "tokens": 163840}),
    ]
    compared = {"minutes": 0.7, "attempts": 3200}
    put(
        folder / "pipeline.json", {"minutes": 15, "steps": None, "stages": rows, "models": MODELS, "compared": compared}
    )
    return folder


def stage(folder: str, kind: str, facts: dict) -> dict:
    minutes = {"predicted": 2.0, "used": 2.25}
    place = {"name": folder[2:], "folder": f"stages/{folder}", "kind": kind, "state": "done"}
    return place | {"minutes": minutes, "facts": facts, "inputs": {}, "output": ""}


def metrics(step: int) -> dict:
    rewards = {"rl/accuracy": 0.2 + step / 30, "rl/length": 20.0 + step, "rl/reward": 0.3 + step / 25}
    return {"step": step, "time/seconds": 6.0 * step} | rewards


def attempts(name: str):
    """Sums are solved after reinforcement, the last problem by nobody."""
    for item, (task, prompt) in enumerate(PROBLEMS):
        for budget in (0, None):
            right = name != "base" and task == "chain_sum"
            said = {"thinking": "9+4=13\n13+8=21" if right else "", "said": "</think><answer>21</answer>"}
            row = {"item": item, "sample": 0, "budget": budget, "task": task, "level": 1, "prompt": prompt}
            yield row | said | {"outcome": "right" if right else "wrong"}
