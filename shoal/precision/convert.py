"""A model folder in few bits, written from another one tensor by tensor: no more than one matrix is in memory.

| form | which matrices | as |
|---|---|---|
| fp8 | all of the layers, the latents' up-projection too, as DeepSeek publishes V3 | blocks of 128 × 128 |
| int8 | all of the layers but that one, and the head | a scale a row, or a group of one |
| int4 | the same; the head in 8 bits, a scale a row | a scale a group |

Everything else keeps its precision (policy.py): embedding, norms, routers, and the projection in front of a multi-token
module, which other readers don't expect in few bits. Where a row isn't a whole number of groups, it takes the next
smaller size of group that divides it (V2-Lite's dense layer: 10,944 = 171 × 64).
"""

import math
import re
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.errors import ConfigError
from shoal.model import hf
from shoal.model.hf_config import to_hf_config
from shoal.model.hf_files import Planned, write_json, write_tensors
from shoal.model.hf_names import Piece, copies
from shoal.model.hf_quantisation import Scheme, write_fp8, write_packed
from shoal.model.hf_stored import PACKED, SCALE, SCALE_INV, SHAPE
from shoal.ops import quant
from shoal.ops.quant import BITS, FP8, FP8_BLOCK, Form, Quantised
from shoal.precision import policy

GROUPS = (128, 64, 32)
ABSORBED, HEAD = "attn.kv_up.weight", "head.weight"
WORD = FP32_BYTES = 4
ROWS = 1024  # of a matrix that are rounded at once, in whole blocks


class Kept(NamedTuple):
    """How a matrix is kept: in which form, and how many of a row's integers share a scale; None: all of them."""

    form: Form
    group: int | None = None


class Sizes(NamedTuple):
    """Bytes of a model, as written and in fp32: of all that is read into memory, and of the layers' matrices in it."""

    whole: int
    whole_fp32: int
    matrices: int
    matrices_fp32: int


Make = Callable[[Piece, Kept], Quantised]


class Source:
    """A folder to be read matrix by matrix: plain or in few bits itself."""

    def __init__(self, folder: Path | str):
        self.model, self.stored = hf.opened(folder, torch.bfloat16)
        self.pieces = list(hf.own_pieces(self.model))
        self._dtypes = {name: t.dtype for name, t in self.model.state_dict().items()}
        self._whole = {piece.ours: piece for piece in self.pieces if piece.expert is None}

    def own(self, piece: Piece) -> Piece:
        """Of a copy, the piece that it is a copy of: the folder may have no other."""
        return self._whole.get(piece.ours, piece)

    def read(self, piece: Piece, dtype: torch.dtype | None = None) -> Tensor:
        """What the piece stands for; in the dtype that it has in a bf16 model, if not in another."""
        value = torch.empty(piece.shape, dtype=dtype or self._dtypes[piece.ours])
        self.stored.copy(self.own(piece), value)
        return value

    def rounded(self, piece: Piece, how: Kept) -> Quantised:
        return rounded(self.read(piece, torch.float32), how)

    def planned(self, piece: Piece) -> Planned:
        return Planned(piece.name, self._dtypes[piece.ours], piece.shape, partial(self.read, piece))


def kept(piece: Piece, form: Form, group: int | None) -> Kept | None:
    """How a piece is kept in a folder of this form; None: in high precision. Raises ConfigError."""
    ours, K = piece.ours, piece.shape[-1]
    if ours == HEAD and form == "int4":
        form, group = "int8", None
    product = policy.of(ours).precision == "fp8"
    if not (product if form == "fp8" else (product and not ours.endswith(ABSORBED)) or ours == HEAD):
        return None
    if form == "fp8" or (group is None and K % WORD == 0):
        return Kept(form)
    sizes = [size for size in GROUPS if size <= (group or GROUPS[0]) and K % size == 0]
    if not sizes:
        raise ConfigError(f"{piece.name} with rows of {K}", f"whole groups of {group or WORD}", "choose another form")
    return Kept(form, sizes[0])


