"""What a run directory says about a run: read once, believed with care.

A report is asked for when a run is done, and also while it goes, after it was killed, or when half of its files are
gone. So every file may be missing (None, shown as "not measured") or damaged (named in `problems`, shown on the page);
nothing here raises for what it finds inside a run.
"""

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal import config as configs
from shoal.errors import ConfigError, RunError
from shoal.model.config import ModelConfig

MAX_SAMPLES = 12


@dataclass(frozen=True)
class Facts:
    """`series` holds the finite values of each metric as (step, value); the rest mirrors the files of the run."""

    name: str
    config: dict[str, Any]
    origins: dict[str, str]
    model: ModelConfig | None
    command: str | None
    env: dict[str, Any]
    status: dict[str, Any]
    series: dict[str, list[tuple[int, float]]]
    samples: list[dict[str, Any]]
    evals: dict[str, dict[str, Any]]
    plan: dict[str, Any]
    receipt: dict[str, Any]
    problems: list[str] = field(default_factory=list)

    def last(self, metric: str) -> float | None:
        return self.series[metric][-1][1] if metric in self.series else None

    def bits_per_byte(self) -> float | None:
        """Of the final evaluation, else the last one made while training."""
        value = number(self.evals.get("held_out", {}).get("value"))
        return value if value is not None else self.last("eval/bits_per_byte")

    def by_step(self) -> list[tuple[str, dict[str, Any]]]:
        """Evaluations in the order of the steps they were made at; one without a step came before all of them."""
        return sorted(self.evals.items(), key=lambda named: number(named[1].get("step")) or 0.0)

    def yardsticks(self) -> dict[str, float]:
        """Bits per byte of ordinary compressors on the held-out text."""
        found = self.evals.get("held_out", {}).get("yardsticks")
        known = {str(name): number(y) for name, y in found.items()} if isinstance(found, dict) else {}
        return {name: y for name, y in known.items() if y and y > 0}


def read(run: Path) -> Facts:
    """Raises RunError only where there is no run at all."""
    if not (run / "config.toml").is_file() and not (run / "metrics.jsonl").is_file():
        raise RunError(f"{run} is not a run", "a directory with config.toml or metrics.jsonl", "see `shoal runs ls`")
    problems: list[str] = []
    config = _toml(run / "config.toml", problems)
    return Facts(
        name=run.resolve().name,
        config=config,
        origins={k: str(v) for k, v in record(run / "config.origin.json", problems).items()},
        model=_model(config, problems),
        command=_text(run / "command.txt", problems),
        env=record(run / "env.json", problems),
        status=record(run / "status.json", problems),
        series=_series(run / "metrics.jsonl", problems),
        samples=[s for _, s in _folder(run / "samples", problems)][:MAX_SAMPLES],
        evals=dict(_folder(run / "evals", problems)),
        plan=record(run / "plan.json", problems),
        receipt=record(run / "receipt.json", problems),
        problems=problems,
    )


def number(value: Any) -> float | None:
    """A number one can reckon with, or None for anything else a file may hold in its place."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if -1e30 < value < 1e30 else None


def numbers(value: Any) -> list[float]:
    """A list of nothing but numbers, else an empty one."""
    found = [number(x) for x in value] if isinstance(value, list) else []
    return [] if None in found else [x for x in found if x is not None]


def items(record: Mapping[str, Any], key: str) -> list[Any]:
    """The list under `key`, empty where there is none."""
    value = record.get(key)
    return value if isinstance(value, list) else []


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, text) of every leaf that is worth a line; empty ones are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        elif value not in (None, "", [], {}):
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _text(path: Path, problems: list[str]) -> str | None:
    try:
        return path.read_text("utf-8", errors="replace").strip() or None
    except FileNotFoundError:
        return None
    except OSError as e:
        problems.append(f"{path.name} cannot be read: {e.strerror}")
        return None


def record(path: Path, problems: list[str]) -> dict[str, Any]:
    """A JSON object; {} where there is no such file, and where it is none, which is added to the problems."""
    text = _text(path, problems)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        problems.append(f"{path.name} is not a JSON object and was left out")
        return {}
    return value


def _folder(folder: Path, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    found = [(path.stem, record(path, problems)) for path in sorted(folder.glob("*.json"))]
    return [(name, value) for name, value in found if value]


def _toml(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(path, problems) or "")
    except tomllib.TOMLDecodeError as e:
        problems.append(f"config.toml cannot be read: {e}")
        return {}


def _model(config: dict[str, Any], problems: list[str]) -> ModelConfig | None:
    if not isinstance(table := config.get("model"), dict):
        return None
    try:
        return configs.from_table(ModelConfig, table)
    except ConfigError as e:
        problems.append(f"the model in config.toml is not one this version knows: {e.got}")
        return None


def _series(path: Path, problems: list[str]) -> dict[str, list[tuple[int, float]]]:
    """Each metric in the order of its steps; a step written twice counts as it was written last."""
    series: dict[str, dict[int, float]] = {}
    skipped = 0
    for line in (_text(path, problems) or "").splitlines():
        try:
            record = json.loads(line)
            step = number(record["step"])
        except (ValueError, KeyError, TypeError, RecursionError):
            step = None
        if step is None:
            skipped += 1
            continue
        for name, value in record.items():
            if name != "step" and (y := number(value)) is not None:
                series.setdefault(name, {})[int(step)] = y
    if skipped:
        problems.append(f"{skipped} damaged line{'s' if skipped > 1 else ''} in metrics.jsonl left out")
    return {name: sorted(points.items()) for name, points in series.items()}
