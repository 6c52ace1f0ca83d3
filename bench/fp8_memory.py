"""Bytes of a training step by part: in fp8 and in bf16 as tensors are held, against fp32 as it is planned.

    python -m bench.fp8_memory [--quick]

One forward pass of the benches' shape (107.5M parameters, 4,096 tokens), every tensor that autograd keeps for backward
counted once by its storage; then backward, and the optimizer's own. A gradient has its weight's bytes: of those that
this pass makes that is asserted, the head's is taken for granted.

No fp32 step is run. Its weights, moments and gradients are those of `shoal.plan.memory`, its activations twice bf16's,
whose kernels keep no temporaries: the reference's own fp32 pass keeps more. Beside fp8 stands what the plan foretells
of it. What is kept in 8 and 12 bits is told apart by its dtype, each with its share, by numbers, of the scales' bytes;
`in fp32` are the same numbers at four bytes. Logits and temporaries of a moment are in no row.
"""

import argparse
from collections import defaultdict

import torch
from torch.autograd.graph import saved_tensors_hooks

from bench.record import emit
from bench.shape import CONTEXT, ROWS, SHAPE, batch, prepare_batches
from bench.table import show
from shoal import runtime
from shoal.model.attend import Packed
from shoal.ops.quant import FP8
from shoal.ops.quant_tiles import UE8M0
from shoal.plan import memory
from shoal.train.config import BatchConfig, Fp8Config, OptimConfig, PretrainConfig
from shoal.train.step import TrainState

LIMIT = 0.26  # of what is in 8 bits, over fp32: a quarter, and a byte of scale for 128
MIB = 2**20
PARTS = ("weights", "masters", "moments", "gradients", "activations")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one row of 512 tokens instead of eight")
    rows = 1 if parser.parse_args().quick else ROWS
    runtime.setup()
    prepare_batches()
    tokens = torch.from_numpy(batch(0)[:rows, :-1]).reshape(-1)
    sixteen, _ = held("plain", tokens)
    eight, kept = held("fp8", tokens)
    wide = {part: memory_of("fp32", len(tokens))[part] for part in PARTS[:-1]}
    wide["activations"] = 2 * sixteen["activations"]
    report(wide, sixteen, eight, kept, len(tokens))


def held(precision: str, tokens_T: torch.Tensor) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    """Bytes by part, the head's gradient as if it were there; and of activations, (bytes, numbers) by format."""
    state = TrainState(config_of(precision), "cpu")
    storages, numbers, model = {}, defaultdict(int), state.model

    def keep(t):
        storages[t.untyped_storage().data_ptr()] = t
        return t

    lengths = (CONTEXT,) * (len(tokens_T) // CONTEXT)
    positions_T = torch.arange(CONTEXT).repeat(len(lengths))
    with saved_tensors_hooks(keep, lambda t: t):
        h_TD, _ = model.body(model.embed(tokens_T), positions_T, Packed(lengths))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = [t for at, t in storages.items() if at not in own]
    by_format = {}
    for t in kept:
        name = {FP8: "E4M3", UE8M0: "scales", torch.uint8: "E5M6"}.get(t.dtype, "as computed")
        numbers[name] += 0 if name == "scales" else t.numel() * 2 // 3 if name == "E5M6" else t.numel()
        by_format[name] = (by_format.get(name, (0, 0))[0] + t.untyped_storage().nbytes(), numbers[name])
    h_TD.float().square().mean().backward()
    slots = state.optimizer.slots
    parts = {
        "weights": sum(s.weight.nbytes for s in slots),
        "masters": sum(s.master.nbytes for s in slots if s.master.dtype != s.weight.dtype),
        "moments": sum(m.nbytes for s in slots for m in (s.first, s.second) if m is not None),
        "gradients": sum(s.weight.nbytes for s in slots),  # the head's too, which this pass leaves out
        "activations": sum(t.untyped_storage().nbytes() for t in kept),
    }
    assert all(s.weight.grad is None or s.weight.grad.nbytes == s.weight.nbytes for s in slots)
    return parts, by_format


def config_of(precision: str) -> PretrainConfig:
    assert precision in ("plain", "fp8")
    return PretrainConfig(
        SHAPE, batch=BatchConfig(CONTEXT, ROWS), optim=OptimConfig("adamw"), fp8=Fp8Config(), steps=1,
        precision=precision,
    )  # fmt: skip


def memory_of(side: str, tokens: int) -> dict[str, int]:
    """The plan."""
    steps = {
        "fp32": memory.Step(tokens, "adamw", dtype="fp32"),
        "bf16": memory.Step(tokens, "adamw"),
        "fp8": memory.Step(tokens, "adamw", precision="fp8", moments="bf16"),
    }
    plan = memory.of_training(SHAPE, steps[side])
    return {part: getattr(plan, part) for part in PARTS}


def report(
    wide: dict[str, int], sixteen: dict[str, int], eight: dict[str, int], kept: dict[str, tuple[int, int]], tokens: int
) -> None:
    sides = {"fp32, planned": wide, "bf16": sixteen, "fp8": eight, "fp8, planned": memory_of("fp8", tokens)}
    table = [[name, *(parts[p] / MIB for p in PARTS), sum(parts.values()) / MIB] for name, parts in sides.items()]
    show(["MiB", *PARTS, "sum"], table)
    scales, _ = kept["scales"]
    in_fp32 = {name: 4 * kept[name][1] for name in ("E4M3", "E5M6")}
    few = {name: kept[name][0] + scales * in_fp32[name] // sum(in_fp32.values()) for name in in_fp32}
    show(["kept in few bits", "MiB", "in fp32"], [[n, few[n] / MIB, in_fp32[n] / MIB] for n in few])
    rows = {"kept in E4M3": (few["E4M3"], in_fp32["E4M3"]), "kept in E5M6": (few["E5M6"], in_fp32["E5M6"])}
    for part, of in {"weights and masters": PARTS[:2], **{p: (p,) for p in PARTS[2:]}, "all of it": PARTS}.items():
        rows[part] = (sum(eight[p] for p in of), sum(wide[p] for p in of))
    emit(
        "fp8_memory",
        rows=list(rows),
        ratio=[ours / peer for ours, peer in rows.values()],
        ours=[ours for ours, _ in rows.values()],
        peer=[peer for _, peer in rows.values()],
        spread=[None] * len(rows),
        limit=[LIMIT if name == "kept in E4M3" else None for name in rows],
        unit="bytes",
        peer_is="an fp32 step as planned, its activations twice bf16's",
        tokens=tokens,
        parts=sides,
    )


if __name__ == "__main__":
    main()
