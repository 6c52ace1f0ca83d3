"""`shoal runs ls|show|compare|report`: look at what was trained. Reads files only; the report alone draws plots."""

import argparse
import math
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from shoal.run import RUNS, Run, find, list_runs

LAST = ("train/tokens", "train/loss", "eval/bits_per_byte", "speed/tokens_per_second", "speed/mfu", "time/seconds")
HEADS: dict[str, str] = dict(zip(LAST, ("tokens", "loss", "bits/byte", "tokens/s", "mfu", "seconds")))
OF_RL = ("rl/accuracy", "rl/reward", "rl/length", "gap/k3")
UNBOUNDED = 1000
KEPT = ("train/loss", "eval/bits_per_byte", "train/tokens", "time/seconds", "speed/tokens_per_second", "speed/mfu")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal runs", description="Look at what was trained.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="ls|show|compare|report")
    verbs.add_parser("ls", help="all runs, the newest first").add_argument("--root", default=RUNS)
    name = "a run: its path, id, the start or end of its id, or latest"
    verbs.add_parser("show", help="one run").add_argument("run", nargs="?", default="latest", help=name)
    verbs.add_parser("compare", help="what differs, and how it ended").add_argument("runs", nargs="+", help=name)
    verbs.add_parser("report", help="write report.html").add_argument("run", nargs="?", default="latest", help=name)
    args = parser.parse_args(argv)
    console = Console()
    if args.verb == "ls":
        runs = list_runs(args.root)
        if runs:
            listed(runs, console)
        else:
            console.print(f"no runs under {args.root}/")
    elif args.verb == "show":
        show(find(args.run), console)
    elif args.verb == "compare":
        console.print(comparison([find(name) for name in args.runs]))
    else:
        from shoal.report import chain, page

        run = find(args.run)
        console.print(str((chain if run.pipeline() else page).write(run.path)))
    return 0


def listed(runs: list[Run], console: Console) -> None:
    """As many columns as a terminal has room for, in the order of `KEPT`, all of them elsewhere; no name is cut."""
    room = console.width if console.is_terminal else UNBOUNDED
    console.width = UNBOUNDED  # else tables are measured, and cut, by the terminal's
    tables = (tabled(runs, [name for name in LAST if name in KEPT[:n]]) for n in range(len(KEPT), -1, -1))
    fitting = (table for table in tables if console.measure(table).maximum <= room)
    console.print(next(fitting, tabled(runs, [])))


def tabled(runs: list[Run], metrics: list[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("run", "state", "step", *(HEADS[name] for name in metrics)):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", no_wrap=True)
    for run in runs:
        last = last_values(run)
        step = str(int(last["step"])) if "step" in last else "-"
        table.add_row(run.id, run.status().get("state", "?"), step, *(number(last.get(name)) for name in metrics))
    return table


def show(run: Run, console: Console) -> None:
    """Everything of one run on one screen: status, last metrics, settings that aren't defaults."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("run", str(run.path))
    table.add_row("command", (run.path / "command.txt").read_text().strip())
    for name, value in run.status().items():
        table.add_row(name, str(value))
    for name, value in last_values(run).items():
        table.add_row(name, number(value))
    if stages := run.pipeline().get("stages"):
        table.add_row("stages", ", ".join(f"{Path(row['folder']).name} {row['state']}" for row in stages))
    table.add_row("checkpoints", ", ".join(sorted(p.name for p in run.checkpoints.glob("step-*"))) or "none")
    console.print(table)


def comparison(runs: list[Run]) -> Table:
    """One column a run: settings on which they differ, then the last values of what any of them measured."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("", *(run.id for run in runs)):
        table.add_column(column, overflow="fold")
    settings = [flat(tomllib.loads((run.path / "config.toml").read_text())) for run in runs]
    for key in sorted(set().union(*settings)):
        values = [str(s.get(key, "-")) for s in settings]
        if len(set(values)) > 1:
            table.add_row(key, *values)
    table.add_section()
    lasts = [last_values(run) for run in runs]
    solved = [number(run.status().get("pass_at_1")) for run in runs]
    rows = [(name, [number(last.get(name)) for last in lasts]) for name in ("step", *LAST, *OF_RL)]
    for name, values in [*rows, ("held-out problems solved", solved)]:
        if set(values) != {"-"}:
            table.add_row(name, *values)
    return table


def last_values(run: Run) -> dict[str, float]:
    """The latest value of every metric."""
    last: dict[str, float] = {}
    for line in run.metrics():
        last |= line
    return last


def flat(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= flat(value, f"{path}{name}.") if isinstance(value, Mapping) else {path + name: value}
    return found


def number(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int) or (math.isfinite(value) and value == int(value)):
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
