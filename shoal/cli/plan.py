"""`shoal plan fit MODEL`: will it run on a machine, how fast, and limited by what. Nothing is fetched."""

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table

from shoal.cli.export import INT4_GROUP
from shoal.cli.opened import model_folder
from shoal.cli.sizes import rate, size
from shoal.errors import ConfigError, ModelError, ResourceError
from shoal.model.config import ModelConfig
from shoal.model.gguf_config import is_gguf
from shoal.model.presets import PRESETS
from shoal.plan.fit import FORMS, Fit, Form, Hardware, Weights, buffer_bytes, mib, placed, weights
from shoal.plan.hardware import BUS_RATE, DISK_RATES, GPU_RATE, GPUS, RAM_RATE
from shoal.plan.memory import gib
from shoal.runtime import disk_bytes_per_s, physical_cores, read_bytes_per_s

PUBLISHED = {"deepseek-v3": "v3-671b", "deepseek-v3.1": "v3-671b", "deepseek-r1": "v3-671b"}
PUBLISHED |= {"deepseek-v2": "v2-236b", "deepseek-v2.5": "v2-236b", "deepseek-v2-lite": "v2-lite-16b"}
PUBLISHED |= {k.replace("r1-", "deepseek-r1-distill-"): k for k in PRESETS if k.startswith("r1-")}
EDITIONS = re.compile("(-(base|chat|zero|terminus|[0-9]{4}))+$")  # of one shape
STORED = "as stored"
SCRATCH_BYTES = 512 << 20  # of a file that the disk is measured on, where the model isn't here


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal plan", description="Before a model is fetched.")
    fits = parser.add_subparsers(dest="verb", required=True).add_parser("fit", help="will it run, how fast")
    fits.add_argument(
        "model",
        help="a preset (v3-671b, v2-lite-16b, …), a published name, a folder (a run's too), a GGUF file, a config.json",
    )
    fits.add_argument("--weights", choices=FORMS, help="default: as a folder has them, and all of these")
    fits.add_argument("--gpu", metavar="NAME|SIZE", help=f"like 24GiB, or one of {', '.join(GPUS)}; default: none")
    fits.add_argument("--ram", metavar="SIZE", help="that may be used; default: what is free here")
    fits.add_argument("--disk", metavar="KIND|RATE", default="nvme", help="nvme, sata, hdd, none, or like 3GB/s")
    fits.add_argument("--ram-rate", metavar="RATE", help=f"default {RAM_RATE / 1e9:.0f}GB/s")
    fits.add_argument("--bus-rate", metavar="RATE", help=f"between GPU and RAM; default {BUS_RATE / 1e9:.0f}GB/s")
    fits.add_argument("--here", action="store_true", help="measure this machine's RAM and disk, for some seconds")
    fits.add_argument("--context", type=int, default=4096, metavar="N", help="tokens in the cache; default 4096")
    fits.add_argument(
        "--threads", type=int, default=physical_cores(), metavar="N", help="default: one a core of this machine"
    )
    fits.add_argument("--hit-rate", type=float, metavar="P", help="of experts in memory; default: the uniform one")
    fits.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    check(args)
    config, folder = described(args.model)
    machine = hardware(args, folder)
    context = min(args.context, config.max_positions)
    known = {form: in_form(config, form) for form in FORMS if args.weights in (None, form)}
    if folder and not args.weights and not is_gguf(args.model) and (stored := as_stored(folder)):
        known = {STORED: stored} | known
    found = {}
    for form, (w, few_bits) in known.items():
        buffers = buffer_bytes(config, context, few_bits, args.threads)
        found[form] = placed(config, form, w, buffers, machine, context, args.hit_rate)
    if args.json:
        plainly = {form: plain(x) for form, x in found.items()}
        print(json.dumps({"machine": asdict(machine), "context": context, "forms": plainly}))
    else:
        show(args, folder, machine, context, found, Console(highlight=False, soft_wrap=True))
    return 0 if any(x.runs for x in found.values()) else 3


def in_form(config: ModelConfig, form: Form) -> tuple[Weights, bool]:
    """As `shoal quantize` makes it; and whether its matrices are in few bits."""
    return weights(config, form, {"int4": INT4_GROUP}.get(form, config.dim)), form != "bf16"


