"""A distillation from end to end: ask the teacher, select, teach the student. The caller holds the run's lock.

What came of the asking is left in distill.json: the counts by verdict, tokens and cost.
"""

import json
from dataclasses import asdict
from pathlib import Path

from shoal.data.tokenizer import Tokenizer
from shoal.errors import DataError
from shoal.model.transformer import Transformer
from shoal.post.answers import Answers
from shoal.post.config import DistillConfig
from shoal.post.conversations import Conversation
from shoal.post.distill import collect, cost_of, prompts_of
from shoal.post.on_policy import distill_on_policy
from shoal.post.packing import samples_of
from shoal.post.selection import VERDICTS, select
from shoal.post.teacher import Teacher
from shoal.recipes._job import typed
from shoal.recipes._teller import Teller
from shoal.recipes._tune import failures_noted, follow, require_memory, teach
from shoal.run import Run, replace_text
from shoal.tasks.grading import Graders
from shoal.train.step import TrainState


def from_samples(
    config: DistillConfig,
    run: Run,
    teacher: Teacher,
    student: Transformer,
    tokenizer: Tokenizer,
    teller: Teller,
    resume: bool = False,
) -> int:
    """0 when the run is complete, 130 when it was asked to stop."""
    with failures_noted(run):
        lessons = ask(config, run, teacher, teller)
        if lessons is None:
            run.status(state="stopped")
            teller.say(f"stopped  what was answered is kept; continue with: shoal distill --resume {typed(run)}")
            return 130
        samples = samples_of(lessons, tokenizer, config.batch.context)
    teller.say(f"data     {samples}")
    return teach(config, run, student, tokenizer, samples, teller, resume, "distill")


def ask(config: DistillConfig, run: Run, teacher: Teacher, teller: Teller) -> list[Conversation] | None:
    """What the student should learn; None where somebody asked to stop before all was there."""
    prompts = prompts_of(config.prompts, config.seed, config.levels)
    run.status(state="asking")
    path = Path(config.answers) if config.answers else run.path / "samples.jsonl"
    with Answers(path, teacher.name, teacher.settings) as file:
        whole = collect(teacher, prompts, config.samples, file, teller.say)
        found = file.of((prompt.text for prompt in prompts), config.samples)
    cost = cost_of(found, config)
    teller.say(f"teacher  {cost}")
    if not whole:
        return None
    with Graders() as graders:
        selection = select(prompts, found, graders, config.keep)
    teller.say(f"answers  {selection}")
    record = {"teacher": teacher.name, "prompts": len(prompts), "cost": asdict(cost)}
    record["verdicts"] = {verdict: selection.counts[verdict] for verdict in VERDICTS}
    replace_text(run.path / "distill.json", json.dumps(record, indent=1) + "\n")
    if not selection.conversations:
        fix = "ask for more samples, easier prompts, or loosen --keep"
        raise DataError(f"nothing to learn: {selection}", "at least one answer to keep", fix)
    return selection.conversations


def on_policy(
    config: DistillConfig,
    run: Run,
    teacher: Transformer,
    student: Transformer,
    tokenizer: Tokenizer,
    teller: Teller,
    resume: bool = False,
) -> int:
    """0 when the run is complete, 130 when it was asked to stop and left a checkpoint."""
    require_memory(config.training(student.config, 1), student)
    prompts = prompts_of(config.prompts, config.seed, config.levels)

    def train() -> TrainState:
        return distill_on_policy(config, run, student, teacher, tokenizer, prompts, resume, teller.show, teller.say)

    return follow("distill", run, teller, resume, train)
