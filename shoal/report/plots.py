"""Curves as geometry: from series of numbers to polylines, ticks and what the pointer shows. No drawing library.

A chart is an SVG stretched to its box, with lines that keep their width, under labels set in the page's own type. So it
stays sharp and legible from a phone to paper, follows the page's colours, works without a script, and costs no import.
The template draws; here everything is a number between 0 and 100, the percent of the plot's width or height from the
top left corner.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import ceil, cos, floor, log2, log10, pi, sin

Points = Sequence[tuple[float, float]]

MAX_POINTS = 400  # a line as wide as a page shows no more
HOVER_ZONES = 60


@dataclass(frozen=True)
class Line:
    """A named series; `faint` draws the raw values under a smoothed line, `dots` marks each of few points, `band` are
    (x, low, high) around it."""

    name: str
    points: Points
    colour: str  # one of the template's: a, b, c
    faint: Points = ()
    dots: bool = False
    band: Sequence[tuple[float, float, float]] = ()


@dataclass(frozen=True)
class Mark:
    """A horizontal yardstick at `y`."""

    name: str
    y: float


@dataclass(frozen=True)
class Tick:
    at: float  # percent
    text: str
    below: str = ""


@dataclass(frozen=True)
class Zone:
    """A strip the pointer may enter: what to say, and where the line stands."""

    left: float
    width: float
    at: float
    title: str
    values: list[tuple[str, str, str, float]]  # colour, name, value, percent from the top

    @property
    def inside(self) -> float:
        """`at` as a percent of the strip's own width."""
        return 100 * (self.at - self.left) / self.width if self.width else 0.0


@dataclass
class Chart:
    title: str
    about: str
    lines: list[Line]
    x_unit: str
    format_y: Callable[[float], str] = "{:.3g}".format
    format_tick: Callable[[float], str] | None = None  # where ticks need fewer digits than values
    marks: list[Mark] = field(default_factory=list)
    y_range: tuple[float, float] | None = None
    second_axis: Callable[[float], str] | None = None  # what to print under an x tick
    ticks: Sequence[float] | None = None  # of x, where round numbers won't do
    format_x: Callable[[float], str] | None = None  # for these, and for the pointer

    def __post_init__(self):
        xs = [x for line in self.lines for x, _ in line.points]
        self.x_low, self.x_high = min(xs, default=0.0), max(xs, default=1.0)
        if not self.ticks and self.x_low < 0.2 * self.x_high:
            self.x_low = min(self.x_low, 0.0)
        ys = [y for line in self.lines for _, y in line.points] + [m.y for m in self.marks]
        low, high = self.y_range or (min(ys, default=0.0), max(ys, default=1.0))
        room = 0.06 * (high - low) or abs(high) * 0.05 or 1.0
        self.y_low, self.y_high = (low if low == 0 else low - room), high + room

    def x(self, value: float) -> float:
        return 100 * (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)

    def y(self, value: float) -> float:
        return 100 * (self.y_high - value) / ((self.y_high - self.y_low) or 1.0)

    def path(self, points: Points) -> str:
        """SVG polyline points in a box of 1000 × 1000; what lies outside the box is cut off there."""
        return " ".join(f"{10 * self.x(x):.1f},{10 * clamp(self.y(y), -50, 150):.1f}" for x, y in thinned(points))

    def area(self, band: Sequence[tuple[float, float, float]]) -> str:
        """The polygon between the ends of a band, in the same box."""
        return self.path([(x, low) for x, low, _ in band] + [(x, high) for x, _, high in reversed(band)])

    @property
    def x_ticks(self) -> list[Tick]:
        if self.ticks is not None and self.format_x:
            middle = len(self.ticks) // 2
            return [Tick(self.x(v), self.format_x(v), self.x_unit * (i == middle)) for i, v in enumerate(self.ticks)]
        second = self.second_axis or (lambda _: "")
        values = nice(self.x_low, self.x_high, 5)
        return [Tick(self.x(v), f"{v:,g} {self.x_unit}" if v else "0", second(v) if v else "") for v in values]

    @property
    def y_ticks(self) -> list[Tick]:
        return [Tick(self.y(v), (self.format_tick or self.format_y)(v)) for v in nice(self.y_low, self.y_high, 5)]

    @property
    def zones(self) -> list[Zone]:
        """Strips about as wide as the pointer is precise, each saying the nearest value of every line."""
        longest = max((line.points for line in self.lines), key=len, default=())
        xs = [x for x, _ in thinned(longest, HOVER_ZONES)]
        edges = [self.x_low, *((a + b) / 2 for a, b in pairwise(xs)), self.x_high]
        return [self.zone(x, left, right) for x, left, right in zip(xs, edges, edges[1:])]

    def zone(self, x: float, left: float, right: float) -> Zone:
        below = f" · {self.second_axis(x)}" if self.second_axis else ""
        values = []
        for line in self.lines:
            y = nearest(line.points, x)[1]
            values.append((line.colour, line.name, self.format_y(y), clamp(self.y(y), 0, 100)))
        title = f"{self.format_x(x) if self.format_x else f'{x:.3g}'} {self.x_unit}{below}"
        return Zone(self.x(left), self.x(right) - self.x(left), self.x(x), title, values)