def as_stored(folder: Path) -> tuple[Weights, bool] | None:
    """What the files have, as the engine counts it for `--memory`; None where there are none, or wide ones, which it
    refuses there. Raises ModelError."""
    from shoal.model.hf_files import read_json

    if not any(folder.glob("*.safetensors")) or read_json(folder, "config.json").get("torch_dtype") == "float32":
        return None
    import torch

    from shoal.engine import split
    from shoal.precision.weights import leaves

    parts = split.examine(folder, torch.bfloat16)
    moe, n = parts.model.config.moe, len(parts.experts)
    chosen = n // moe.n_routed_experts * moe.n_activated if moe else 0
    w = Weights(parts.near_bytes, parts.embedding_bytes, parts.slot_bytes, n, chosen, parts.module_bytes)
    return w, bool(leaves(parts.model, parts.stored))


def check(args: argparse.Namespace) -> None:
    if args.threads < 1:
        raise ConfigError(f"--threads {args.threads}", "1 or more", "leave it out for one a core")
    if args.context < 1:
        raise ConfigError(f"--context {args.context}", "1 or more", "ask for at least one token")
    if args.hit_rate is not None and not 0 <= args.hit_rate <= 1:
        raise ConfigError(f"--hit-rate {args.hit_rate}", "a share from 0 to 1", "0.6 is six of ten")


def described(name: str) -> tuple[ModelConfig, Path | None]:
    """The model by its name, or by its config.json; and its folder, if it is here."""
    path = Path(name)
    if name and (path / "config.toml").exists():
        path = model_folder(name)
        name = str(path)
    if path.exists():
        from shoal.model.hf_config import read_config
        from shoal.model.hf_files import read_json

        if is_gguf(path):
            from shoal.model.hf import load_config

            return load_config(path), path.parent
        folder, file = (path.parent, path.name) if path.is_file() else (path, "config.json")
        if not file.endswith(".json") or not (folder / file).exists():
            expected = "a model folder, a GGUF file, a config.json or a preset"
            raise ModelError(f"{name} holds no config.json", expected, "check the path")
        return read_config(read_json(folder, file)), folder
    plain_name = name.lower().rpartition("/")[2]
    plain_name = PUBLISHED.get(EDITIONS.sub("", plain_name), plain_name)
    begun = [preset for preset in PRESETS if preset.startswith(plain_name)]
    if len(begun) == 1:
        return PRESETS[begun[0]], None
    if plain_name not in PRESETS:
        try:
            run = model_folder(name)  # by `latest` or a part of its name
        except ModelError:
            close = get_close_matches(plain_name, [*PRESETS, *PUBLISHED], n=3, cutoff=0.3)
            fix = f"try {' or '.join(close)}" if close else "name a folder"
            raise ModelError(f"no model {name!r}", f"one of {', '.join(PRESETS)}, a path or a run", fix) from None
        return described(str(run))
    return PRESETS[plain_name], None


def hardware(args: argparse.Namespace, folder: Path | None) -> Hardware:
    gpu_bytes, gpu_rate = card(args.gpu) if args.gpu is not None else (0, 0.0)
    bus_rate = BUS_RATE if args.bus_rate is None else rate(args.bus_rate)
    ram = psutil.virtual_memory().available if args.ram is None else size(args.ram)
    ram_rate = rate(args.ram_rate) if args.ram_rate is not None else read_bytes_per_s() if args.here else RAM_RATE
    if args.disk in DISK_RATES or args.disk == "none":
        disk_rate = DISK_RATES.get(args.disk, 0.0)
    elif args.disk[:1].isdigit():
        disk_rate = rate(args.disk)
    else:
        raise ConfigError(f"--disk {args.disk!r}", f"{', '.join(DISK_RATES)}, none, or a rate", "write it like 3GB/s")
    if args.here and args.disk == "nvme":
        disk_rate = measured_disk(folder)
    return Hardware(ram, ram_rate, disk_rate, gpu_bytes, gpu_rate, bus_rate)


def card(asked: str) -> tuple[int, float]:
    """Bytes, and bytes/s, of a GPU by its name or by its size."""
    if gpu := {name.lower(): gpu for name, gpu in GPUS.items()}.get(asked.lower()):
        return gpu.memory_bytes, gpu.read_bytes_per_s
    if not asked[:1].isdigit():
        raise ConfigError(f"--gpu {asked!r}", f"a size like 24GiB, or one of {', '.join(GPUS)}", "give its memory")
    return size(asked), GPU_RATE


