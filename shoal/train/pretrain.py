"""Pretraining: the loop, as it happens. Batches in, steps, now and then a score or a checkpoint, a way to stop.

What the loop needs from other rooms is handed in: an open corpus, a run directory, and an `Economy` (what a token costs
here), so that nothing in it depends on how a run was planned or is shown.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import closing

import torch

from shoal.data.corpus import Corpus, Split
from shoal.data.loader import Batch, Loader, eval_batches
from shoal.model.attend import Packed
from shoal.model.mtp import MTP
from shoal.model.transformer import Transformer
from shoal.run import Run
from shoal.train import pairs, schedule
from shoal.train.checkpoint import Saver
from shoal.train.config import PretrainConfig
from shoal.train.loop import (
    Economy,
    begin,
    keep_evidence,
    measured,
    model_writer,
    replan,
    restore,
    save,
    save_due,
    steps_left,
    stop_after_too_many_skips,
)
from shoal.train.loss import Score, evaluate
from shoal.train.offsets import look_back
from shoal.train.step import TrainState, train_step
from shoal.train.stop import Stop

EVAL_TOKENS = 4096  # held-out tokens at a time


def pretrain(
    config: PretrainConfig,
    run: Run,
    corpus: Corpus,
    economy: Economy,
    planned_steps: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    show: Callable[[Mapping[str, float]], None] = lambda metrics: None,
    say: Callable[[str], None] = lambda words: None,
) -> TrainState:
    """Train until the budget is spent, or until asked to stop (then a checkpoint is left and `steps_left` is above 0).

    `planned_steps` is what a run by minutes begins with, until its own pace is known. `show` gets every logged line,
    `say` what a user should read. Raises TrainingError, ResourceError, CheckpointError.
    """
    corpus.check_vocabulary(config.model.vocab_size)
    state = TrainState(config, device)
    if state.note:
        say(state.note)
    if resume:
        restore(state, run, say)
    loader = training_loader(config, corpus)
    saver = Saver(run.checkpoints, model_writer(config.model, corpus.tokenizer), config.checkpoint.keep)
    saved, stall = state.counters.step, {}
    with Stop(say) as stop, closing(saver):  # a save under way is finished, whatever ends the loop
        if not saved:
            prepare_weights(state, corpus.train, say)
        clock = begin(state, planned_steps)
        while steps_left(state) and not stop.asked:
            before, batches = state.counters.progress, next_batches(state, loader)
            result = train_step(state, batches)
            clock.stepped()
            replan(state, clock)
            metrics = measured(state, result, batches, clock, economy)
            if result.skipped:
                keep_evidence(state, run, batches, result, say)
            if score_due(state, before):
                metrics |= scored(state, corpus, before)
                clock.went_aside()
                replan(state, clock)
            run.log(state.counters.step, metrics | stall)  # before the save: a resumed run never lacks a line
            show({"step": state.counters.step, "total_steps": state.counters.total_steps, **metrics})
            stop_after_too_many_skips(state, result)
            stall = {}
            if save_due(state, clock, saved):
                saved = state.counters.step
                stall = {"time/save_stall": save(saver, state, clock)}  # goes into the next line
                replan(state, clock)
            saver.check()
        if saved != state.counters.step:
            save(saver, state, clock)
    state.end()
    return state


def prepare_weights(state: TrainState, split: Split, say: Callable[[str], None]) -> None:
    """What `init` asks for beyond random numbers, before the first step. The time it takes is training time."""
    began, c, model = time.perf_counter(), state.config, state.model
    if c.init.pair_steps:
        say("counting which token follows which, for embedding and head to start from")
        embed_VD, head_VD = pairs.fit(split, c.model.vocab_size, c.model.dim, c.init.pair_steps, c.seed, state.device)
        model.embed.weight.data.copy_(embed_VD)
        model.head.weight.data.copy_(head_VD)
        for module in model.mtp:  # the same table, for the token after the next
            assert isinstance(module, MTP)
            module.proj.weight.data.copy_(torch.eye(c.model.dim, 2 * c.model.dim))
    if c.init.look_back:
        look_back(model, c.init.look_back)
    state.optimizer.adopt()
    state.counters.seconds += time.perf_counter() - began


def next_batches(state: TrainState, loader: Loader) -> list[Batch]:
    b, c = state.config.batch, state.counters
    loader = loader.cut(schedule.context(state.config, c.progress))
    return [loader.batch(c.samples + i * loader.samples_per_batch) for i in range(b.accumulate)]


def training_loader(config: PretrainConfig, corpus: Corpus) -> Loader:
    b, d = config.batch, config.data
    lengths, fim = corpus.tokenizer.byte_lengths(), corpus.tokenizer.fim_ids if d.fim_rate else None
    return Loader(corpus.train, lengths, b.context, b.samples, config.seed, d.mask_documents, d.fim_rate, fim)


def score_due(state: TrainState, before: float) -> bool:
    """Whether the step from progress `before` ended another 1/times of the run. Whoever reports scores the end."""
    times = state.config.eval.times
    done, passed = (int(p * times + 1e-9) for p in (before, state.counters.progress))
    return done < passed < times


def scored(state: TrainState, corpus: Corpus, progress: float) -> dict[str, float]:
    """On the way, at `progress`: held-out bits per byte, and how often a second token would be accepted."""
    config = state.config
    score = held_out_score(state.model, corpus.val, corpus, config, config.eval.tokens, progress)
    found = {"eval/bits_per_byte": score.bits_per_byte}
    return found if score.mtp_accept is None else found | {"eval/mtp_accept": score.mtp_accept}


def held_out_score(
    model: Transformer,
    split: Split,
    corpus: Corpus,
    config: PretrainConfig,
    tokens: int | None,
    progress: float = 1.0,
) -> Score:
    """In windows as long as those that the model trains on by then."""
    context = config.eval.context or schedule.context(config, progress)
    lengths = corpus.tokenizer.byte_lengths()
    batches = eval_batches(split, lengths, context, max(context, EVAL_TOKENS), tokens)
    return evaluate(model, batches, Packed)
