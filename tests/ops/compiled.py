"""Compile the tuned kernels for a chip that needn't be here, and print one JSON line for each tile size.

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

from shoal.ops import triton_gemm, triton_latent, triton_weights

HEADS = {90: 64, 89: 32}  # triton_latent.heads_at_once on these chips
FP8, BYTE, F32, BF16, LONG, INT = "*fp8e4nv", "*u8", "*fp32", "*bf16", "*i64", "i32"


def main() -> None:
    chip = int(sys.argv[1])
    for name, tuner, types, constants in kernels(chip):
        latent = tuner is triton_latent._attend
        for config in triton_latent._fitting(tuner.configs, constants) if latent else tuner.configs:
            described = {"kernel": name, **config.kwargs, "warps": config.num_warps, "stages": config.num_stages}
            print(json.dumps(described | built(tuner.fn, chip, types, constants | config.kwargs, config)), flush=True)


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
