"""`--memory SIZE`: all that the process has in memory fits into so many bytes, or it says how many would do.

What lies where is worked out before any of it is read: the process as it is now and what it grows by, the weights that
meet every token, the cache, the engine's buffers, and as many experts as there is room for; the others stay on the
disk. Files that are mapped or were read lately are the system's cache, not ours, and don't count.
"""

import argparse
import sys
from typing import TYPE_CHECKING, NamedTuple

from shoal.cli.opened import Opened, open_model, prepared
from shoal.cli.sizes import size
from shoal.errors import ResourceError
from shoal.plan.fit import MARGIN, Division, buffer_bytes, divide, least_experts, mib, rows_bytes, smallest_budget
from shoal.plan.memory import gib

if TYPE_CHECKING:
    from shoal.engine.split import Parts

GROWTH = 64 << 20  # of the process beside what is counted: stacks of threads, requests, what malloc keeps
DRIFT = 4 << 20  # by which one start's process differs from another's
CACHE_SHARE = 8  # of what is left beside process and near weights, one part in so many is for the cache
LEAST_CONTEXT = 1024  # tokens that the cache holds where nothing else is said, at least


class Sized(NamedTuple):
    """A model that fits, and the bytes of its cache (None: the engine decides)."""

    opened: Opened
    cache_bytes: int | None


def add_memory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory", metavar="SIZE", help="most bytes of the whole process, like 6GiB; default: no limit"
    )
    parser.add_argument("--cache", metavar="SIZE", help="for the cache, like 1GiB; default: a share of what is free")


def open_sized(args: argparse.Namespace, threads: int | None = None, context: int | None = None) -> Sized:
    """The model of these arguments. Raises ResourceError, naming the smallest budget, where one is too small."""
    cache = None if args.cache is None else size(args.cache)
    if args.memory is None:
        return Sized(open_model(args.model, args.dtype, threads), cache)
    return open_within(args.model, args.dtype, threads, size(args.memory), cache, context)


def open_within(
    name: str, dtype: str, threads: int | None, memory: int, cache: int | None = None, context: int | None = None
) -> Sized:
    folder, _, tokenizer, device = prepared(name, threads)
    import torch

    from shoal import runtime
    from shoal.engine import split
    from shoal.engine.engine import LocalEngine  # noqa: F401  # what it imports is a part of the process
    from shoal.precision import weights

    parts = split.examine(folder, getattr(torch, dtype))
    process = runtime.resident_bytes() + GROWTH
    try:
        d, cache, whole = division(parts, memory, cache, context, process, device)
    except ResourceError:  # what it names shall do when it is tried, by a process that is not quite this one
        division(parts, memory, cache, context, process + DRIFT, device)
        raise
    if whole:
        tell(d, 0, 0, "")
        model, files = weights.opened(folder, getattr(torch, dtype), device)
        opened = Opened(model, tokenizer, folder, files.unchanged)
        runtime.give_back_memory()
        return Sized(opened, cache)
    rest = (d.n_experts - d.slots) * d.expert
    direct = runtime.free_bytes() - memory < rest
    tell(d, rest, parts.embedding_bytes, "past the page cache" if direct else "through the page cache")
    if parts.module_bytes:
        print(f"left out: the multi-token module, {gib(parts.module_bytes)}; nothing is drafted", file=sys.stderr)
    model, _ = split.load(parts, d.slots, direct, device, memory)
    runtime.give_back_memory()
    return Sized(Opened(model, tokenizer, folder), cache)


def division(
    parts: "Parts", memory: int, cache: int | None, context: int | None, process: int, device: str
) -> tuple[Division, int, bool]:
    """What goes where, the cache's bytes, and whether all of the model is in memory. Raises ResourceError.

    On a GPU lie near weights, cache and buffers, and all of a model without experts. Where no cache is asked for it has
    a share, or less where that is too much.
    """
    from shoal.engine.cache import bytes_per_token, page_fits
    from shoal.engine.pages import UNIT, units

    config = parts.model.config
    page = UNIT * bytes_per_token(config, config.n_layers, parts.model.embed.weight.dtype)
    tokens = min(context or config.max_positions, config.max_positions)
    if cache is not None:
        page_fits(cache, page, "the cache")
        return divided(parts, memory, cache, min(tokens, cache // page * UNIT), process, device)
    least, share = units(min(tokens, LEAST_CONTEXT)) * page, (memory - process - parts.near_bytes) // CACHE_SHARE
    wanted = max(least, min(units(tokens) * page, share // page * page))
    try:
        return divided(parts, memory, wanted, wanted // page * UNIT, process, device)
    except ResourceError:
        return divided(parts, memory, least, least // page * UNIT, process, device)


def divided(
    parts: "Parts", memory: int, cache: int, context: int, process: int, device: str
) -> tuple[Division, int, bool]:
    import torch

    from shoal.precision.weights import leaves

    config, here, n = parts.model.config, device == "cpu", len(parts.experts)
    buffers = buffer_bytes(config, context, bool(leaves(parts.model, parts.stored)), torch.get_num_threads())
    fixed = {"near": parts.near_bytes, "cache": cache, "buffers": buffers}
    whole = fixed | {"near": parts.near_bytes + parts.embedding_bytes + parts.module_bytes}
    whole["buffers"] += rows_bytes(config) if parts.module_bytes else 0
    sizes = {"process": process, "expert": parts.slot_bytes, "n_experts": n}
    fits = here and process + sum(whole.values()) + n * parts.slot_bytes <= memory * (1 - MARGIN)
    if not here:
        check_gpu(**fixed if n else whole)
        fixed = whole = dict.fromkeys(fixed, 0)
    if fits or not n:
        return divide(memory, **whole, **sizes, least=n), cache, True
    return divide(memory, **fixed, **sizes, least=least_experts(config.moe)), cache, False


def check_gpu(near: int, cache: int, buffers: int) -> None:
    """Raises ResourceError where they don't fit into what is free there."""
    import torch

    needed, free = smallest_budget(near + cache + buffers), torch.cuda.mem_get_info()[0]
    if needed > free:
        got = f"{mib(free)} free on the GPU for weights {mib(near)}, the cache {mib(cache)}, buffers {mib(buffers)}"
        fix = "a smaller --cache, weights in fewer bits, or the CPU for all of it: CUDA_VISIBLE_DEVICES= shoal …"
        raise ResourceError(got, f"at least {mib(needed)}", fix)


def tell(d: Division, rest: int, embedding: int, how: str) -> None:
    parts = ", ".join(f"{name} {gib(n)}" for name, n in d.parts().items())
    print(f"memory {gib(d.total)}: {parts}", file=sys.stderr)
    if rest:
        experts = f"{d.n_experts - d.slots:,} experts {gib(rest)}"
        also = f", embedding {gib(embedding)}" if embedding else ""
        print(f"disk {gib(rest + embedding)}: {experts}{also}, read {how}", file=sys.stderr)
