"""The charts of a report, each made from the metrics it needs or left out where they were not recorded."""

from shoal.report.facts import Facts
from shoal.report.plots import Chart, Line, Mark, Points, interpolated, smoothed
from shoal.report.words import short


def loss(f: Facts) -> Chart | None:
    """Next-token loss and that of the multi-token modules, without the first moments that would flatten the rest."""
    lines = [
        Line(name, smoothed(raw), colour, faint=raw)
        for name, metric, colour in (("next token", "train/loss", "a"), ("token after next", "train/mtp_loss", "b"))
        if (raw := over_time(f, metric))
    ]
    if not lines:
        return None
    low = min(y for line in lines for _, y in line.points)
    high = max(line.points[len(line.points) // 25][1] for line in lines)
    start = max(y for line in lines for _, y in line.points[:1])
    off = f" The start, from {start:.1f} down, is off the chart." if start > 1.1 * high else ""
    about = f"Nats a token on the training text, smoothed over its raw values.{off}"
    return Chart(
        "Training loss",
        about,
        lines,
        **axis(f),
        format_y="{:.2f}".format,
        format_tick="{:g}".format,
        y_range=(low, high),
    )


def held_out(f: Facts) -> Chart | None:
    points = over_time(f, "eval/bits_per_byte")
    if not points:
        return None
    low, high = min(y for _, y in points), max(y for _, y in points)
    marks = [Mark(name, y) for name, y in f.yardsticks().items() if y < 2 * high]
    about = "Bits needed for a byte of text the model never saw: 8 is knowing nothing, lower is better."
    line = Line("held out", points, "a", dots=len(points) <= 60)
    low, high = min([low, *(m.y for m in marks)]), max([high, *(m.y for m in marks)])
    return Chart(
        "Held-out text",
        about,
        [line],
        **axis(f),
        format_y="{:.2f}".format,
        format_tick="{:g}".format,
        marks=marks,
        y_range=(low, high),
    )


def balance(f: Facts) -> Chart | None:
    points = over_time(f, "moe/load_max_over_mean")
    if not points:
        return None
    about = "Load of the busiest expert over the mean of all; 1 is perfect balance."
    lines = [Line("busiest expert", smoothed(points), "c", faint=points)]
    high = max(y for _, y in smoothed(points))
    return Chart(
        "Expert balance",
        about,
        lines,
        **axis(f),
        format_y="{:.2f}×".format,
        format_tick="{:g}×".format,
        y_range=(1.0, high),
    )


def speed(f: Facts) -> Chart | None:
    points = over_time(f, "speed/tokens_per_second")
    if not points:
        return None
    lines = [Line("tokens a second", smoothed(points, 0.01), "a", faint=points)]
    high = max(y for _, y in smoothed(points, 0.01))
    return Chart(
        "Throughput",
        "Tokens trained a second, pauses for evaluation left out.",
        lines,
        **axis(f),
        format_y="{:,.0f}".format,
        format_tick=short,
        y_range=(0.0, high),
    )


def utilisation(f: Facts) -> Chart | None:
    points = over_time(f, "speed/mfu")
    if not points:
        return None
    about = "Share of the best plain matrix product measured on this machine that the model's own FLOPs reach."
    lines = [Line("MFU", smoothed(points, 0.01), "b", faint=points)]
    high = max(y for _, y in smoothed(points, 0.01))
    return Chart("Model FLOPs utilisation", about, lines, **axis(f), format_y="{:.0%}".format, y_range=(0.0, high))


def acceptance(f: Facts) -> Chart | None:
    points = over_time(f, "eval/mtp_accept")
    if not points:
        return None
    about = "How often the token guessed one further ahead is the one the model would choose: free speed when serving."
    lines = [Line("second token accepted", smoothed(points), "b", faint=points)]
    high = max(y for _, y in smoothed(points))
    return Chart("Second token", about, lines, **axis(f), format_y="{:.0%}".format, y_range=(0.0, high))


ALL = (loss, held_out, acceptance, balance, speed, utilisation)


def over_time(f: Facts, metric: str) -> Points:
    """The series against minutes of training where time was recorded, else against steps."""
    clock = f.series.get("time/seconds")
    points = f.series.get(metric, [])
    return [(interpolated(clock, step) / 60, y) for step, y in points] if clock else points


def axis(f: Facts) -> dict:
    """What stands on the x axis: minutes, and under them the tokens read by then."""
    clock, tokens = f.series.get("time/seconds"), f.series.get("train/tokens")
    if not clock:
        return {"x_unit": "steps"}
    if not tokens:
        return {"x_unit": "min"}
    by_minute = [(interpolated(clock, step) / 60, n) for step, n in tokens]
    return {"x_unit": "min", "second_axis": lambda x: f"{short(interpolated(by_minute, x))} tokens"}