def measured_disk(folder: Path | None) -> float:
    """On the model's largest file where it is here; else on a file of our own, in the working directory. Raises
    ResourceError where there can be none."""
    files = sorted(folder.glob("*.safetensors"), key=lambda f: f.stat().st_size) if folder else []
    if files:
        return disk_bytes_per_s(files[-1])
    try:
        with tempfile.NamedTemporaryFile(dir=".", prefix=".shoal-disk-") as scratch:
            for _ in range(SCRATCH_BYTES >> 22):
                scratch.write(os.urandom(1 << 22))  # zeros need not be stored
            scratch.flush()
            os.fsync(scratch.fileno())  # or it is being written while it is read
            return disk_bytes_per_s(Path(scratch.name))
    except OSError as e:
        got = f"the working directory takes no file to measure the disk on: {e.strerror}"
        fix = "go to another folder, or give --disk a rate"
        raise ResourceError(got, f"room for {gib(SCRATCH_BYTES)}", fix) from None


def plain(f: Fit) -> dict:
    return asdict(f) | {"limit": f.limit, "bounds": f.bounds()}


def show(
    args: argparse.Namespace,
    folder: Path | None,
    machine: Hardware,
    context: int,
    found: Mapping[str, Fit],
    console: Console,
) -> None:
    has = [f"RAM {gib(machine.ram_bytes)} at {machine.ram_rate / 1e9:.0f} GB/s"]
    if machine.gpu_bytes:
        has = [f"GPU {gib(machine.gpu_bytes)} at {machine.gpu_rate / 1e9:,.0f} GB/s", *has]
    if machine.disk_rate:
        has.append(f"disk at {machine.disk_rate / 1e9:.2g} GB/s")
    console.print(f"{args.model} on {', '.join(has)}; {context:,} tokens of context, one stream")
    table = Table(box=None, pad_edge=False)
    for name in ("weights", "bytes", "runs", "tokens/s", "limited by", "in memory", "smallest RAM"):
        table.add_column(name, justify="left" if name in ("weights", "runs", "limited by") else "right")
    for form, f in found.items():
        speed = f"{f.tokens_per_s:,.2f}" if f.runs else "-"
        near = f"{f.hit_rate:.0%}" if f.runs and f.weights.n_experts else "-"
        row = (form, gib(f.weights.total), "yes" if f.runs else "no", speed, f.limit or "-", near, gib(f.smallest))
        table.add_row(*row)
    console.print(table)
    for form, f in found.items():
        if f.runs and (args.weights or form in (STORED, best(found))):
            detail(form, f, console)
        elif args.weights:
            console.print(f"it does not run: {f.why_not}; the smallest RAM that works is {gib(f.smallest)}")
    if STORED in found and found[STORED].runs:
        console.print(f"run it so: {command(folder, machine, found[STORED].places)}")
    if any(x.weights.n_experts and x.hit_rate < 1 and x.runs for x in found.values()):
        assumed = (
            "uniform: all experts chosen equally often" if args.hit_rate is None else f"given: {args.hit_rate:.0%}"
        )
        console.print(f"experts found in memory, {assumed}; real routers prefer some, and then more are found")
    if is_gguf(args.model):
        print(f"--memory takes folders; first: shoal import {args.model} FOLDER --weights int8", file=sys.stderr)
    if not args.here:
        print("rates are a data sheet's or given; --here measures this machine's", file=sys.stderr)
        return
    from shoal.ops import cpu

    if not cpu.status().startswith("native"):
        print(f"kernels here: {cpu.status()}; tokens/s are those of native ones", file=sys.stderr)


def command(folder: Path | None, machine: Hardware, places: Mapping[str, Mapping[str, int]]) -> str:
    """That serves it as it was placed: a GPU that is there is taken unless it is hidden."""
    on_cpu = "CUDA_VISIBLE_DEVICES= " if machine.gpu_bytes and "GPU" not in places else ""
    within = "" if "weights" in places.get("GPU", {}) else f" --memory {machine.ram_bytes >> 20}MiB"
    cache = max(parts.get("cache", 0) for parts in places.values())
    return f"{on_cpu}shoal serve {folder}{within} --cache {mib(cache)}"


def best(found: Mapping[str, Fit]) -> str:
    return max(found, key=lambda form: found[form].tokens_per_s)


def detail(form: str, f: Fit, console: Console) -> None:
    for place, parts in f.places.items():
        said = ", ".join(f"{name} {gib(n)}" for name, n in parts.items() if n)
        console.print(f"{form} · {place}: {gib(sum(parts.values()))}: {said}")
    for link, bound in f.bounds().items():
        moved = f.bytes_per_token[link]
        console.print(f"{form} · {link} moves {moved / 1e6:,.1f} MB a token: at most {bound:,.1f} tokens/s")
