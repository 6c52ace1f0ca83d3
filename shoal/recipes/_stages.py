"""The kinds of stages a pipeline is made of: fine-tuning, reinforcement, rejection sampling, an evaluation.

Each composes what the verbs do (`_tune.py`, `_reinforce.py`, `post/distill.py`, `evals/`), in a run of its own.
"""

import re
import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch

from shoal.data.tokenizer import Tokenizer
from shoal.engine.engine import LocalEngine
from shoal.evals import record
from shoal.evals.harness import Attempts, Rules, problems, sweep
from shoal.model import hf
from shoal.model.transformer import Transformer
from shoal.post import distill
from shoal.post.answers import Answers
from shoal.post.config import SftConfig
from shoal.post.conversations import Conversation
from shoal.post.judge import readable
from shoal.post.packing import samples_of
from shoal.post.rewards import consistent, well_formed
from shoal.post.rl_config import RLConfig
from shoal.post.selection import Prompt, Selection, select
from shoal.post.sft import sft
from shoal.post.teacher import LocalTeacher
from shoal.recipes import _lessons
from shoal.recipes import r1 as r1_recipe
from shoal.recipes._job import write_json
from shoal.recipes._pipeline import Pipeline, Stopped, checkpoint_of
from shoal.recipes._reinforce import trained
from shoal.recipes._tune import watched
from shoal.recipes.r1 import SamplesConfig
from shoal.report import chain, page
from shoal.run import Run, read_json
from shoal.tasks.catalog import resolve
from shoal.tasks.grading import Graders
from shoal.tasks.task import Item
from shoal.train.loop import steps_left
from shoal.train.step import TrainState

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CHUNK = 128  # prompts that are asked at once; the clock is looked at in between
LEAST_GENERAL = 64  # questions, so that there is something to learn whatever came of the others
LEAST_PROBLEMS = 24  # held out, in an evaluation
SHOWN = 6  # lessons on the page of sampling
EVALUATION = "problems"  # evals/problems.json


def opened(p: Pipeline, folder: Path, dtype: str) -> tuple[Transformer, Tokenizer]:
    return hf.load(folder, DTYPES[dtype], p.device), Tokenizer.load(folder)


def tune(
    p: Pipeline,
    name: str,
    config: SftConfig,
    base: Path,
    data: Callable[[], list[Conversation]] | Path,
    fresh: Callable[[], Transformer] | None = None,
) -> Path:
    """Teach `data` (a file of lessons, or what makes them) to the model at `base`, or to a `fresh` one that speaks its
    tokens. The checkpoint it ends with."""
    config = replace(config, model="" if fresh else str(base), data=str(data) if isinstance(data, Path) else "")
    config = replace(config, epochs=None, **p.budget.of(name), threads=p.threads)

    def work(run: Run, resume: bool) -> tuple[Path, dict]:
        path = data if isinstance(data, Path) else run.path / _lessons.FILE
        if not path.exists():
            assert not isinstance(data, Path), data
            _lessons.write(path, data())
        model, tokenizer = opened(p, base, config.dtype)
        model = fresh().to(p.device) if fresh else model
        samples = samples_of(_lessons.lessons(path), tokenizer, config.batch.context)
        p.teller.say(f"data     {samples}")
        state = finished(
            watched(
                run, p.teller, resume,
                lambda: sft(config, run, model, tokenizer, samples, resume, p.teller.show, p.teller.say),
            )
        )  # fmt: skip
        epochs = state.counters.samples / len(samples)
        p.teller.say(f"result   {steps_of(state)}, {epochs:.1f} times over")
        facts = {"lessons": len(samples), "epochs": epochs} | told(state)
        return checkpoint_of(run), facts

    return p.stage(name, "sft", config, [base, data] if isinstance(data, Path) else [base], work)


def reinforce(p: Pipeline, name: str, config: RLConfig, base: Path) -> Path:
    """Reinforce the model at `base`. The checkpoint it ends with."""
    config = replace(config, model=str(base), **p.budget.of(name), threads=p.threads)

    def work(run: Run, resume: bool) -> tuple[Path, dict]:
        model, tokenizer = opened(p, base, config.dtype)
        state = finished(trained(config, run, model, tokenizer, resolve(config.tasks), p.teller, resume))
        _, right = run.series("rl/accuracy")
        p.teller.say(f"result   {steps_of(state)}, right {right[0]:.0%} → {right[-1]:.0%} while training")
        answers = sum(run.series("rl/answers")[1])
        return checkpoint_of(run), told(state) | {"answers": int(answers)}

    return p.stage(name, "rl", config, [base], work)


