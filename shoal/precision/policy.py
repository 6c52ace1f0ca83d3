"""Which part of a model is computed and kept in which precision when it trains in 8 bits, and why. Torch-free.

DeepSeek-V3 (arXiv 2412.19437, section 3.3.1) multiplies in 8 bits where the time and the memory are, in the matrices of
blocks, and leaves high what is cheap or fragile. Names are those of `state_dict`, `*` standing for any part; the first
row that fits a weight holds. What serves weights in few bits chooses by the same table.
"""

from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

Precision = Literal["fp8", "bf16", "fp32"]


class Row(NamedTuple):
    names: str
    precision: Precision  # of the operands in its products
    kept: str  # of its input, for backward
    why: str


TABLE = (
    Row("embed.weight", "bf16", "-", "a lookup, no product; every row counts for itself"),
    Row("head.weight", "bf16", "bf16", "its errors go straight into the loss; published in bf16"),
    Row("*norm.weight", "fp32", "bf16", "a vector: costs nothing, and scales all that follows"),
    Row("*router.weight", "fp32", "fp32", "near ties decide who computes: rounding would send tokens elsewhere"),
    Row("mtp.*.proj.weight", "bf16", "bf16", "joins two streams of different size; published in bf16"),
    Row("*bias", "bf16", "-", "added, not multiplied"),
    Row("*attn.out.weight", "fp8", "e5m6", "attention's output, which its own backward reads too: two more bits"),
    Row("*attn.*.weight", "fp8", "fp8", "a product of the block"),
    Row("*.gate*", "fp8", "fp8", "a product of the block"),
    Row("*.up.weight", "fp8", "fp8", "a product of the block"),
    Row("*.down*", "fp8", "fp8", "its input is SwiGLU's output, recomputed from gate and up, which are kept"),
)


def of(name: str) -> Row:
    """The row that decides about this weight. Everything without one (scores and sums of attention) stays bf16."""
    return next(row for row in TABLE if fnmatchcase(name, row.names))
