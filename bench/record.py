"""Where a measured number goes: the last line of a bench, and `records/NAME.json`.

A bench ends with one call, `emit(name=..., ratio=..., ours=..., peer=..., spread=..., limit=...)`; lists where there
are several rows. The machine is added, the object is printed as one line, and the same object with the command, the
date and the versions is appended to the list in `records/NAME.json`: every number in the docs has a record behind it.
"""

import json
import os
import platform
import shlex
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RECORDS = Path(__file__).parent.parent / "records"
PACKAGES = ("torch", "numpy", "transformers", "tokenizers", "safetensors", "litgpt", "triton")


def emit(name: str, *, ratio, ours, peer, spread, limit, **more) -> dict:
    """Print the result as one JSON line and append it to the records. Numbers or lists of them, one per row."""
    result = {"name": name, "ratio": ratio, "ours": ours, "peer": peer, "spread": spread, "limit": limit} | more
    result["machine"] = machine()
    append(name, result | {"command": command(), "date": now(), "versions": versions()})
    print(json.dumps(result), flush=True)
    return result


def append(name: str, record: dict) -> None:
    path = RECORDS / f"{name}.json"
    records = json.loads(path.read_text()) if path.exists() else []
    fresh = path.with_suffix(".json.new")
    fresh.write_text(json.dumps([*records, record], indent=1) + "\n")
    os.replace(fresh, path)


def machine() -> str:
    """Processor, cores this process may use, memory and GPU: what a reader needs to place the number."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    parts = [processor(), f"{len(os.sched_getaffinity(0))} cores", f"{memory:.0f} GiB", *gpus()]
    return ", ".join(parts)


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    for line in cpuinfo.read_text().splitlines() if cpuinfo.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def gpus() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def command() -> str:
    """The command that makes this number again. `python -m bench.x` shows the module, not the path of its file."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    how = ["python", "-m", spec.name] if spec else ["python", sys.argv[0]]
    return shlex.join(how + sys.argv[1:])


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
