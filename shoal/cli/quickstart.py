"""`shoal quickstart [--minutes M] [--stages all|base] [--out DIR] [--resume [RUN]] …`: a model that learns to reason.

A base model that fits this machine and your minutes is pretrained; then it learns by reinforcement alone (R1-Zero), in
R1's stages, and teaches a smaller student; all four are held against the same problems, in one report. `recipes/
quickstart.py` has the table of who gets which share of the minutes (default 15). `--steps N` instead gives every stage
N steps. `--stages base` stops after pretraining, and all the minutes (default 10) are its own.

For the base it measures for some seconds (products, bandwidth, real steps), picks model, batch and tokens, and says
why. Every flag of `shoal pretrain` is understood, for the base; a model or a batch given by one is not chosen again.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from shoal.cli import pretrain
from shoal.cli.asked import Asked, resumed, without
from shoal.errors import ConfigError
from shoal.recipes.quickstart import MINUTES, SHARES, shares
from shoal.train.config import PretrainConfig

STAGES = ("all", "base")


def main(argv: list[str]) -> int:
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    words, stages = without(argv, "--stages", "all")
    if stages not in STAGES:
        raise ConfigError(f"--stages {stages}", f"one of {', '.join(STAGES)}", "write --stages base, or leave it out")
    command = ["shoal", "quickstart", *argv]
    asked = pretrain.parse(["quickstart", *words])
    if asked.resume is not None:
        run = resumed(asked, PretrainConfig)
        table = run.pipeline()
        if not table:
            return pretrain.launch(asked, command, size=True)
        if asked.flags:
            got = f"{' '.join(asked.flags)} for a chain of stages that goes on"
            raise ConfigError(got, "the settings that it began with", "leave them out, or start a new one")
        job = chained(table["minutes"], table["steps"])
        return pretrain.launch(replace(asked, resume=str(run.path)), command, job=job)
    if stages == "base":
        return pretrain.launch(asked, command, size=True)
    return start(asked, words, command)


def start(asked: Asked, words: Sequence[str], command: Sequence[str]) -> int:
    rest, steps = without(words, "--steps", "")
    rest, minutes = without(rest, "--minutes", "" if steps else f"{MINUTES:g}")
    if steps and minutes:
        raise ConfigError(f"--steps {steps} and --minutes {minutes}", "one of the two", "leave one out")
    if steps:
        return pretrain.launch(asked, command, size=True, job=chained(None, whole(steps)))
    share = number(minutes) * shares(number(minutes))["pretrain"]
    asked = replace(
        pretrain.parse(["quickstart", *rest]),
        layers=[(f"share of {minutes} minutes", {"minutes": share, "steps": "none"})],
    )
    return pretrain.launch(asked, command, size=True, job=chained(number(minutes), None))


def chained(minutes: float | None, steps: int | None) -> pretrain.Job:
    from shoal.recipes import _chain  # now: a run that exists should say at once that it has stages
    from shoal.recipes._pipeline import Budget

    return partial(_chain.run_chain, budget=Budget(shares(minutes) if minutes else SHARES, minutes, steps))


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"--minutes {text}", "a number above 0", "write for instance --minutes 15")
    return value


def whole(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise ConfigError(f"--steps {text}", "a whole number from 1", "write for instance --steps 2")
    return int(text)
