"""`shoal doctor`: what this machine has, what it can do, what is missing and how to get it.

The rates are measured for about three seconds, with the threads that training would take now.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from shoal import runtime
from shoal.run import RUNS, package_version

FLAGS = {  # instruction set: what it is good for
    "avx2": "fast fp32",
    "avx512f": "fast fp32",
    "avx512_bf16": "fast bf16",
    "avx512_vnni": "fast int8",
    "amx_bf16": "very fast bf16",
    "amx_int8": "very fast int8",
}
PACKAGES = {  # distribution: what for, and the extra that brings it
    "torch": ("everything", ""),
    "tokenizers": ("text", ""),
    "transformers": ("parity tests, and opening our checkpoints elsewhere", "interop"),
    "datasets": ("Hugging Face datasets as a source", "interop"),
    "triton": ("GPU kernels", "gpu"),
    "pytest": ("make test", "dev"),
}
LEAST_MEMORY_GIB, LEAST_DISK_GIB = 4, 5


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal doctor", description="What this machine has and lacks.")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    args = parser.parse_args(argv)
    facts = examine()
    missing = advice(facts)
    if args.json:
        print(json.dumps(facts | {"advice": missing}))
    else:
        show(facts, missing, Console())
    return 0


def examine() -> dict[str, Any]:
    from shoal.ops import dispatch
    from shoal.recipes import _machine

    chosen, best = _machine.look(seconds=2.5)
    disk = shutil.disk_usage(next(p for p in (RUNS.absolute(), *RUNS.absolute().parents) if p.exists()))
    memory = psutil.virtual_memory()
    return {
        "device": chosen.device,
        "name": best.name,
        "gpu": gpu(),
        "cores": runtime.physical_cores(),
        "threads": chosen.threads,
        "chosen": chosen.description,
        "flags": [flag for flag in FLAGS if flag in runtime.cpu_flags()],
        "memory_gib": round(memory.total / 2**30, 1),
        "memory_free_gib": round(memory.available / 2**30, 1),
        "disk_free_gib": round(disk.free / 2**30, 1),
        "gemm_bf16_gflops": round(best.gemm_bf16_flops / 1e9, 1),
        "gemm_fp32_gflops": round(best.gemm_fp32_flops / 1e9, 1),
        "read_gb_per_s": round(best.read_bytes_per_s / 1e9, 1),
        "compiler": shutil.which("cc"),
        "kernels": dispatch.describe(),
        "versions": {name: package_version(name) for name in PACKAGES},
    }


def gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    p = torch.cuda.get_device_properties(0)
    return {
        "name": p.name,
        "count": torch.cuda.device_count(),
        "memory_gib": round(p.total_memory / 2**30, 1),
        "capability": f"{p.major}.{p.minor}",
    }


def advice(facts: dict[str, Any]) -> list[str]:
    """What is missing or too little, each with what to do."""
    found = []
    for name, (use, extra) in PACKAGES.items():
        wanted = extra != "gpu" or facts["gpu"]
        if wanted and not facts["versions"][name]:
            package = f"'shoal-lm[{extra}]'" if extra else name
            found.append(f"{name} is missing ({use}): pip install {package}")
    if not facts["compiler"]:
        found.append("no C compiler, so the native kernels stay off: install one as `cc`, for instance apt install gcc")
    if facts["threads"] < facts["cores"]:
        found.append(f"only {facts['threads']} of {facts['cores']} cores are free: stop what else runs for full speed")
    if facts["memory_free_gib"] < LEAST_MEMORY_GIB:
        found.append(f"{facts['memory_free_gib']} GiB of memory free: the quickstart wants {LEAST_MEMORY_GIB}")
    if facts["disk_free_gib"] < LEAST_DISK_GIB:
        found.append(f"{facts['disk_free_gib']} GiB of disk free: a few checkpoints want {LEAST_DISK_GIB}")
    if not facts["gpu"] and Path("/proc/driver/nvidia/version").exists():
        found.append("an NVIDIA driver is here, but this torch has no CUDA: install torch's CUDA build")
    return found


def show(facts: dict[str, Any], missing: list[str], console: Console) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    cpu = f"{runtime.cpu_model()}, {facts['cores']} cores, {' '.join(facts['flags']) or 'no vector flags known'}"
    table.add_row("cpu", cpu)
    if card := facts["gpu"]:
        table.add_row("gpu", f"{card['count']} × {card['name']}, {card['memory_gib']} GiB, sm {card['capability']}")
    else:
        table.add_row("gpu", "none")
    table.add_row("chosen", facts["chosen"])
    table.add_row("memory", f"{facts['memory_free_gib']} of {facts['memory_gib']} GiB free")
    table.add_row("disk", f"{facts['disk_free_gib']} GiB free")
    table.add_row("products", f"{facts['gemm_bf16_gflops']:,} GFLOP/s bf16, {facts['gemm_fp32_gflops']:,} fp32")
    table.add_row("memory read", f"{facts['read_gb_per_s']} GB/s")
    table.add_row("compiler", facts["compiler"] or "none")
    table.add_row("kernels", facts["kernels"].removeprefix("kernels: "))
    table.add_row("versions", ", ".join(f"{name} {v}" for name, v in facts["versions"].items() if v))
    console.print(table)
    for line in missing or ["nothing is missing; next: shoal quickstart"]:
        console.print(f"• {line}", markup=False)
