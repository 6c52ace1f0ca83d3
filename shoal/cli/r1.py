"""`shoal r1 --model BASE [--tasks NAMES] [--levels 1,2] [--minutes M | --steps N] [--out DIR] [--resume [RUN]] …`

A base becomes R1 in five stages: a cold start by fine-tuning, reinforcement of reasoning, its best answers with general
data, fine-tuning of the base on those, reinforcement on everything. Each is a run in RUN/stages with a configuration,
checkpoints and a report; the minutes are shared out by `recipes/r1.py`, `--steps N` gives every stage N.

Settings are layered as in `shoal pretrain`; those of a stage go by its name: `--reasoning.rollout.group 8`,
`--r1.rewards.preference 0.2 --r1.judge.url http://…/v1 --r1.judge.model NAME`. `--print-config` shows the outcome,
`--dry-run` which stage gets how long. `--resume [RUN]` goes on where a run stopped or was killed, bit for bit where the
budget is steps.
"""

from dataclasses import replace

from shoal import config as configs
from shoal.cli.asked import configured, parse, recipe_names, reconfigured, resumed
from shoal.cli.opened import model_folder
from shoal.errors import ConfigError
from shoal.recipes.r1 import SHARES, R1Config
from shoal.run import Run


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nrecipes: {', '.join(recipe_names(R1Config))}")
        return 0 if argv else 2
    asked = parse(argv)
    if asked.resume is not None:
        run = resumed(asked, R1Config)
        with run.lock():
            config, _ = reconfigured(run, asked, R1Config)
            return went_on(config, run)
    asked = replace(asked, recipe=asked.recipe or "r1")
    config, origins = configured(asked, R1Config)
    if asked.print_config:
        print(configs.to_toml(config, origins), end="")
        return 0
    if not config.model:
        raise ConfigError("no model", "a base to start from", "give --model RUN, or a model folder")
    from shoal.recipes._pipeline import Budget
    from shoal.tasks.catalog import resolve

    resolve(config.tasks)
    if asked.dry_run:
        print(f"stages   {Budget(SHARES, config.minutes, config.steps)}")
        return 0
    config = replace(config, model=str(model_folder(config.model).resolve()))  # `latest` won't stay what it is
    run = Run.create(str(asked.recipe), asked.out, config, origins, ["shoal", "r1", *argv])
    with run.begun():
        return went_on(config, run)


def went_on(config: R1Config, run: Run) -> int:
    from shoal.cli.progress import teller
    from shoal.recipes import _r1

    return _r1.run_r1(config, run, teller())
