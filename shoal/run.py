"""The run directory: what was asked, what happened, what came out. Torch-free, so that looking at runs is instant.

    runs/2026-11-21_quickstart_k3f9/
      config.toml  config.origin.json  command.txt  env.json      written once, before anything happens
      status.json  metrics.jsonl  logs/                           written while it happens
      checkpoints/step-000400/  samples/  evals/  profile/        what comes out

`metrics.jsonl` is the record: one line a call of `log`, `{"step": 12, "train/loss": 3.1, …}`, flushed at once. A line
torn by a kill is dropped by whoever reads or appends next. After a resume, `rewind` drops the lines past the resumed
step, so the file ends up as if the run had never stopped. Small files are replaced atomically; readers need no lock.
"""

import errno
import fcntl
import json
import math
import os
import platform
import secrets
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from shoal import runtime
from shoal.config import to_toml
from shoal.errors import ResourceError, RunError, ShoalError

RUNS = Path("runs")
NO_RUNS = "there are no runs yet; `shoal quickstart` makes one"
ALPHABET = "23456789abcdefghjkmnpqrstuvwxyz"  # of ids; no look-alikes
PIPELINE = "pipeline.json"  # of a run that has stages (recipes/_pipeline.py)
PACKAGES = ("shoal-lm", "torch", "numpy", "tokenizers", "safetensors", "transformers", "triton")


