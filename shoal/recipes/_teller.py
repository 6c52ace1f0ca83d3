"""How a job speaks to whoever started it; the command line decides how that looks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Teller:
    """`say` a sentence, `show` a line of metrics."""

    say: Callable[[str], None]
    show: Callable[[Mapping[str, float]], None]
