"""`shoal pretrain RECIPE [--model PRESET] [-c file.toml] [--dotted.key value …] [--minutes M] [--out DIR] [--resume …]`

Settings are layered: the recipe, then each -c file, then flags such as `--optim.lr 3e-4`. `--model PRESET` puts another
shape, and a vocabulary of its size, in the place of the recipe's. `--print-config` shows the outcome and where each
value came from; `--dry-run` says what it would take, without making a run. `--minutes M` takes the place of the
recipe's steps, `--steps N` that of its minutes. A resumed run keeps the settings it was started with; only how long it
goes, evaluates and saves may be changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import TYPE_CHECKING

from shoal import config as configs
from shoal.cli.asked import Asked, configured, parse, recipe_names, reconfigured, resumed, without
from shoal.errors import ConfigError
from shoal.model.presets import PRESETS
from shoal.run import Run
from shoal.train.config import PretrainConfig

if TYPE_CHECKING:
    from shoal.recipes import _machine

Job = Callable[..., int]  # what `_job.run_job` is; the caller holds the run's lock


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nrecipes: {', '.join(recipe_names(PretrainConfig))}\npresets: {', '.join(PRESETS)}")
        return 0 if argv else 2
    return launch(parse(argv), ["shoal", "pretrain", *argv])


def launch(asked: Asked, command: Sequence[str], size: bool = False, job: Job | None = None) -> int:
    """Do what was asked. `size` chooses model and batch for this machine where no flag or file does; a `job` that does
    more takes the place of `_job.run_job`."""
    if asked.resume is None:
        return start(asked, command, size, job)
    run = resumed(asked, PretrainConfig)
    if asked.print_config or asked.dry_run:
        return look_ahead(asked, *reconfigured(run, asked, PretrainConfig))
    with run.lock():  # from reading the settings to the last line of the report
        from shoal.cli.progress import teller
        from shoal.recipes import _job

        config, origins = reconfigured(run, asked, PretrainConfig)
        run.write_config(config, origins)
        return (job or _job.run_job)(config, run, teller(), resume=True)


def shaped(asked: Asked) -> Asked:
    """`--model PRESET`, and the vocabulary that goes with it, as a layer below the files. Raises ConfigError."""
    flags, name = without(asked.flags, "--model", "")
    if not name:
        return asked
    if name not in PRESETS:
        close = get_close_matches(name, PRESETS, n=1, cutoff=0.4)
        fix = f"did you mean {close[0]}?" if close else "choose one, or set single keys such as --model.dim 512"
        raise ConfigError(f"--model {name}", f"one of {', '.join(PRESETS)}", fix)
    layer = {"model": PRESETS[name], "data": {"vocab_size": PRESETS[name].vocab_size}}
    return replace(asked, flags=flags, layers=[(f"flag --model {name}", layer), *asked.layers])


def start(asked: Asked, command: Sequence[str], size: bool, job: Job | None) -> int:
    asked = shaped(asked)
    config, origins = configured(asked, PretrainConfig)
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
    with run.begun():
        return (job or _job.run_job)(config, run, tell, here=here)


def look_ahead(
    asked: Asked, config: PretrainConfig, origins: dict[str, str], here: "_machine.Here | None" = None
) -> int:
    """Print the settings, or what a run would take, and make none."""
    if asked.print_config:
        print(configs.to_toml(config, origins), end="")
        return 0
    from shoal.cli.progress import teller
    from shoal.recipes import _job

    _job.dry_run(config, origins, teller(), here)
    return 0
