"""`quantization_config`, both ways: in which few bits the matrices of a folder are. Torch-free.

    quant_method fp8                  DeepSeek's: E4M3, an fp32 scale for each block of 128 × 128 (V3, section 3.3.2)
    quant_method compressed-tensors   format pack-quantized: 4 or 8 bits, symmetric, a scale a row or a group of a row

Which matrices are quantised, and how, is read from the tensors, and must be one of the ways that are described here.
Refused by name: what would change the arithmetic (zero points, quantised activations or caches, rotations, columns out
of order) and all other methods.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from shoal.errors import ModelError
from shoal.model.hf_config import FIX, WIDEST, Fields

METHODS = ("fp8", "compressed-tensors")
BITS = (4, 8)


@dataclass(frozen=True)
class BlockScaled:
    """FP8 with one scale for each block of so many rows and columns."""

    block: tuple[int, int]


@dataclass(frozen=True)
class Scheme:
    """Integers of so many bits, `group` numbers of a row to a scale; None: the whole row."""

    bits: int
    group: int | None


@dataclass(frozen=True)
class PackedIntegers:
    """Integers in 32-bit words, in one of these ways."""

    schemes: frozenset[Scheme]


Quantisation = BlockScaled | PackedIntegers


def read_quantisation(raw: dict) -> Quantisation | None:
    """What config.json says of a folder's bits; None where it is not quantised. Raises ModelError."""
    q = raw.get("quantization_config")
    if q is None:
        return None
    if not isinstance(q, dict):
        raise Fields(raw).bad("quantization_config", "an object")
    if Fields(q).word("quant_method", "absent", METHODS) == "fp8":
        return BlockScaled(read_fp8_block(q))
    return PackedIntegers(frozenset(read_schemes(q)))


def read_fp8_block(q: dict) -> tuple[int, int]:
    Fields(q).word("fmt", "e4m3", ("e4m3",))
    Fields(q).word("scale_fmt", "float", ("float", "ue8m0"))  # the values say it: ue8m0 are powers of two
    block = q.get("weight_block_size")
    if not isinstance(block, list) or len(block) != 2 or not all(type(n) is int and 0 < n <= WIDEST for n in block):
        raise Fields(q).bad("weight_block_size", "rows and columns of a block, such as [128, 128]")
    return block[0], block[1]


def read_schemes(q: dict) -> Iterable[Scheme]:
    f = Fields(q)
    f.word("format", "absent", ("pack-quantized",))
    f.word("quantization_status", "compressed", ("compressed",))
    for key in ("kv_cache_scheme", "sparsity_config", "transform_config"):
        if q.get(key):
            raise f.bad(key, "nothing")
    groups = f.given("config_groups", {})
    if not isinstance(groups, dict) or not groups:
        raise f.bad("config_groups", "at least one group of layers")
    for name, group in groups.items():
        if not isinstance(group, dict) or not isinstance(group.get("weights"), dict):
            raise f.bad("config_groups", f"for {name[:80]} how its weights are quantised")
        g = Fields(group)
        g.word("format", "pack-quantized", ("pack-quantized",))
        for key in ("input_activations", "output_activations"):
            if group.get(key):
                raise g.bad(key, "null: activations are not quantised")
        yield read_scheme(Fields(group["weights"]))


def read_scheme(w: Fields) -> Scheme:
    w.must_be("type", "int")
    w.must_be("symmetric", True)
    w.must_be("dynamic", False)
    w.word("actorder", "static", ("static", "weight"))
    bits = w.whole("num_bits", 1, 64)
    if bits not in BITS:
        raise w.bad("num_bits", "4 or 8")
    strategy = w.word("strategy", "absent", ("group", "channel"))
    return Scheme(bits, w.whole("group_size", 1, WIDEST) if strategy == "group" else None)


def write_fp8() -> dict:
    """As DeepSeek publishes V3 and R1."""
    method = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    return method | {"weight_block_size": [128, 128]}


def write_packed(schemes: dict[Scheme, list[str]], ignored: list[str]) -> dict:
    """As compressed-tensors reads it; `schemes` by the names of the modules they hold for."""
    groups = {}
    for i, (scheme, targets) in enumerate(schemes.items()):
        weights = {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": True,
            "strategy": "group" if scheme.group else "channel",
            "group_size": scheme.group,
            "dynamic": False,
        }
        groups[f"group_{i}"] = {
            "targets": targets,
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "pack-quantized",
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def unknown(got: str) -> ModelError:
    return ModelError(got, "one of the ways that quantization_config describes", FIX)
