"""Which implementation of each operation runs: the reference, or a fast twin where the machine has one."""

from shoal.ops.reference import (
    gather_rows,
    grouped_linear,
    rms_norm,
    rotate_halves,
    rotate_pairs,
    sort_by_expert,
    swiglu,
    weigh_rows,
)

__all__ = [
    "gather_rows",
    "grouped_linear",
    "rms_norm",
    "rotate_halves",
    "rotate_pairs",
    "sort_by_expert",
    "swiglu",
    "weigh_rows",
]