def sample(p: Pipeline, name: str, config: SamplesConfig, tasks: str, levels: Sequence[int] | None, base: Path) -> Path:
    """Ask the model at `base`, keep what is right and readable, add general data. A file of lessons."""
    config = replace(config, minutes=p.budget.of(name)["minutes"])

    def work(run: Run, resume: bool) -> tuple[Path, dict]:
        model, tokenizer = opened(p, base, "bf16")
        items = _lessons.problems(resolve(tasks), levels, config.problems, config.seed)
        prompts = list({item.prompt: Prompt(item.prompt, item) for item in items}.values())
        teacher = LocalTeacher(model, tokenizer, base, config.sampling)
        with Answers(run.path / "answers.jsonl", teacher.name, teacher.settings) as answers:
            asked = ask(p, run, config, teacher, prompts, answers)
            said = answers.of([prompt.text for prompt in asked], config.samples)
        with Graders() as graders:
            every = replace(config.keep, per_prompt=config.samples)
            kept = clear(select(asked, said, graders, every), config.keep.per_prompt)
        p.teller.say(f"kept     {told_of(kept)}")
        if not kept.conversations:
            p.teller.say("kept     nothing: what comes next learns general data alone; give it more minutes")
        more = _lessons.general(max(LEAST_GENERAL, int(config.general * len(kept.conversations))), config.seed)
        path = _lessons.write(run.path / _lessons.FILE, [*kept.conversations, *more])
        show_lessons(run, kept, len(said))
        run.status(state="done", lessons=len(kept.conversations) + len(more))
        tokens = sum(a.completion_tokens for a in said)
        facts = {"lessons": len(kept.conversations), "general": len(more), "answers": len(said), "tokens": tokens}
        return path, facts | {"verdicts": dict(kept.counts)}

    return p.stage(name, "samples", config, [base], work)


def ask(
    p: Pipeline, run: Run, config: SamplesConfig, teacher: LocalTeacher, prompts: Sequence[Prompt], answers: Answers
) -> list[Prompt]:
    """The prompts that were asked until the minutes were over, all their answers on file; at least one chunk of them.

    The clock of earlier sittings stands in the record, so a resumed stage asks no longer than another.
    """
    asked, seconds = [], max(run.series("time/seconds")[1], default=0.0)
    done = len(run.series("time/seconds")[1])
    for number, start in enumerate(range(0, len(prompts), CHUNK)):
        if number >= done and number and config.minutes is not None and seconds >= 60 * config.minutes:
            break
        began, chunk = time.perf_counter(), prompts[start : start + CHUNK]
        if not distill.collect(teacher, chunk, config.samples, answers, lambda words: None):
            run.status(state="stopped")
            raise Stopped
        asked += chunk
        if number >= done:
            seconds += time.perf_counter() - began
            run.log(number + 1, {"samples/asked": len(asked) * config.samples, "time/seconds": seconds})
    p.teller.say(f"asked    {len(asked):,} problems, {config.samples} times each, in {seconds:.0f} s")
    return asked


def clear(found: Selection, per_prompt: int) -> Selection:
    """Those that somebody could follow, so not right by luck (`judge.readable`), at most `per_prompt` of a prompt."""
    kept, unclear, taken = [], 0, Counter()
    for talk in found.conversations:
        prompt = talk.messages[0].content
        if not readable(prompt, completion(talk)):
            unclear += 1
        elif taken[prompt] < per_prompt:
            taken[prompt] += 1
            kept.append(talk)
    surplus = len(found.conversations) - unclear - len(kept)
    return Selection(kept, found.counts + Counter(unclear=unclear, surplus=surplus) - Counter(kept=unclear + surplus))


def completion(talk: Conversation) -> str:
    said = talk.messages[1]
    return f"{said.reasoning}</think><answer>{said.content}</answer>"


