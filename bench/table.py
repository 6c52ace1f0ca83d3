"""Aligned columns on a terminal."""

from collections.abc import Sequence
from itertools import zip_longest


def show(header: Sequence[str], rows: Sequence[Sequence]) -> None:
    """The first column to the left, the others to the right; floats with four significant digits. Rows may be short."""
    cells = [list(header)] + [[text(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*cells, fillvalue="")]
    for row in cells:
        print("  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip())


def text(value) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
