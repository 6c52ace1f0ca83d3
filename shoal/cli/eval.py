"""`shoal eval MODEL --tasks countdown`: held-out problems, tried many times, at several budgets of thinking."""

import argparse
import json
import re
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.cli.generate import check
from shoal.cli.opened import DTYPES, MODEL_HELP, Opened, end_ids, open_model
from shoal.cli.score import WINDOW, read_text, score
from shoal.errors import ConfigError
from shoal.run import replace_text

if TYPE_CHECKING:
    from shoal.tasks.task import Item

FREE, NAME = "free", "tasks"
ANSWER_ROOM, LEAST_ROOM = 256, 1024  # tokens: behind the largest budget, and of a completion, where nothing is said


def main(argv: list[str]) -> int:
    args = parse(argv)
    check(args)
    if not args.tasks and not args.text:
        raise ConfigError("neither --tasks nor --text", "something to evaluate", "try --tasks countdown")
    text = read_text(args.text) if args.text else ""
    items = chosen(args)
    opened = open_model(args.model, args.dtype, args.threads)
    folder, step = place(opened.folder, args.out)
    found: dict = {}
    if args.tasks:
        found = evaluated(opened, items, folder, step, args)
    if text:
        found["text"] = text_record(opened, text, folder, step, args)
    if args.json:
        print(json.dumps(found))
    elif folder:
        print(f"written to {folder}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="shoal eval", description="How well a model solves held-out problems.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--tasks", default="", help="names with commas between them")
    parser.add_argument("--levels", type=levels, metavar="1,2", help="of difficulty; default: all that the tasks have")
    how_many = parser.add_mutually_exclusive_group()
    how_many.add_argument("--items", type=int, default=200, help="problems in all; default 200")
    how_many.add_argument("--whole", action="store_true", help="all problems of files, not only the held-out eighth")
    parser.add_argument("--samples", type=int, default=1, help="attempts at each; default 1")
    parser.add_argument(
        "--budgets", type=budgets, default=[None], metavar="0,64,free",
        help="tokens of thinking after which an answer is demanded; default: free, never",
    )  # fmt: skip
    parser.add_argument("--at-least", type=int, default=0, metavar="N", help="thoughts that end before go on")
    parser.add_argument("--max-tokens", type=int, help="of a whole completion; default: what the budgets need")
    parser.add_argument("--temperature", type=float, default=0.6, help="0 is greedy; default 0.6")
    parser.add_argument("--top-p", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--seed", type=int, default=0, help="of the problems and the attempts; default 0")
    parser.add_argument("--text", type=Path, metavar="FILE", help="bits per byte of this text, too")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights; default bfloat16")
    parser.add_argument("--threads", type=int, help="default: one a core")
    parser.add_argument("--name", default=NAME, help=f"of the files, and in the report; default {NAME}")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the files; default: evals/ of MODEL's run")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    return parser.parse_args(argv)


def levels(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def budgets(text: str) -> list[int | None]:
    return [None if word.strip() == FREE else int(word) for word in text.split(",")]


def chosen(args: argparse.Namespace) -> "list[Item]":
    if not args.tasks:
        return []
    from shoal.evals.harness import problems
    from shoal.evals.scaling import MOST_ATTEMPTS
    from shoal.tasks.catalog import resolve

    if args.items < 1:
        raise ConfigError(f"--items {args.items}", "1 or more", "ask for a problem")
    if not 1 <= args.samples <= MOST_ATTEMPTS:
        raise ConfigError(f"--samples {args.samples}", f"1 to {MOST_ATTEMPTS}", "16 say much already")
    tasks = resolve(args.tasks)
    if not args.whole:
        return problems(tasks, args.items, args.seed, args.levels)
    if without := [task.name for task in tasks if not task.items]:
        got, fix = f"--whole with {', '.join(without)}", "evaluate those alone, without --whole"
        raise ConfigError(got, "tasks that are files, like math:FILE", fix)
    found = [item for task in tasks for item in task.items if args.levels is None or item.level in args.levels]
    if not found:
        raise ConfigError(f"--levels {args.levels}", "levels that the files have", "leave it out")
    return found


def place(model: Path, out: Path | None) -> tuple[Path | None, int | None]:
    """Where files go, and the step that made the model: known for a checkpoint of a run."""
    run, step = model.resolve().parent.parent, re.fullmatch(r"step-(\d+)", model.resolve().name)
    inside = step is not None and (run / "config.toml").is_file()
    return out or (run / "evals" if inside else None), int(step[1]) if step else None


def evaluated(opened: Opened, items: "list[Item]", folder: Path | None, step: int | None, args) -> dict:
    from shoal.engine.engine import LocalEngine
    from shoal.evals import record
    from shoal.evals.harness import Rules, sweep
    from shoal.tasks.grading import Graders

    given = [budget for budget in args.budgets if budget is not None]
    max_tokens = args.max_tokens or max(LEAST_ROOM, max(given, default=0) + ANSWER_ROOM)
    rules = Rules(args.samples, args.temperature, args.top_p, max_tokens, args.at_least, seed=args.seed)
    ends = end_ids(opened.folder, opened.model.config.vocab_size)
    with closing(LocalEngine(opened.model, unchanged=opened.unchanged)) as engine, Graders() as graders:
        attempts = sweep(engine, opened.tokenizer, items, graders, rules, args.budgets, ends)
        failures = dict(graders.failures)
    curve = list(zip(args.budgets, attempts))
    name = ", ".join(dict.fromkeys(item.task for item in items)) if args.name == NAME else args.name
    found = record.record(name, curve, rules, step, "problems" if args.whole else "held-out problems")
    if folder:
        record.write(folder, args.name, found, curve)
    if not args.json:
        print(aligned(table(found)))
        for task, why in failures.items():
            print(f"the grader of {task} failed, last because: {why}")
    return found


def table(found: dict) -> list[list[str]]:
    """Rows of words, the head first: of each task and level, a row a budget. Columns that say nothing are left out."""
    samples = found["rules"]["samples"]
    head = ["task", "level", "budget", "problems", "pass@1", "95%", f"pass@{samples}", f"cons@{samples}"]
    rows = [[*head, "thinking", "failed"]]
    for points in zip(*(point["rows"] for point in found["budgets"])):
        rows += [cells(row, point["budget"], samples) for row, point in zip(points, found["budgets"])]
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows]


def cells(row: dict, budget: int | None, samples: int) -> list[str]:
    """One row. A k below the samples, because attempts couldn't be graded, is said."""
    k = row["k"][-1] if row["k"] else 0
    fewer = f" @{k}" if k < samples else ""
    return [
        row["task"] or "all",
        "all" if row["level"] is None else str(row["level"]),
        FREE if budget is None else str(budget),
        str(row["items"]),
        f"{row['accuracy']:.1%}" if k else "-",
        "{:.1%}–{:.1%}".format(*row["interval"]) if k else "-",
        f"{row['pass_at_k'][-1]:.1%}{fewer}" if k > 1 else "",
        f"{row['cons_at_k'][-1]:.1%}{fewer}" if k > 1 else "",
        f"{row['thinking_tokens']:.1f}",
        str(row["failed"] or ""),
    ]


def aligned(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(word.ljust(w) if i == 0 else word.rjust(w) for i, (word, w) in enumerate(zip(row, widths)))
        for row in rows
    )


def text_record(opened: Opened, text: str, folder: Path | None, step: int | None, args) -> dict:
    """Bits per byte of a text; text.json beside the others."""
    result = score(opened, text, min(opened.model.config.max_positions, WINDOW))
    found = {
        "name": args.text.name, "metric": "bits_per_byte", "value": result["bits_per_byte"], "better": "lower",
        "step": step, "measured_on": f"{result['bytes']:,} bytes",
    }  # fmt: skip
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(folder / "text.json", json.dumps(found, indent=1) + "\n")
    if not args.json:
        print(f"{args.text}: {found['value']:.4f} bits per byte of {found['measured_on']}")
    return found