def nice(low: float, high: float, about: int) -> list[float]:
    """Round numbers inside [low, high], roughly `about` of them: steps of 1, 2, 2.5 or 5 times a power of ten."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
        return [low]
    raw = (high - low) / about
    power = 10.0 ** floor(log10(raw))
    step = power * next((m for m in (1, 2, 2.5, 5) if m * power >= raw * 0.999), 10)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thinned(points: Points, most: int = MAX_POINTS) -> Points:
    """At most `most` of the points, evenly chosen, the last one always among them."""
    if len(points) <= most:
        return points
    return [points[round(i * (len(points) - 1) / (most - 1))] for i in range(most)]


def smoothed(points: Points, share: float = 0.02) -> Points:
    """The mean over a window of `share` of the series around each point, narrower towards the ends: it never lags."""
    sums = [0.0, *accumulate(y for _, y in points)]
    result, half = [], int(share * len(points) / 2)
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        result.append((x, (sums[i + reach + 1] - sums[i - reach]) / (2 * reach + 1)))
    return result


def nearest(points: Points, x: float) -> tuple[float, float]:
    at = bisect_left(points, (x,))
    return min(points[max(0, at - 1) : at + 1], key=lambda p: abs(p[0] - x))


def interpolated(points: Points, x: float) -> float:
    """The value at `x` on the line through the points, held constant beyond its ends."""
    at = bisect_left(points, (x,))
    if at == 0 or at == len(points):
        return points[min(at, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[at - 1], points[at]
    return y0 + (y1 - y0) * (x - x0) / ((x1 - x0) or 1.0)


def clamp(value: float, low: float, high: float) -> float:
    return max(low, min(high, value))


def sparkline(points: Points, width: int = 48) -> str:
    """The shape of a series in block characters, for where there is only text."""
    ys = [y for _, y in thinned(points, width)]
    low, high = min(ys), max(ys)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (y - low) / ((high - low) or 1.0))] for y in ys)


def fish(i: int, n: int) -> dict[str, float]:
    """Place i of n in a school, on a sunflower's spiral: x and y in percent, heading in degrees, width in percent."""
    radius, angle = ((i + 0.5) / n) ** 0.5, i * pi * (3 - 5**0.5)
    x, y = 50 + 42 * radius * cos(angle), 50 + 40 * radius * sin(angle)
    width = min(40.0, 68 / n**0.5) * (1.15 - 0.35 * radius)
    return {"x": round(x, 2), "y": round(y, 2), "turn": round(14 * sin(3 * angle) - 6, 1), "width": round(width, 2)}


def heat_cell(share: float) -> dict[str, float | str]:
    """A cell's side of a fair share and how strongly to colour it: full at twice or half of it."""
    strength = min(1.0, abs(log2(share))) if share > 0 else 1.0
    return {"side": "over" if share > 1 else "under", "strength": round(strength, 3), "share": share}