def write(
    source: Source,
    target: Path | str,
    form: Form,
    group: int | None,
    make: Make | None = None,
    max_shard_bytes: int = hf.SHARD_BYTES,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> None:
    """Write the folder. `make` says what a matrix becomes; without it, numbers are rounded to the nearest.

    Files are synced; making the folder appear at once is the caller's business. Raises ConfigError where groups don't
    fit the model's rows.
    """
    assert (form == "int4") <= (group is not None)
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    made = lru_cache(maxsize=1)(make or source.rounded)  # a matrix is asked for once a tensor
    its_own: Make = lambda piece, how: made(source.own(piece), how)  # noqa: E731
    ways = {piece.name: kept(piece, form, group) for piece in source.pieces}
    again = list(copies(source.model.config))
    ways |= {piece.name: kept(piece, form, group) for piece in again}

    def planned() -> Iterable[Planned]:
        for piece in [*source.pieces, *again]:
            how = ways[piece.name]
            yield from [source.planned(piece)] if how is None else in_few_bits(piece, how, its_own)

    write_tensors(target, planned(), max_shard_bytes)
    raw = to_hf_config(source.model.config, "bfloat16", bos_id, eos_id)
    write_json(target / "config.json", raw | {"quantization_config": described(form, ways)})
    write_json(target / "generation_config.json", hf.generation_config(bos_id, eos_id))


def sizes(source: Source, form: Form, group: int | None) -> Sizes:
    """Without the copies that files hold a second time."""
    found = [0, 0, 0, 0]
    for piece in source.pieces:
        how = kept(piece, form, group)
        parts = [source.planned(piece)] if how is None else in_few_bits(piece, how, source.rounded)
        both = sum(t.nbytes for t in parts if not t.name.endswith(SHAPE)), FP32_BYTES * math.prod(piece.shape)
        for i, n_bytes in enumerate(both):
            found[i] += n_bytes
            found[2 + i] += n_bytes if how and piece.ours != HEAD else 0
    return Sizes(*found)


def rounded(weight: Tensor, how: Kept) -> Quantised:
    """[N, K] to the nearest, some rows of blocks at a time."""
    parts = weight.split(ROWS)
    first = quant.quantise(parts[0], how.form, how.group or weight.shape[1])
    rows = -(-len(weight) // first.block[0])
    codes = torch.empty(len(weight), *first.codes.shape[1:], dtype=torch.uint8)
    scales = torch.empty(rows, *first.scales.shape[1:], dtype=first.scales.dtype)
    for i, part in enumerate(parts):
        made = quant.quantise(part, how.form, how.group or weight.shape[1])
        codes[i * ROWS :][: len(made.codes)] = made.codes.view(torch.uint8)
        scales[i * ROWS // made.block[0] :][: len(made.scales)] = made.scales
    return Quantised(how.form, codes.view(first.codes.dtype), scales, first.block)


def in_few_bits(piece: Piece, how: Kept, made: Make) -> Iterable[Planned]:
    (N, K), name = piece.shape, piece.name
    if how.form == "fp8":
        blocks = tuple(-(-n // b) for n, b in zip(piece.shape, FP8_BLOCK, strict=True))
        yield Planned(name, FP8, piece.shape, lambda: made(piece, how).codes)
        yield Planned(name + SCALE_INV, torch.float32, blocks, lambda: made(piece, how).scales)
        return
    n_words = K * BITS[how.form] // (8 * WORD)
    yield Planned(name + PACKED, torch.int32, (N, n_words), lambda: made(piece, how).codes.view(torch.int32))
    yield Planned(name + SCALE, torch.bfloat16, (N, K // (how.group or K)), lambda: made(piece, how).scales)
    yield Planned(name + SHAPE, torch.int64, (2,), lambda: torch.tensor(piece.shape))


def described(form: Form, ways: dict[str, Kept | None]) -> dict:
    """quantization_config. The commonest way holds for all linear layers, others for those they name."""
    if form == "fp8":
        return write_fp8()
    modules: dict[Kept, list[str]] = {}
    high = []
    for name, how in ways.items():
        module, _, part = name.rpartition(".")
        if how:
            modules.setdefault(how, []).append(module)
        elif part == "weight" and re.search(r"(proj\w*|mlp\.gate|head)$", module):
            high.append(module)
    *fewer, common = sorted(modules, key=lambda how: len(modules[how]))  # the first group that matches is taken
    targets = {Scheme(BITS[how.form], how.group): patterns(modules[how]) for how in fewer}
    return write_packed(targets | {Scheme(BITS[common.form], common.group): ["Linear"]}, patterns(high))


def patterns(names: Iterable[str]) -> list[str]:
    """Module names as compressed-tensors matches them, one pattern for those that differ in numbers alone."""
    return list(dict.fromkeys("re:" + re.sub(r"\d+", r"\\d+", name.replace(".", r"\.")) + "$" for name in names))
