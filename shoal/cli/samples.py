"""`shoal samples RUN`: what a model answered, and what that was worth.

Answers that a run of `shoal rl` learnt from (those it kept of each step), or the attempts of an evaluation. A run of
several stages shows those of the model that `shoal chat` opens; another stage's go by its folder, RUN/stages/1_r1_zero.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.text import Text

from shoal.cli.screen import harmless
from shoal.errors import ConfigError, RunError
from shoal.report import dialogues
from shoal.report.dialogues import Dialogue
from shoal.run import find

SHOWN = 8
OUTCOMES = {"right": "bold green", "wrong": "bold red", "failed": "bold yellow"}
SURPRISES = ((-0.1, ""), (-0.7, "yellow"), (-2.3, "dark_orange3"), (-float("inf"), "bold red"))  # down to 90%, 50%, 10%
FAR_RATIO = 0.05  # π / π_engine this far from 1 is worth a colour


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.most < 0:
        raise ConfigError(f"--most {args.most}", "a number from 0", "0 shows all")
    path = source(folder_of(args.run), args.eval)
    found, damaged = chosen(path, args)
    shown = found[: args.most or None]
    if args.json:
        for d in shown:
            print(d.raw)
        return 0
    console = Console(highlight=False, soft_wrap=True)
    prompt = None
    for d in shown:
        if (d.step, d.prompt) != prompt:
            heading(console, d)
        prompt = d.step, d.prompt
        tokens(console, d) if args.tokens else answer(console, d)
    console.print(Text(ending(path, len(shown), len(found), damaged), "dim italic"))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="shoal samples", description="What a model answered, and what it was worth.")
    about = "its path, id, or latest; or a folder that `shoal eval --out` wrote"
    parser.add_argument("run", nargs="?", default="latest", metavar="RUN", help=about)
    parser.add_argument("--step", type=int, metavar="N", help="of training; default: the last one that was kept")
    parser.add_argument("--task", metavar="NAME", help="of this task alone")
    outcome = parser.add_mutually_exclusive_group()
    outcome.add_argument("--right", dest="outcome", action="store_const", const="right", help="right answers alone")
    outcome.add_argument("--wrong", dest="outcome", action="store_const", const="wrong", help="wrong answers alone")
    parser.add_argument("--index", type=int, metavar="I", help="of the prompt, as shown behind its #")
    parser.add_argument("--tokens", action="store_true", help="a line a token: its log-probability and ratio")
    parser.add_argument("--eval", metavar="NAME", help="the attempts of this evaluation")
    parser.add_argument(
        "--most", type=int, default=SHOWN, metavar="N", help=f"answers to show, 0 for all; default {SHOWN}"
    )
    parser.add_argument("--json", action="store_true", help="the lines as they are kept")
    return parser.parse_args(argv)


def folder_of(name: str) -> Path:
    """Of a run, or of what `shoal eval --out DIR` wrote. Raises RunError."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.toml").exists() and any(folder.glob("*.jsonl")):
        return folder
    return find(name).of_model().path


def source(run: Path, evaluation: str | None) -> Path:
    """The file to read. Raises RunError where there is none, ConfigError for the name of none."""
    found = dialogues.sources(run)
    if not found:
        expected = f"samples/{dialogues.ROLLOUTS} of a `shoal rl` run, or evals/*.jsonl"
        raise RunError(f"{run} has kept no answers", expected, "try `shoal eval RUN --tasks countdown`")
    if evaluation is None:
        return found[0]
    named = {path.stem: path for path in found if path.name != dialogues.ROLLOUTS}
    if evaluation not in named:
        got = f"no evaluation {evaluation!r} in {run}"
        raise ConfigError(got, ", ".join(named) or "none was made", "choose one of them, or leave --eval out")
    return named[evaluation]


def chosen(path: Path, args: argparse.Namespace) -> tuple[list[Dialogue], int]:
    """What was asked for, in order, and how many lines can't be read. Of a step that was repeated the last is kept."""
    damaged, latest = 0, None
    found: dict[tuple, Dialogue] = {}
    tasks: set[str] = set()
    for d in dialogues.read(path):
        if d is None:
            damaged += 1
            continue
        latest = max(latest or 0, d.step) if d.step is not None else latest
        tasks.add(d.task)
        if wanted(d, args) and (args.step is not None or d.step == latest):
            found[(*d.place, d.budget)] = d
    if args.step is None and latest is not None:
        found = {place: d for place, d in found.items() if d.step == latest}
    if not found:
        got = f"no such answers in {path}" + (f", whose last step is {latest}" if latest is not None else "")
        expected = f"some of the tasks {', '.join(sorted(tasks)) or '(none yet)'}"
        raise ConfigError(got, expected, "ask for less: fewer of --step --task --right --wrong --index")
    return list(found.values()), damaged


def wanted(d: Dialogue, args: argparse.Namespace) -> bool:
    asked = (args.step, d.step), (args.task, d.task), (args.outcome, d.outcome), (args.index, d.index)
    return all(want is None or want == is_ for want, is_ in asked)


def heading(console: Console, d: Dialogue) -> None:
    words = [f"step {d.step}"] * (d.step is not None) + [f"#{d.index}", f"{d.task} {d.level or ''}".strip()]
    console.print(Text("\n" + " · ".join(words), "dim"))
    console.print(Text(harmless(d.prompt), "bold cyan"))
    if d.expected:
        console.print(Text(f"expected: {harmless(d.expected)}", "dim"))


def answer(console: Console, d: Dialogue) -> None:
    console.print(verdict(d))
    if d.thinking:
        console.print(Text(harmless(d.thinking), "dim"))
    console.print(Text(harmless(d.said)))


def verdict(d: Dialogue) -> Text:
    facts = [] if d.budget is None else [f"budget {d.budget}"]
    facts += [f"{name} {x:+.2f}" for name, x in (("reward", d.reward), ("advantage", d.advantage)) if x is not None]
    line = Text(f"\n{d.outcome or 'not graded'}", OUTCOMES.get(d.outcome, "bold"))
    return line.append("  " + "  ".join(facts), "not bold default") if facts else line


def tokens(console: Console, d: Dialogue) -> None:
    """A line each. What the file doesn't have of a token is left empty."""
    console.print(verdict(d))
    if not d.tokens:
        console.print(Text("(its tokens were not kept)", "dim"))
    for number, (token, logprob, ratio) in enumerate(rows(d)):
        line = Text().append(f"{number:5}  ", "dim")
        line.append(f"{logprob:9.4f}" if logprob is not None else " " * 9, surprise(logprob))
        line.append(f"  {ratio:7.4f}" if ratio is not None else " " * 9, far(ratio))
        console.print(line.append("  " + harmless(repr(token)[1:-1]), surprise(logprob)))


def rows(d: Dialogue) -> Iterator[tuple[str, float | None, float | None]]:
    for i, token in enumerate(d.tokens):
        yield token, at(d.logprobs, i), at(d.ratios, i)


def at(values: list[float], i: int) -> float | None:
    return values[i] if i < len(values) else None


def surprise(logprob: float | None) -> str:
    return "" if logprob is None else next(style for bound, style in SURPRISES if logprob >= bound)


def far(ratio: float | None) -> str:
    return "" if ratio is None or abs(ratio - 1) < FAR_RATIO else "bold magenta"


def ending(path: Path, shown: int, found: int, damaged: int) -> str:
    words = [f"\n{shown} of {found} answers in {path}"]
    words += ["--most 0 shows all"] * (shown < found)
    words += [f"{damaged} damaged line{'s' * (damaged > 1)} left out"] * bool(damaged)
    return "; ".join(words)
