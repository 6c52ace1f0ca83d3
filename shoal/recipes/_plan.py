"""Before a run: what fits this machine and the minutes given, and what it will take. One real step is the measure.

`sized` chooses model and batch for the quickstart; `affordable_scores` and `plan_of` serve every recipe. What a user
set by a flag or a file is never changed.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from statistics import median
from typing import Any

import torch

from shoal import config as configs
from shoal.data.corpus import Corpus, prepare
from shoal.model.config import ModelConfig
from shoal.model.counts import count_parameters
from shoal.model.presets import PRESETS
from shoal.ops import cpu
from shoal.plan import cost, flops, memory, size
from shoal.recipes._machine import Here
from shoal.recipes._teller import Teller
from shoal.recipes.quickstart import LADDER, TOKENS_PER_ACTIVE
from shoal.tasks.catalog import GENERATORS
from shoal.train import pairs, schedule
from shoal.train.config import PretrainConfig
from shoal.train.pretrain import training_loader
from shoal.train.step import TrainState, train_step

SIZED = "sized for this machine"  # origin of what was chosen here
LADDERS = {"cpu": LADDER, "cuda": ("small",)}
LOOKED_AT = 16  # batches of a phase, for how long documents are
SCORES_SHARE = 0.1  # of the minutes, that scores on the way may take


def corpus_of(config: PretrainConfig, teller: Teller) -> Corpus:
    """Raises DataError where there is no text, or the model has no row for some token."""
    corpus = prepare(config.data, GENERATORS, say=lambda words: teller.say(f"text     {words}"))
    corpus.check_vocabulary(config.model.vocab_size)
    return corpus


def asked(origins: Mapping[str, str], prefix: str) -> bool:
    """Whether a flag or a file set anything under `prefix`."""
    return any(key.startswith(prefix) and origin.startswith(("flag", "file ")) for key, origin in origins.items())


def sized(
    config: PretrainConfig, origins: Mapping[str, str], here: Here, teller: Teller
) -> tuple[PretrainConfig, dict[str, str]]:
    """The config with the largest model of the ladder, and the batch, that the minutes are enough for here."""
    minutes = config.minutes
    if minutes is None or (asked(origins, "model.") and asked(origins, "batch.")):
        return config, dict(origins)
    models = {name: PRESETS[name] for name in LADDERS[here.setup.device]}
    choose = not asked(origins, "model.")
    if choose and config.model not in models.values():
        config = with_model(config, models[LADDERS[here.setup.device][0]])
    memory.check(config.model, memory_step(config, here.setup.device), here.machine.memory_bytes)
    measured = timed_step(config, corpus_of(config, teller), here.setup.device)
    if choose:
        step = memory_step(config, here.setup.device)
        name = size.largest(models, measured, here.machine, minutes, step, TOKENS_PER_ACTIVE)
        config = with_model(config, models[name])
        teller.say(f"size     {why_model(name, models, measured, minutes)}")
    chosen = ["model.", "data.vocab_size"] if choose else []
    if not asked(origins, "batch."):
        n = size.accumulate(measured.scaled_to(config.model), 60 * minutes)
        config = replace(config, batch=replace(config.batch, accumulate=n))
        chosen.append("batch.accumulate")
        teller.say(f"size     {n} × {measured.micro_tokens:,} tokens a step, by the compute that the minutes hold")
    keys = configs.flatten(config)
    return config, {k: SIZED if k.startswith(tuple(chosen)) else origins.get(k, "default") for k in keys}


def with_model(config: PretrainConfig, model: ModelConfig) -> PretrainConfig:
    return replace(config, model=model, data=replace(config.data, vocab_size=model.vocab_size))


def why_model(name: str, models: Mapping[str, ModelConfig], measured: size.Measured, minutes: float) -> str:
    """The choice in words, with its numbers and those of the next larger model."""
    reads = {n: size.tokens_per_active(model, measured, minutes) for n, model in models.items()}
    larger = list(models)[list(models).index(name) + 1 :][:1]
    words = f"{name}: in {minutes:g} minutes each of its {count_parameters(models[name]).active / 1e6:.1f}M active "
    words += f"parameters meets about {reads[name]:.2g} tokens ({TOKENS_PER_ACTIVE:g} are wanted"
    return words + (f", {larger[0]} would get {reads[larger[0]]:.2g})" if larger else ")")


def memory_step(config: PretrainConfig, device: str) -> memory.Step:
    return memory.Step(
        tokens=config.batch.context * config.batch.samples,
        optimizer=config.optim.matrices,
        dtype=config.dtype,
        precision=config.precision,
        scales=config.fp8.scales,
        moments=config.fp8.moments if config.precision == "fp8" else "fp32",
        accumulates=config.batch.accumulate > 1,
        recompute=config.recompute,
        device="cuda" if device == "cuda" else "cpu",
        own_products=cpu.makes_products(),
    )


def affordable_scores(config: PretrainConfig, measured: size.Measured, origins: Mapping[str, str]) -> PretrainConfig:
    """Fewer scores on the way where they would take more than their share of the minutes."""
    if config.minutes is None or not config.eval.times or asked(origins, "eval."):
        return config
    affordable = int(SCORES_SHARE * 60 * config.minutes / score_seconds(config, measured))
    times = min(config.eval.times, affordable + 1)  # the last one is the end's
    return replace(config, eval=replace(config.eval, times=times))


def score_seconds(config: PretrainConfig, measured: size.Measured) -> float:
    """Of one score on the way: a forward pass is about a third of a step."""
    return config.eval.tokens * measured.micro_seconds / 3 / measured.micro_tokens


def plan_of(config: PretrainConfig, measured: size.Measured, here: Here, teller: Teller) -> dict[str, Any]:
    """The predicted account, and why. Raises ResourceError where memory or minutes are too few."""
    machine, step = here.machine, memory_step(config, here.setup.device)
    need = memory.check(config.model, step, machine.memory_bytes)
    if config.minutes is not None:
        scores = max(0, config.eval.times - 1) * score_seconds(config, measured)
        plan = size.plan(measured, machine, config.minutes, step, scores, config.batch.accumulate)
        account, why = plan.account, plan.why
    else:
        assert config.steps is not None
        seconds = measured.step_seconds(config.batch.accumulate)
        account = cost.account(
            config.model, measured.context, config.steps * config.batch.tokens, config.steps * seconds,
            machine, config.dtype, mtp_share=config.loss.mtp_share, steps=config.steps,
            peak_memory_bytes=int(need.total * memory.OVERHEAD),
        )  # fmt: skip
        why = (f"{config.steps:,} steps of {config.batch.tokens:,} tokens were asked for; one took {seconds:.2f} s",)
    counts = count_parameters(config.model)
    teller.say(
        f"plan     {counts.total / 1e6:.1f}M parameters, {counts.active / 1e6:.1f}M active; {account.steps:,} steps, "
        f"{account.tokens / 1e6:.1f}M tokens, {account.tokens_per_second:,.0f} a second; "
        f"memory about {need.total * memory.OVERHEAD / 2**30:.1f} of {machine.memory_bytes / 2**30:.1f} GiB"
    )
    return {**asdict(account), "why": list(why), "machine": asdict(machine)}


def timed_step(config: PretrainConfig, corpus: Corpus, device: str) -> size.Measured:
    """Steps of a throw-away model on real text: the median of three after one that warms up, and of three updates.

    Windows of each length, and multi-token modules at work and at rest, are timed apart, and weighed by their shares of
    the run.
    """
    one = replace(config.batch, accumulate=1)
    trial = replace(config, batch=one, steps=1000, minutes=None)
    state, loader = TrainState(trial, device), training_loader(trial, corpus)
    steps_a_second = 0.0
    for (context, mtp), share in schedule.phases(config).items():
        windows = loader.cut(context)
        loss = replace(config.loss, mtp_from=0.0, mtp_weight=float(mtp), mtp_final=float(mtp))
        state.config = replace(trial, loss=loss)
        steps = [seconds_of(train_step, state, [windows.batch(i * windows.samples_per_batch)]) for i in range(4)]
        steps_a_second += share / median(steps[1:])  # progress goes by the clock
    seconds = 1 / steps_a_second
    zeros = [torch.zeros_like(slot.weight) for slot in state.optimizer.slots]
    update = median(seconds_of(state.optimizer.step, zeros, 5, 0.0, 1.0) for _ in range(3))
    micro, start = max(seconds - update, 1e-4), seconds_of_start(config, corpus, device)
    return size.Measured(
        config.model, mean_context(config, corpus), one.tokens, micro, update, config.loss.mtp_share, start
    )


def mean_context(config: PretrainConfig, corpus: Corpus) -> float:
    """How long the documents in windows are, as far as attention cares, over the run: by some batches of each phase."""
    loader, mean = training_loader(config, corpus), 0.0
    for (context, _), share in schedule.phases(config).items():
        windows = loader.cut(context)
        batches = [windows.batch(i * windows.samples_per_batch) for i in range(LOOKED_AT)]
        mean += share * flops.mean_context([n for b in batches for n in b.lengths])
    return mean


def seconds_of_start(config: PretrainConfig, corpus: Corpus, device: str) -> float:
    """What `init.pair_steps` will take: counting, and as many updates as asked, from none and one of them."""
    if not config.init.pair_steps:
        return 0.0
    m, at = config.model, torch.device(device)
    none, one = (seconds_of(pairs.fit, corpus.train, m.vocab_size, m.dim, steps, config.seed, at) for steps in (0, 1))
    return none + config.init.pair_steps * max(0.0, one - none)


def seconds_of(call, *args) -> float:
    """Until it is really done: a GPU's work is waited for."""
    began = time.perf_counter()
    call(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