def told_of(kept: Selection) -> str:
    others = [f"{n:,} {verdict}" for verdict, n in kept.counts.most_common() if verdict != "kept"]
    return ", ".join([f"{kept.counts['kept']:,} of {kept.counts.total():,}", *others])


def show_lessons(run: Run, kept: Selection, asked: int) -> None:
    """For the stage's page: the share that was kept, and the first of them."""
    share = len(kept.conversations) / max(1, asked)
    found = {"name": "right, readable, and each once", "metric": "share", "value": share, "better": "higher"}
    write_json(run.evals / "kept.json", found | {"measured_on": f"{asked:,} answers to training problems"})
    lessons = shlex.quote(page.shown(run.path / _lessons.FILE))
    write_json(run.path / "receipt.json", {"next_command": f"shoal sft --model BASE --data {lessons}"})
    for number, talk in enumerate(kept.conversations[:SHOWN]):
        text = completion(talk)
        write_json(run.samples / f"{number}.json", {"prompt": f"{talk.messages[0].content}\n", "text": text})


def finished(state: TrainState) -> TrainState:
    """Raises Stopped where somebody asked to stop before the end."""
    if steps_left(state):
        raise Stopped
    return state


def steps_of(state: TrainState) -> str:
    n = state.counters.step
    return f"{n:,} step{'s' * (n != 1)}"


def told(state: TrainState) -> dict:
    c = state.counters
    return {"steps": c.step, "tokens": c.tokens, "minutes_of_training": c.seconds / 60}


def compare(
    p: Pipeline, models: Mapping[str, Path], tasks: str, levels: Sequence[int] | None, seed: int, max_tokens: int
) -> None:
    """All models on the same held-out problems: evals/problems.json in the run of each. Done once."""
    most, minutes = r1_recipe.EVALUATED, p.budget.minutes
    count = most if minutes is None else min(most, max(LEAST_PROBLEMS, int(minutes * r1_recipe.EVALUATED_A_MINUTE)))
    items = problems(resolve(tasks), count, seed, levels)
    rules = Rules(r1_recipe.ATTEMPTS, max_tokens=max_tokens, seed=seed)
    p.note(models={name: p.relative(folder) for name, folder in models.items()})
    seconds = 60 * p.table.get("compared", {}).get("minutes", 0.0)
    for name, folder in models.items():
        run = home(p, folder)
        if not (run.evals / f"{EVALUATION}.json").exists():
            p.teller.say(f"solving  {len(items)} held-out problems, {rules.samples} times each: {name}")
            began = time.perf_counter()
            evaluate(p, run, folder, items, rules)
            seconds += time.perf_counter() - began
        found = read_json(run.evals / f"{EVALUATION}.json")
        low, high = found["interval"]
        p.teller.say(f"result   {name}: {found['value']:.1%} right ({low:.1%} to {high:.1%})")
    attempts = len(models) * len(items) * rules.samples
    p.note(compared={"minutes": seconds / 60, "attempts": attempts})
    p.run.status(state="done")
    p.teller.say(f"report   {chain.write(p.run.path)}")


def home(p: Pipeline, folder: Path) -> Run:
    """The run that made a checkpoint, where it is one of the pipeline's; else the pipeline's own."""
    return Run.open(folder.parent.parent) if folder.absolute().is_relative_to(p.run.path) else p.run


def evaluate(p: Pipeline, run: Run, folder: Path, items: Sequence[Item], rules: Rules) -> None:
    model, tokenizer = opened(p, folder, "bf16")
    budgets = r1_recipe.BUDGETS
    with closing(LocalEngine(model)) as engine, Graders() as graders:
        curve = list(zip(budgets, sweep(engine, tokenizer, items, graders, rules, budgets)))
    step = re.fullmatch(r"step-(\d+)", folder.name)
    found = record.record(EVALUATION, curve, rules, int(step[1]) if step else None)
    record.write(run.evals, EVALUATION, found | measures(curve[-1][1]), curve)


def measures(attempts: Attempts) -> dict[str, float]:
    """Of free attempts: the share in the right form, and of those whose thinking is wholly in the prompt's language."""
    flat = [a for group in attempts for a in group]
    form = sum(well_formed(a.completion) for a in flat)
    language = sum(consistent(a.item.prompt, a.completion) for a in flat)
    return {"format": form / len(flat), "language": language / len(flat)}
