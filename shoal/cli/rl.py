"""`shoal rl [RECIPE] --model MODEL --tasks NAMES [--levels 1,2] [--minutes M | --steps N] [--out DIR] …`

Reinforcement learning with verifiable rewards: the model answers problems of the tasks' training split, graders say
which answers are right, and those become likelier. MODEL is a run, a checkpoint folder, or a Hugging Face folder whose
base has seen worked solutions: it must be right now and then, for the gradient scales with the pass rate.

Settings are layered as in `shoal pretrain`: the recipe (r1_zero), then each -c file, then flags such as
`--policy.variant dr_grpo`. `--print-config` shows the outcome, `--dry-run` what a step will be. `--resume [RUN]`
continues a run, bit for bit. `shoal samples RUN` shows what it wrote.
"""

from collections.abc import Sequence
from dataclasses import replace

from shoal import config as configs
from shoal.cli.asked import Asked, configured, parse, recipe_names, reconfigured, resumed
from shoal.cli.opened import OF_CONFIG, model_folder, open_to_train, reopened
from shoal.errors import ConfigError
from shoal.post.rl_config import RLConfig
from shoal.run import Run


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nrecipes: {', '.join(recipe_names(RLConfig))}")
        return 0 if argv else 2
    asked = parse(argv)
    if asked.resume is not None:
        return go_on(asked)
    asked = replace(asked, recipe=asked.recipe or "r1_zero")
    config, origins = configured(asked, RLConfig)
    if asked.print_config:
        print(configs.to_toml(config, origins), end="")
        return 0
    return start(asked, config, origins, ["shoal", "rl", *argv])


def start(asked: Asked, config: RLConfig, origins: dict[str, str], command: Sequence[str]) -> int:
    from shoal.cli.progress import teller
    from shoal.recipes import _reinforce
    from shoal.tasks.catalog import resolve

    if not config.model:
        raise ConfigError("no model", "something to start from", "give --model RUN, or a model folder")
    tasks = resolve(config.tasks)
    config = replace(config, model=str(model_folder(config.model).resolve()))  # `latest` won't stay what it is
    opened = open_to_train(config.model, OF_CONFIG[config.dtype], config.threads)
    if asked.dry_run:
        r, long = config.rollout, f"{config.steps} steps" if config.steps else f"{config.minutes:g} minutes"
        print(f"tasks    {', '.join(task.name for task in tasks)}; held-out problems before and after")
        print(f"steps    of {r.prompts} prompts × {r.group} answers, each of at most {r.max_tokens} tokens; {long}")
        return 0
    run = Run.create(str(asked.recipe), asked.out, config, origins, command)
    with run.begun():
        return _reinforce.reinforce(config, run, opened.model, opened.tokenizer, tasks, teller())


def go_on(asked: Asked) -> int:
    from shoal.cli.progress import teller
    from shoal.recipes import _reinforce
    from shoal.tasks.catalog import resolve

    run = resumed(asked, RLConfig)
    with run.lock():
        config, origins = reconfigured(run, asked, RLConfig)
        run.write_config(config, origins)
        opened = reopened(run, config.model, config.dtype, config.threads)
        tasks = resolve(config.tasks)
        return _reinforce.reinforce(config, run, opened.model, opened.tokenizer, tasks, teller(), resume=True)
