"""What a verb that trains was asked: its recipe, the layers of its settings, the run it goes on with.

    shoal VERB [RECIPE] [-c file.toml] [--dotted.key value …] [--out DIR] [--resume [RUN]] [--dry-run] [--print-config]

A recipe is a module of `shoal/recipes` whose `recipe()` is annotated with the settings it returns; so each verb knows
its own. Settings are layered: the recipe, then each -c file, then flags. A resumed run keeps those it was started with;
only how long it goes, evaluates and saves may be changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from shoal import config as configs
from shoal.errors import ConfigError, RunError
from shoal.run import Run, find, list_runs

C = TypeVar("C")
RECIPES = Path(__file__).parent.parent / "recipes"
BUDGETS = ("minutes", "steps")  # giving one unsets the others
MAY_CHANGE = ("steps", "minutes", "epochs", "eval.", "checkpoint.")  # of a run that is resumed


@dataclass
class Asked:
    recipe: str | None = None
    files: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    resume: str | None = None  # a run's name; "" is the newest
    out: str | None = None
    dry_run: bool = False
    print_config: bool = False
    layers: list[tuple[str, dict]] = field(default_factory=list)  # a verb's own, below the files


def parse(argv: Sequence[str], budgets: Sequence[str] = BUDGETS) -> Asked:
    """Our own few flags; every other `--key value` belongs to the config."""
    asked, words = Asked(), list(argv)
    if words and not words[0].startswith("-"):
        asked.recipe = words.pop(0)
    while words:
        word = words.pop(0)
        if word in ("--dry-run", "--print-config"):
            setattr(asked, word[2:].replace("-", "_"), True)
        elif word == "--resume":
            asked.resume = words.pop(0) if words and not words[0].startswith("-") else ""
        elif word in ("-c", "--config", "--out"):
            if not words:
                raise ConfigError(f"{word} at the end", "a path after it", f"write {word} PATH")
            if word == "--out":
                asked.out = words.pop(0)
            else:
                asked.files.append(words.pop(0))
        else:
            asked.flags.append(word)
            if "=" not in word and words and not words[0].startswith(("--", "-c")):
                asked.flags.append(words.pop(0))
    given = {flag.partition("=")[0] for flag in asked.flags} & {f"--{name}" for name in budgets}
    if len(given) == 1:
        asked.flags += [f"--{name}=none" for name in budgets if f"--{name}" not in given]
    return asked


def without(words: Sequence[str], flag: str, default: str) -> tuple[list[str], str]:
    """The words without a flag, and its value."""
    rest, found = [], default
    waiting = iter(words)
    for word in waiting:
        if word == flag:
            found = next(waiting, "")
        elif word.startswith(f"{flag}="):
            found = word.partition("=")[2]
        else:
            rest.append(word)
    return rest, found


def configured(asked: Asked, kind: type[C]) -> tuple[C, dict[str, str]]:
    """The settings, and where each came from."""
    if asked.recipe is None:
        raise ConfigError("no recipe", f"one of {', '.join(recipe_names(kind))}", "name one first")
    layers = [*asked.layers, *map(configs.read, asked.files)]
    return configs.load(recipe(asked.recipe, kind), *layers, flags=asked.flags, origin=f"recipe {asked.recipe}")


def recipe_names(kind: type) -> list[str]:
    """Of the recipes that return this kind of settings."""
    names = sorted(path.stem for path in RECIPES.glob("*.py") if not path.stem.startswith("_"))
    return [name for name in names if _module(name).recipe.__annotations__["return"] is kind]


def recipe(name: str, kind: type[C]) -> C:
    names = recipe_names(kind)
    if name not in names:
        close = get_close_matches(name, names, n=1, cutoff=0.4)
        fix = f"did you mean {close[0]}?" if close else "choose one of them"
        raise ConfigError(f"no recipe {name!r}", f"one of {', '.join(names)}", fix)
    return _module(name).recipe()


def _module(name: str) -> Any:
    return import_module(f"shoal.recipes.{name}")


def resumed(asked: Asked, kind: type) -> Run:
    """The run named, else the newest of the recipe, else the newest of the verb's recipes."""
    if asked.resume:
        return find(asked.resume)
    if asked.out:
        return Run.open(asked.out)
    names = [asked.recipe] if asked.recipe else recipe_names(kind)
    runs = [run for run in list_runs() if run.status().get("recipe") in names]
    if not runs:
        raise RunError(f"no run of {' or '.join(names)} to resume", "one under runs/", "leave --resume out")
    return runs[0]


def reconfigured(run: Run, asked: Asked, kind: type[C]) -> tuple[C, dict[str, str]]:
    """The config a run was started with, and the few settings that may change under way."""
    started = configs.from_toml(kind, (run.path / "config.toml").read_text())
    config, changes = configs.load(started, *map(configs.read, asked.files), flags=asked.flags)
    before, after = configs.flatten(started), configs.flatten(config)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    if fixed := sorted(key for key in changed if not key.startswith(MAY_CHANGE)):
        raise ConfigError(
            f"{', '.join(fixed)} differ from what {run.id} was started with",
            "a resumed run keeps its settings, except " + ", ".join(name.rstrip(".") for name in MAY_CHANGE),
            "leave them out, or start a new run",
        )
    return config, run.origins() | {key: changes[key] for key in changed & changes.keys()}
