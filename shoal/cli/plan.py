"""`shoal plan fit MODEL`: will it run on a machine, how fast, and limited by what. Nothing is fetched."""

import argparse
import json
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

from shoal.cli.sizes import rate, size
from shoal.errors import ConfigError, ModelError
from shoal.model.config import ModelConfig
from shoal.model.gguf_config import is_gguf
from shoal.model.presets import PRESETS
from shoal.plan.fit import FORMS, Fit, Form, Hardware, fit
from shoal.plan.hardware import BUS_RATE, DISK_RATES, GPU_RATE, GPUS, RAM_RATE
from shoal.plan.memory import gib
from shoal.runtime import disk_bytes_per_s, read_bytes_per_s

PUBLISHED = {"deepseek-v3": "v3-671b", "deepseek-v3.1": "v3-671b", "deepseek-r1": "v3-671b"}
PUBLISHED |= {"deepseek-v2": "v2-236b", "deepseek-v2.5": "v2-236b", "deepseek-v2-lite": "v2-lite-16b"}
PUBLISHED |= {k.replace("r1-", "deepseek-r1-distill-"): k for k in PRESETS if k.startswith("r1-")}
EDITIONS = re.compile("(-(base|chat|zero|terminus|[0-9]{4}))+$")  # of one shape
SCRATCH_BYTES = 512 << 20  # of a file that the disk is measured on, where the model isn't here


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal plan", description="Before a model is fetched.")
    fits = parser.add_subparsers(dest="verb", required=True).add_parser("fit", help="will it run, how fast")
    fits.add_argument(
        "model", help="a preset (v3-671b, v2-lite-16b, …), a published name, a folder, a GGUF file or a config.json"
    )
    fits.add_argument("--weights", choices=FORMS, help="default: all of them, one line each")
    fits.add_argument("--gpu", metavar="NAME|SIZE", help=f"like 24GiB, or one of {', '.join(GPUS)}; default: none")
    fits.add_argument("--ram", metavar="SIZE", help="that may be used; default: what is free here")
    fits.add_argument("--disk", metavar="KIND|RATE", default="nvme", help="nvme, sata, hdd, none, or like 3GB/s")
    fits.add_argument("--ram-rate", metavar="RATE", help=f"default {RAM_RATE / 1e9:.0f}GB/s")
    fits.add_argument("--bus-rate", metavar="RATE", help=f"between GPU and RAM; default {BUS_RATE / 1e9:.0f}GB/s")
    fits.add_argument("--here", action="store_true", help="measure this machine's RAM and disk, for three seconds")
    fits.add_argument("--context", type=int, default=4096, metavar="N", help="tokens in the cache; default 4096")
    fits.add_argument("--hit-rate", type=float, metavar="P", help="of experts in memory; default: the uniform one")
    fits.add_argument("--json", action="store_true", help="one JSON object")
    args = parser.parse_args(argv)
    check(args)
    config, folder = described(args.model)
    machine = hardware(args, folder)
    context = min(args.context, config.max_positions)
    forms: tuple[Form, ...] = tuple(form for form in FORMS if args.weights in (None, form))
    found = {form: fit(config, form, machine, context, args.hit_rate) for form in forms}
    if args.json:
        plainly = {form: plain(x) for form, x in found.items()}
        print(json.dumps({"machine": asdict(machine), "context": context, "forms": plainly}))
    else:
        show(args, machine, context, found, Console(highlight=False, soft_wrap=True))
    return 0 if any(x.runs for x in found.values()) else 3


def check(args: argparse.Namespace) -> None:
    if args.context < 1:
        raise ConfigError(f"--context {args.context}", "1 or more", "ask for at least one token")
    if args.hit_rate is not None and not 0 <= args.hit_rate <= 1:
        raise ConfigError(f"--hit-rate {args.hit_rate}", "a share from 0 to 1", "0.6 is six of ten")


def described(name: str) -> tuple[ModelConfig, Path | None]:
    """The model by its name, or by its config.json; and its folder, if it is here."""
    path = Path(name)
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
        close = get_close_matches(plain_name, [*PRESETS, *PUBLISHED], n=3, cutoff=0.3)
        fix = f"try {' or '.join(close)}" if close else "name a folder"
        raise ModelError(f"no model {name!r}", f"one of {', '.join(PRESETS)}, or a path", fix)
    return PRESETS[plain_name], None


def hardware(args: argparse.Namespace, folder: Path | None) -> Hardware:
    gpu_bytes, gpu_rate = card(args.gpu) if args.gpu is not None else (0, 0.0)
    bus_rate = BUS_RATE if args.bus_rate is None else rate(args.bus_rate)
    ram = psutil.virtual_memory().available if args.ram is None else size(args.ram)
    ram_rate = rate(args.ram_rate) if args.ram_rate is not None else read_bytes_per_s() if args.here else RAM_RATE
    if args.disk in DISK_RATES or args.disk == "none":
        disk_rate = DISK_RATES.get(args.disk, 0.0)
    else:
        disk_rate = rate(args.disk)
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
    """On the model's largest file where it is here; else on a file of our own, in the working directory."""
    files = sorted(folder.glob("*.safetensors"), key=lambda f: f.stat().st_size) if folder else []
    if files:
        return disk_bytes_per_s(files[-1])
    with tempfile.NamedTemporaryFile(dir=".", prefix=".shoal-disk-") as scratch:
        for _ in range(SCRATCH_BYTES >> 22):
            scratch.write(bytes(1 << 22))
        scratch.flush()
        return disk_bytes_per_s(Path(scratch.name))


def plain(f: Fit) -> dict:
    return asdict(f) | {"limit": f.limit, "bounds": f.bounds()}


def show(args: argparse.Namespace, machine: Hardware, context: int, found: Mapping[str, Fit], console: Console) -> None:
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
        if f.runs and (args.weights or form == best(found)):
            detail(form, f, console)
        elif args.weights:
            console.print(f"it does not run: {f.why_not}; the smallest RAM that works is {gib(f.smallest)}")
    if any(x.weights.n_experts and x.hit_rate < 1 and x.runs for x in found.values()):
        assumed = (
            "uniform: all experts chosen equally often" if args.hit_rate is None else f"given: {args.hit_rate:.0%}"
        )
        console.print(f"experts found in memory, {assumed}; real routers prefer some, and then more are found")
    if not args.here:
        print("rates are a data sheet's or given; --here measures this machine's", file=sys.stderr)


def best(found: Mapping[str, Fit]) -> str:
    return max(found, key=lambda form: found[form].tokens_per_s)


def detail(form: str, f: Fit, console: Console) -> None:
    for place, parts in f.places.items():
        said = ", ".join(f"{name} {gib(n)}" for name, n in parts.items() if n)
        console.print(f"{form} · {place}: {gib(sum(parts.values()))}: {said}")
    for link, bound in f.bounds().items():
        moved = f.bytes_per_token[link]
        console.print(f"{form} · {link} moves {moved / 1e6:,.1f} MB a token: at most {bound:,.1f} tokens/s")
