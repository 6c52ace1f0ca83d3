"""`shoal sft [RECIPE|FILE.jsonl] --model MODEL --data DATA [--epochs E | --steps N | --minutes M] [--out DIR] …`

Teaches a model what the assistant says in conversations. DATA is a JSONL file of them, one `{"messages": […]}` a line
(or `{"prompt": …, "reasoning": …, "answer": …}`), or `tasks:addition,countdown:2000`: worked solutions of so many
problems of the tasks' training split. MODEL is a run, a checkpoint folder, or a Hugging Face folder.

Settings are layered as in `shoal pretrain`: the recipe (sft), then each -c file, then flags such as `--optim.lr 3e-4`.
`--print-config` shows the outcome, `--dry-run` says what there is to learn and how many steps that takes. `--resume
[RUN]` continues a run, bit for bit, with the settings it was started with.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from shoal import config as configs
from shoal.cli.asked import Asked, configured, parse, recipe_names, reconfigured, resumed
from shoal.cli.opened import OF_CONFIG, Opened, model_folder, open_to_train, reopened
from shoal.errors import ConfigError
from shoal.post.config import SftConfig
from shoal.run import Run

if TYPE_CHECKING:
    from shoal.post.packing import Samples
    from shoal.recipes._teller import Teller

BUDGETS = ("epochs", "minutes", "steps")


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nrecipes: {', '.join(recipe_names(SftConfig))}")
        return 0 if argv else 2
    asked = parse(argv, BUDGETS)
    if asked.resume is not None:
        return go_on(asked)
    asked = named(asked)
    config, origins = configured(asked, SftConfig)
    if asked.print_config:
        print(configs.to_toml(config, origins), end="")
        return 0
    return start(asked, config, origins, ["shoal", "sft", *argv])


def named(asked: Asked) -> Asked:
    """A file in the recipe's place is the data."""
    if asked.recipe and asked.recipe.endswith(".jsonl"):
        return replace(asked, recipe="sft", flags=["--data", asked.recipe, *asked.flags])
    return replace(asked, recipe=asked.recipe or "sft")


def start(asked: Asked, config: SftConfig, origins: dict[str, str], command: Sequence[str]) -> int:
    from shoal.cli.progress import teller

    if not config.model:
        raise ConfigError("no model", "something to start from", "give --model RUN, or a model folder")
    tell = teller()
    config = replace(config, model=str(model_folder(config.model).resolve()))  # `latest` won't stay what it is
    opened = open_to_train(config.model, OF_CONFIG[config.dtype], config.threads)
    samples = samples_of(config, opened, tell)
    if asked.dry_run:
        return 0
    from shoal.recipes import _tune

    run = Run.create(str(asked.recipe), asked.out, config, origins, command)
    with run.begun():
        return _tune.teach(config, run, opened.model, opened.tokenizer, samples, tell)


def go_on(asked: Asked) -> int:
    from shoal.cli.progress import teller
    from shoal.recipes import _tune

    run, tell = resumed(asked, SftConfig), teller()
    with run.lock():
        config, origins = reconfigured(run, asked, SftConfig)
        run.write_config(config, origins)
        opened = reopened(run, config.model, config.dtype, config.threads)
        return _tune.teach(
            config, run, opened.model, opened.tokenizer, samples_of(config, opened, tell), tell, resume=True
        )


def samples_of(config: SftConfig, opened: Opened, tell: "Teller") -> "Samples":
    from shoal.post.conversations import of_data
    from shoal.post.packing import Packer, samples_of

    b = config.batch
    samples = samples_of(of_data(config.data, config.seed, config.levels), opened.tokenizer, b.context)
    tell.say(f"data     {config.data}: {samples}")
    packer = Packer(samples, opened.tokenizer.byte_lengths(), b.context * b.samples, config.seed)
    an_epoch = -(-packer.batches(1) // b.accumulate)
    tell.say(f"batches  of {b.tokens:,} tokens; an epoch is {an_epoch:,} {'step' if an_epoch == 1 else 'steps'}")
    return samples
