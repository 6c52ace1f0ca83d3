"""`shoal pretrain RECIPE [-c file.toml] [--dotted.key value …] [--minutes M] [--out DIR] [--resume [RUN]]`

Settings are layered: the recipe, then each -c file, then flags such as `--optim.lr 3e-4`. `--print-config` shows the
outcome and where each value came from; `--dry-run` says what it would take, without making a run. `--minutes M` takes
the place of the recipe's steps, `--steps N` that of its minutes. A resumed run keeps the settings it was started with;
only how long it goes, evaluates and saves may be changed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from shoal import config as configs
from shoal.errors import ConfigError, RunError
from shoal.run import Run, find, list_runs

if TYPE_CHECKING:
    from shoal.recipes import _machine
    from shoal.train.config import PretrainConfig

RECIPES = Path(__file__).parent.parent / "recipes"
BUDGETS = {"--minutes": "--steps", "--steps": "--minutes"}  # giving one unsets the other
MAY_CHANGE = ("steps", "minutes", "eval.", "checkpoint.")  # of a run that is resumed


@dataclass
class Asked:
    recipe: str | None = None
    files: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    resume: str | None = None  # a run's name; "" is the newest
    out: str | None = None
    dry_run: bool = False
    print_config: bool = False


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nrecipes: {', '.join(recipe_names())}")
        return 0 if argv else 2
    return launch(parse(argv), ["shoal", "pretrain", *argv])


def launch(asked: Asked, command: Sequence[str], size: bool = False) -> int:
    """Do what was asked. `size` chooses model and batch for this machine where no flag or file does."""
    if asked.resume is None:
        return start(asked, command, size)
    run = resumed(asked)
    if asked.print_config or asked.dry_run:
        return look_ahead(asked, *reconfigured(run, asked))
    with run.lock():  # from reading the settings to the last line of the report
        from shoal.cli.progress import teller
        from shoal.recipes import _job

        config, origins = reconfigured(run, asked)
        run.write_config(config, origins)
        return _job.run_job(config, run, teller(), resume=True)


def start(asked: Asked, command: Sequence[str], size: bool) -> int:
    config, origins = configured(asked)
    if asked.print_config and not size:
        return look_ahead(asked, config, origins)
    from shoal.cli.progress import silent, teller
    from shoal.recipes import _job, _machine, _plan

    here, tell = None, silent() if asked.print_config else teller()
    if size:
        here = _machine.look(config.threads, config.seed)
        config, origins = _plan.sized(config, origins, here, tell)
    if asked.print_config or asked.dry_run:
        return look_ahead(asked, config, origins, here)
    run = Run.create(str(asked.recipe), asked.out, config, origins, command)
    with run.lock():
        return _job.run_job(config, run, tell, here=here)


def look_ahead(
    asked: Asked, config: "PretrainConfig", origins: dict[str, str], here: "_machine.Here | None" = None
) -> int:
    """Print the settings, or what a run would take, and make none."""
    if asked.print_config:
        print(configs.to_toml(config, origins), end="")
        return 0
    from shoal.cli.progress import teller
    from shoal.recipes import _job

    _job.dry_run(config, origins, teller(), here)
    return 0


def parse(argv: Sequence[str]) -> Asked:
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
    given = BUDGETS.keys() & {flag.partition("=")[0] for flag in asked.flags}
    if len(given) == 1:
        asked.flags.append(f"{BUDGETS[given.pop()]}=none")
    return asked


def configured(asked: Asked) -> tuple["PretrainConfig", dict[str, str]]:
    if asked.recipe is None:
        raise ConfigError("no recipe", f"one of {', '.join(recipe_names())}", "shoal pretrain RECIPE …")
    layers = map(configs.read, asked.files)
    return configs.load(recipe(asked.recipe), *layers, flags=asked.flags, origin=f"recipe {asked.recipe}")


def recipe_names() -> list[str]:
    return sorted(path.stem for path in RECIPES.glob("*.py") if not path.stem.startswith("_"))


def recipe(name: str) -> "PretrainConfig":
    names = recipe_names()
    if name not in names:
        close = get_close_matches(name, names, n=1, cutoff=0.4)
        fix = f"did you mean {close[0]}?" if close else "choose one of them"
        raise ConfigError(f"no recipe {name!r}", f"one of {', '.join(names)}", fix)
    return import_module(f"shoal.recipes.{name}").recipe()


def resumed(asked: Asked) -> Run:
    """The run named, else the newest of the recipe, else the newest."""
    if asked.resume:
        return find(asked.resume)
    if asked.out:
        return Run.open(asked.out)
    runs = [run for run in list_runs() if asked.recipe in (None, run.status().get("recipe"))]
    if not runs:
        raise RunError(f"no run of {asked.recipe or 'any recipe'} to resume", "one under runs/", "leave --resume out")
    return runs[0]


def reconfigured(run: Run, asked: Asked) -> tuple["PretrainConfig", dict[str, str]]:
    """The config a run was started with, and the few settings that may change under way."""
    from shoal.train.config import PretrainConfig

    started = configs.from_toml(PretrainConfig, (run.path / "config.toml").read_text())
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
