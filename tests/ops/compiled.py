"""Compile the kernels for a chip that needn't be here, and print one JSON line for each of their tile sizes.

    python -m tests.ops.compiled 90        (90: H100, H200; 89: RTX 4090; 86: RTX 3090)

Triton brings the compiler. What comes out: the tensor cores' instructions in the machine-independent code, and of the
machine's own the registers, spilled bytes of a thread and shared memory of a program.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shoal.ops import triton_experts, triton_gemm, triton_latent, triton_quant, triton_weights

HEADS = {90: 64, 89: 32}  # triton_latent.heads_at_once on these chips
FP8, BYTE, F32, BF16, LONG, INT = "*fp8e4nv", "*u8", "*fp32", "*bf16", "*i64", "i32"


def main() -> None:
    chip = int(sys.argv[1])
    for name, tuner, types, constants in kernels(chip):
        latent = tuner is triton_latent._attend
        for config in triton_latent._fitting(tuner.configs, constants) if latent else tuner.configs:
            described = {"kernel": name, **config.kwargs, "warps": config.num_warps, "stages": config.num_stages}
            print(json.dumps(described | built(tuner.fn, chip, types, constants | config.kwargs, config)), flush=True)
    for name, kernel, types, constants in untuned(chip):
        print(json.dumps({"kernel": name} | built(kernel, chip, types, constants, triton.Config({}))), flush=True)


def kernels(chip: int) -> Iterator[tuple]:
    """(name, tuner, types of what is given at run time, constants) at V3's shapes."""
    weights = {"x": BF16, "x_stride": INT, "codes": BYTE, "scales": BF16, "y": BF16, "M": INT, "N": INT, "K": INT}
    constants = {"ROWS": 1, "GROUP": 128, "STEP": 128, "FEW": True}
    yield "int8", triton_weights._linear, weights, constants | {"FORM": "int8", "least": None}
    yield "int4", triton_weights._linear, weights | {"least": BF16}, constants | {"FORM": "int4"}
    if chip < 89:
        return
    fp8 = weights | {"codes": FP8, "scales": F32}
    yield "fp8", triton_weights._linear, fp8, constants | {"FORM": "fp8", "ROWS": 128, "least": None}
    engine = chip >= 90
    product = {"a": FP8, "b": FP8, "a_scales": F32, "b_scales": F32}
    sizes = {"M": INT, "N": INT, "K": INT}
    linear = product | {"y": BF16} | sizes
    yield "linear", triton_gemm._linear, linear, {"counts": None, "E": 0, "E2": 1, "FEW": False, "ENGINE": engine}
    grouped = product | {"y": BF16, "counts": LONG} | sizes
    yield "grouped", triton_gemm._linear, grouped, {"E": 256, "E2": 256, "FEW": False, "ENGINE": engine}
    gradient = product | {"dw": F32, "counts": LONG, "N": INT, "K": INT, "S": INT}
    yield "gradient", triton_gemm._gradient, gradient, {"E": 256, "E2": 256, "ENGINE": engine}
    attend = {"q": BF16, "latent": BF16, "table": LONG, "table_stride": INT, "seen": LONG}
    attend |= {"part": F32, "lse": F32, "H": INT, "scale": "fp32"}
    shape = {"C": 512, "R": 64, "U": 64, "A": HEADS[chip], "C2": 512, "R2": 64, "FAR": True}
    yield "latent attention", triton_latent._attend, attend, shape


def untuned(chip: int) -> Iterator[tuple]:
    """The same of those that have one size."""
    rows = {"D": INT, "place": LONG}
    across = {"K": 8, "WIDTH": triton_experts.WIDTH}
    yield "gather", triton_experts._gather, rows | {"x": BF16, "y": BF16}, across
    weighed = rows | {"y": BF16, "weights": F32, "out": BF16}
    yield "weigh", triton_experts._sum, weighed, across
    yield "ungather", triton_experts._sum, weighed, across | {"weights": None}
    back = {"dy": BF16, "weights": F32, "dy_rows": BF16, "dweights": F32}
    yield "unweigh", triton_experts._unweigh, rows | back | {"y": BF16}, across
    merged = {"part": F32, "lse": F32, "o": BF16, "H": INT, "S": INT}
    yield "merge", triton_latent._merge, merged, {"C": 512, "C2": 512}
    for scales in (F32, BYTE) if chip >= 89 else ():
        made = {"codes": FP8, "scales": scales, "T": INT, "K": INT}
        tile, kind = {"ROWS": triton_quant.ROWS, "TILE": 128}, "fp32" if scales == F32 else "ue8m0"
        yield f"rows, {kind}", triton_quant._rows, made | {"x": BF16, "stride": INT}, tile
        both = {"gate": BF16, "up": BF16, "gate_stride": INT, "up_stride": INT}
        yield f"swiglu, {kind}", triton_quant._swiglu, made | both, tile
        norm = made | {"x": BF16, "stride": INT, "weight": F32, "y": BF16, "eps": "fp32"}
        yield f"norm, {kind}", triton_quant._rms_norm, norm, {"B2": 64, "TILE": 128}
        yield f"blocks, {kind}", triton_quant._blocks, made | {"weight": BF16, "N": INT}, {"TILE": 128}
        columns = made | {"x": BF16, "stride": INT, "counts": LONG, "S": INT}
        yield f"columns, {kind}", triton_quant._columns, columns, {"E": 256, "E2": 256, "TILE": 128}


def built(kernel, chip: int, types: dict, constants: dict, config) -> dict:
    types = dict(types)
    if constants.get("ENGINE"):
        types |= {side: f"tensordesc<fp8e4nv[{constants[size]}, 128]>" for side, size in (("a", "BM"), ("b", "BN"))}
    constants = {p.name: p.default for p in kernel.params if p.has_default} | constants
    whole_16 = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if types.get(n, "").startswith(("*", "i"))
    }
    source = ASTSource(kernel, {n: types.get(n, "constexpr") for n in kernel.arg_names}, constants, whole_16)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    made = triton.compile(source, GPUTarget("cuda", chip, 32), options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        cuobjdump = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(cuobjdump, check=True, capture_output=True, text=True).stdout
    registers, spilled = re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1]
    products = sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync)\S+", made.asm["ptx"])))
    engine = "cp.async.bulk.tensor" in made.asm["ptx"]
    return {
        "registers": int(registers), "spilled": int(spilled), "shared": made.metadata.shared, "products": products,
        "copy_engine": engine,
    }  # fmt: skip


if __name__ == "__main__":
    main()