class Run:
    """One run directory. Make it with `create`, `open` or `find`."""

    def __init__(self, path: Path):
        self.path, self.id = path, path.name
        self.checkpoints, self.samples, self.evals = path / "checkpoints", path / "samples", path / "evals"
        self.logs, self.profile = path / "logs", path / "profile"
        self._metrics: BinaryIO | None = None

    @classmethod
    def create(
        cls, recipe: str, out: Path | str | None, config: Any, origins: Mapping[str, str], argv: Sequence[str]
    ) -> "Run":
        """A new directory: `out`, which must be empty or absent, or a fresh name under runs/."""
        path = Path(out or RUNS / new_id(recipe)).absolute()
        if path.is_dir() and any(path.iterdir()):
            raise RunError(f"{path} exists and isn't empty", "a new directory", "choose another --out, or --resume it")
        run = cls(path)
        try:
            for folder in (run.logs, run.checkpoints, run.samples, run.evals):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise RunError(f"{path}: {e.strerror}", "a directory we may write in", "choose another --out") from None
        run.write_config(config, origins)
        replace_text(path / "command.txt", shlex.join(argv) + "\n")
        run.write_env(**environment())
        run.status(id=run.id, recipe=recipe, state="created", created=now())
        if path.parent.name == RUNS.name:
            _point_latest(path)
        return run

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        path = Path(path).resolve()
        if not (path / "config.toml").is_file():
            raise RunError(f"{path} is not a run", "a directory with config.toml", "`shoal runs ls` lists the runs")
        return cls(path)

    def write_config(self, config: Any, origins: Mapping[str, str]) -> None:
        replace_text(self.path / "config.toml", to_toml(config, origins))
        replace_text(self.path / "config.origin.json", json.dumps(dict(origins), indent=1) + "\n")

    def origins(self) -> dict[str, str]:
        return read_json(self.path / "config.origin.json")

    def write_env(self, **facts: Any) -> None:
        """Add facts of the place it runs in (threads, measured peaks) to env.json."""
        replace_text(self.path / "env.json", json.dumps(self.env() | facts, indent=1) + "\n")

    def env(self) -> dict[str, Any]:
        return read_json(self.path / "env.json")

    def pipeline(self) -> dict[str, Any]:
        """Its stages, where it has some."""
        return read_json(self.path / PIPELINE)

    def of_model(self) -> "Run":
        """The stage whose model goes by this run's name, once it is done; else the run itself."""
        stage = self.pipeline().get("model")
        return Run.open(self.path / stage) if stage else self

    def status(self, **facts: Any) -> dict[str, Any]:
        """Merge `facts` into status.json and return the whole; without facts, just read."""
        status = read_json(self.path / "status.json")
        if facts:
            status |= facts | {"updated": now()}
            replace_text(self.path / "status.json", json.dumps(status, indent=1) + "\n")
        return status

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line to the record. JSON has no NaN or infinity: they are written null and read back as NaN."""
        line = _jsonable({"step": step} | dict(metrics))
        with explained(self.path / "metrics.jsonl"):
            self._metrics = self._metrics or _open_whole_lines(self.path / "metrics.jsonl")
            self._metrics.write(json.dumps(line).encode() + b"\n")
            self._metrics.flush()

    def rewind(self, step: int) -> None:
        """Drop the record past `step`, and what a run that had ended added to the line of its last step."""
        self.close()
        first: dict[float, str] = {}
        for line in self.metrics():
            if line["step"] <= step:
                first.setdefault(line["step"], json.dumps(_jsonable(line)) + "\n")
        replace_text(self.path / "metrics.jsonl", "".join(first.values()))

    def metrics(self) -> list[dict[str, float]]:
        """Every line of the record, in order."""
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        try:
            return [{k: math.nan if v is None else v for k, v in json.loads(line).items()} for line in lines]
        except ValueError as e:
            raise RunError(f"{path}: {e}", "one JSON object a line", "delete the damaged line") from None

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one metric."""
        points = [(int(line["step"]), line[name]) for line in self.metrics() if name in line]
        return [s for s, _ in points], [v for _, v in points]

    def close(self) -> None:
        if self._metrics:
            self._metrics.close()
            self._metrics = None

    @contextmanager
    def begun(self) -> Iterator[None]:
        """The lock of a run that was just made. A user's error before anything happened in it takes it away again, so
        that the same command, corrected, finds its place free.
        """
        try:
            with self.lock():
                yield
        except ShoalError:
            if self.status().get("state") == "created":
                self._vanish()
            raise

    def _vanish(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        latest = self.path.parent / "latest"
        if latest.is_symlink() and not latest.exists():
            older = list_runs(self.path.parent)
            _point_latest(older[0].path) if older else latest.unlink()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process trains in a directory. The kernel lets go when the process ends, however it ends."""
        with open(self.path / ".lock", "a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                raise RunError(f"{self.path} is in use by {owner}", "a run nobody writes to", "stop that one") from None
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
            try:
                yield
            finally:
                file.truncate(0)


# Finding runs


def list_runs(root: Path | str = RUNS) -> list[Run]:
    """All runs directly under `root`, the newest first."""
    folders = [p.parent for p in Path(root).glob("*/config.toml") if not p.parent.is_symlink()]
    return sorted(map(Run.open, folders), key=lambda r: (r.status().get("created", ""), r.id), reverse=True)


def find(name: str, root: Path | str = RUNS) -> Run:
    """By path, id, "latest", or a unique piece of an id."""
    if (Path(name) / "config.toml").is_file():
        return Run.open(name)
    runs = list_runs(root)
    if name == "latest" and runs:
        return runs[0]
    exact = [r for r in runs if r.id == name]
    found = exact or [r for r in runs if name and (r.id.startswith(name) or r.id.endswith(name))]
    if len(found) == 1:
        return found[0]
    if found:
        raise RunError(f"{name} names {len(found)} runs", "one run", "say more of: " + ", ".join(r.id for r in found))
    ids = [r.id for r in runs]
    close = get_close_matches(name, ids, n=1, cutoff=0.6)
    fix = f"did you mean {close[0]}?" if close else f"the newest is {ids[0]}" if ids else NO_RUNS
    raise RunError(f"no run {name}", f"a path, an id under {root}/, the start or end of one, or latest", fix)


def new_id(recipe: str) -> str:
    """2026-11-21_quickstart_k3f9"""
    return f"{datetime.now():%Y-%m-%d}_{recipe}_{''.join(secrets.choice(ALPHABET) for _ in range(4))}"


def now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def environment() -> dict[str, Any]:
    """What a reader needs to judge a run's numbers: code, versions, machine. No host, user or path names."""
    return {
        "created": now(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "commit": _commit(),
        "versions": {name: version for name in PACKAGES if (version := package_version(name))},
        "cpu": runtime.cpu_model(),
        "cores": runtime.physical_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def package_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of our own source, "+" behind it where files were changed; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", "run.py"], check=True, capture_output=True, timeout=5)
        words = [*git, "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


# Files


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """A full disk as an error that says so."""
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(f"{path}: {e.strerror}", "room on the disk", "free some space, then --resume") from None


def replace_text(path: Path, text: str) -> None:
    """Readers see the old file or the new one, never a part. A kill leaves at most a hidden temporary behind."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    with explained(path):
        try:
            part.write_text(text, "utf-8")
            os.replace(part, path)
        except OSError:
            with suppress(OSError):
                part.unlink()
            raise


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is no such file."""
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise RunError(f"{path}: {e}", "JSON", "restore or delete the file") from None


def _open_whole_lines(path: Path) -> BinaryIO:
    """Open for appending after the last whole line."""
    file = open(path, "ab+")
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(0, os.SEEK_END)
    return file


def _json_number(value: Any) -> int | float | None:
    if isinstance(value, int):
        return int(value)
    return number if math.isfinite(number := float(value)) else None


def _jsonable(line: Mapping[str, float]) -> dict[str, int | float | None]:
    return {name: _json_number(value) for name, value in line.items()}


def _point_latest(path: Path) -> None:
    """runs/latest → path, replaced atomically."""
    part = path.parent / f".latest.{os.getpid()}"
    part.unlink(missing_ok=True)
    part.symlink_to(path.name)
    os.replace(part, path.parent / "latest")
