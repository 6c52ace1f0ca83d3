"""`shoal distill --teacher URL|MODEL --student PRESET|MODEL --prompts FILE|TASKS [--samples 4] [--out DIR] …`

Asks a teacher, keeps the answers that are right and readable, and teaches them to a student (as `shoal sft` would).
The teacher is a model here or any OpenAI-shaped URL (`--endpoint.model NAME --endpoint.key_env VARIABLE`, prices by
`--endpoint.usd_in`, `--endpoint.usd_out` a million tokens). PROMPTS are a JSONL file of `{"prompt": …}`, which nobody
grades, or tasks with a count: `countdown,addition:500`. Answers are kept as they come: `--resume [RUN]` asks only for
what is missing, and `--answers FILE` shares them between runs.

The student is a model to go on from, or a preset of fresh weights with the teacher's tokenizer (`--tokenizer FOLDER`
where the teacher is a URL). `--on-policy --minutes M`: the student writes, and the teacher, which must be a model here
with the same vocabulary, judges every token.

Settings are layered as in `shoal pretrain`: the recipe (distill), then each -c file, then flags. `--print-config`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shoal import config as configs
from shoal.cli.asked import Asked, configured, parse, recipe_names, reconfigured, resumed
from shoal.cli.opened import OF_CONFIG, Opened, check_memory, end_ids, model_folder, open_model, reopened
from shoal.cli.sft import BUDGETS
from shoal.errors import ConfigError
from shoal.model.presets import PRESETS
from shoal.post.config import DistillConfig
from shoal.run import Run

if TYPE_CHECKING:
    from shoal.data.tokenizer import Tokenizer
    from shoal.model.transformer import Transformer
    from shoal.post.teacher import Teacher

OF_SAMPLES = ("answers", "sampling.temperature", "sampling.top_p", "endpoint.", "keep.")  # not read on-policy


def main(argv: list[str]) -> int:
    if not argv or {"-h", "--help"} & set(argv):
        print(f"{__doc__}\nrecipes: {', '.join(recipe_names(DistillConfig))}\npresets: {', '.join(PRESETS)}")
        return 0 if argv else 2
    asked = parse(argv, BUDGETS)
    if asked.dry_run:
        raise ConfigError("--dry-run", "a run: what a teacher says isn't known before", "leave it out")
    if asked.resume is not None:
        run = resumed(asked, DistillConfig)
        with run.lock():
            config, origins = reconfigured(run, asked, DistillConfig)
            run.write_config(config, origins)
            return distilled(config, run, resume=True)
    asked = replace(asked, recipe=asked.recipe or "distill")
    config, origins = configured(asked, DistillConfig)
    if asked.print_config:
        print(configs.to_toml(config, origins), end="")
        return 0
    return start(asked, located(config, origins), origins, ["shoal", "distill", *argv])


def start(asked: Asked, config: DistillConfig, origins: dict[str, str], command: Sequence[str]) -> int:
    from shoal.post.distill import prompts_of

    prompts_of(config.prompts, config.seed, config.levels)  # what can't be asked is refused before anything is made
    if is_url(config.teacher):
        teacher_of(config, None)
    run = Run.create(asked.recipe or "distill", asked.out, config, origins, command)
    with run.begun():
        return distilled(config, run)


def located(config: DistillConfig, origins: Mapping[str, str]) -> DistillConfig:
    """The same with every folder by its whole path, for `latest` won't stay what it is. Raises ConfigError."""
    for name in ("teacher", "student", "prompts"):
        if not getattr(config, name):
            raise ConfigError(f"no {name}", "all of --teacher, --student and --prompts", f"give --{name}")
    if is_url(config.teacher) and config.on_policy:
        got = f"--on-policy with the teacher {config.teacher}"
        raise ConfigError(got, "a model here, which can judge tokens", "leave out --on-policy")
    if is_url(config.teacher) and config.student in PRESETS and not config.tokenizer:
        got = f"the preset {config.student} and a teacher whose tokenizer nobody knows"
        raise ConfigError(got, "a tokenizer", "give --tokenizer FOLDER, or a student that is a model")
    if config.on_policy and (given := of_samples(config, origins)):
        got = f"--on-policy with {', '.join(given)}, of a teacher's samples"
        raise ConfigError(got, "a student that writes at temperature 1, and a teacher that judges", "leave them out")
    if config.on_policy and config.epochs is not None:
        fix = "give --steps N or --minutes M"
        raise ConfigError(f"epochs {config.epochs:g} of samples that are drawn as it goes", "steps or minutes", fix)
    return replace(
        config,
        teacher=config.teacher if is_url(config.teacher) else str(model_folder(config.teacher).resolve()),
        student=config.student if config.student in PRESETS else str(model_folder(config.student).resolve()),
        answers=str(Path(config.answers).resolve()) if config.answers else "",
    )


def of_samples(config: DistillConfig, origins: Mapping[str, str]) -> list[str]:
    """What was given of a teacher's samples alone: as a flag, or in a file and not as it usually is."""
    usual, found = configs.flatten(DistillConfig()), configs.flatten(config).items()
    given = (key for key, value in found if origins[key] == "flag" or value != usual[key])
    return [key for key in given if key.startswith(OF_SAMPLES)]


def distilled(config: DistillConfig, run: Run, resume: bool = False) -> int:
    from shoal.cli.progress import teller
    from shoal.post.distill import require_one_vocabulary
    from shoal.recipes import _distill

    tell, threads = teller(), config.threads or run.env().get("threads")
    known = None if is_url(config.teacher) else open_model(config.teacher, OF_CONFIG[config.dtype], threads)
    student, tokenizer = student_of(config, run, known)
    if config.on_policy:
        assert known, "located() has seen to it"
        require_one_vocabulary(known.model, known.tokenizer, student, tokenizer)
        return _distill.on_policy(config, run, known.model, student, tokenizer, tell, resume)
    return _distill.from_samples(config, run, teacher_of(config, known), student, tokenizer, tell, resume)


def is_url(teacher: str) -> bool:
    return teacher.startswith(("http://", "https://"))


def teacher_of(config: DistillConfig, known: Opened | None) -> "Teacher":
    from shoal.post.teacher import Endpoint, LocalTeacher

    instruction = "" if Path(config.prompts).is_file() else config.endpoint.instruction
    if known is None:
        return Endpoint(config.teacher, config.endpoint, config.sampling, instruction)
    ends = frozenset(end_ids(known.folder, known.model.config.vocab_size))
    return LocalTeacher(known.model, known.tokenizer, known.folder, config.sampling, instruction, ends, known.unchanged)


def student_of(config: DistillConfig, run: Run, teacher: Opened | None) -> "tuple[Transformer, Tokenizer]":
    """What the run goes on from; at its start the model named, or a preset with the teacher's vocabulary."""
    if config.student not in PRESETS or any(run.checkpoints.glob("step-*")):
        opened = reopened(run, config.student, config.dtype, config.threads)
        return opened.model, opened.tokenizer
    from shoal import runtime
    from shoal.data.tokenizer import Tokenizer
    from shoal.post.distill import fresh_student, student_config

    tokenizer = Tokenizer.load(config.tokenizer) if config.tokenizer or teacher is None else teacher.tokenizer
    vocab_size = tokenizer.vocab_size if teacher is None or config.tokenizer else teacher.model.config.vocab_size
    device = runtime.setup(config.threads or run.env().get("threads"), config.seed).device
    check_memory(student_config(config.student, vocab_size, config.batch.context), "float32")
    return fresh_student(config.student, vocab_size, config.seed, config.batch.context).to(device), tokenizer
