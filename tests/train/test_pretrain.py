"""The loop around the steps: how far a run goes, what it looks at on the way, what it leaves when it must stop."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from shoal.data.config import DataConfig
from shoal.data.corpus import Corpus, prepare
from shoal.errors import ConfigError, ResourceError, TrainingError
from shoal.model.presets import PRESETS
from shoal.plan import flops
from shoal.run import Run
from shoal.tasks.catalog import GENERATORS
from shoal.train import loop
from shoal.train import pretrain as pretraining
from shoal.train import step as steps
from shoal.train.config import (
    BatchConfig,
    CheckpointConfig,
    EvalConfig,
    GrowthConfig,
    InitConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    SafetyConfig,
    ScheduleConfig,
)
from shoal.train.loop import Clock, Economy, begin, replan, steps_left
from shoal.train.loss import Score
from shoal.train.pretrain import (
    held_out_score,
    next_batches,
    prepare_weights,
    pretrain,
    score_due,
    scored,
    training_loader,
)
from shoal.train.schedule import learning_rate, phases
from shoal.train.step import Counters, TrainState, update_rate

TINY = PretrainConfig(PRESETS["tiny"], batch=BatchConfig(context=32, samples=2), dtype="fp32", steps=50)
BY_MINUTES = replace(TINY, steps=None, minutes=10.0)


class State(TrainState):
    """A run's place without a model."""

    def __init__(self, config: PretrainConfig, **counters):
        self.config, self.counters = config, Counters(**counters)

    def step(self) -> None:
        self.counters.progress, self.counters.step = self.next_progress, self.counters.step + 1


class Time:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        monkeypatch.setattr(loop.time, "perf_counter", lambda: self.now)


def run_through(state: State, clock: Clock, time: Time, seconds_of_step, score: float, save: float) -> list[float]:
    """The loop without its work; progress after every step. A score at each tenth, a save every 200 steps."""
    seen = []
    while steps_left(state):
        before = state.counters.progress
        state.step()
        time.now += seconds_of_step(state.counters.step)
        clock.stepped()
        replan(state, clock)
        if score_due(state, before):
            time.now += score
            clock.went_aside()
            replan(state, clock)
        if state.counters.step % 200 == 0:
            time.now += save
            clock.stall = clock.went_aside()
            replan(state, clock)
        seen.append(state.counters.progress)
    time.now += save
    clock.went_aside()
    return seen


def test_the_first_step_by_minutes_is_warmed_up():
    state = State(BY_MINUTES)
    begin(state, planned_steps=1500)
    assert state.counters.total_steps == 1500
    assert update_rate(state) == pytest.approx(BY_MINUTES.optim.lr / 15)  # the first of 15 steps of warm-up


@pytest.mark.parametrize("planned", [700, 1500, 3000])
def test_minutes_hold_steps_scores_and_saves_whatever_was_planned(planned, monkeypatch):
    time, state = Time(monkeypatch), State(BY_MINUTES)
    clock = begin(state, planned)
    progress = run_through(state, clock, time, lambda n: 20.0 if n == 300 else 0.4, score=3.0, save=1.0)
    assert 598 <= state.counters.seconds <= 600
    assert progress == sorted(progress) and progress[-1] > 0.99
    assert max(b - a for a, b in pairwise(progress) if b < 0.98) < 3 / len(progress)


def test_one_slow_step_takes_only_its_own_time_from_the_plan(monkeypatch):
    time, state = Time(monkeypatch), State(BY_MINUTES)
    clock = begin(state, 1500)
    totals = []
    for seconds in [0.4] * 3 + [8.0] + [0.4] * 3:
        state.step()
        time.now += seconds
        clock.stepped()
        replan(state, clock)
        totals.append(state.counters.total_steps)
    assert totals[:3] == [1500] * 3
    assert all(abs(total - (1500 - 7.6 / 0.4)) <= 1 for total in totals[3:])


def test_a_resumed_run_goes_as_far_as_it_is_asked_now():
    at = {"step": 20, "total_steps": 20, "progress": 1.0, "seconds": 60.0}
    state = State(replace(TINY, steps=40), **at)
    begin(state, None)
    assert (steps_left(state), state.counters.progress) == (20, 0.5)
    state = State(replace(BY_MINUTES, minutes=4.0), **at, minutes=1.0)
    begin(state, None)
    assert (steps_left(state), state.counters.progress) == (60, 0.25)
    state = State(replace(BY_MINUTES, minutes=1.0), **at, minutes=1.0)
    begin(state, None)
    assert (steps_left(state), state.counters.progress) == (0, 1.0)


@pytest.mark.parametrize("config", [replace(TINY, steps=57), replace(BY_MINUTES, minutes=0.5)])
@pytest.mark.parametrize("times", [0, 1, 4, 10])
def test_every_part_of_a_run_is_scored_once_and_its_end_is_not(config, times, monkeypatch):
    time, state = Time(monkeypatch), State(replace(config, eval=EvalConfig(times=times)))
    clock, scores = begin(state, 70), 0
    while steps_left(state):
        before = state.counters.progress
        state.step()
        time.now += 0.5 if state.counters.step % 7 else 1.0
        clock.stepped()
        replan(state, clock)
        scores += score_due(state, before)
    assert scores == max(0, times - 1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    config = DataConfig(("worked-arithmetic:200",), vocab_size=512)
    return prepare(config, GENERATORS, tmp_path_factory.mktemp("corpus") / "made")


def test_a_loader_for_filling_in_the_middle(corpus):
    plain, rearranged = (
        training_loader(replace(TINY, data=DataConfig(fim_rate=rate)), corpus).batch(0) for rate in (0.0, 1.0)
    )
    assert corpus.tokenizer.fim_ids.begin in rearranged.tokens_T and plain.lengths == rearranged.lengths


def test_windows_grow_where_they_are_asked_to_and_scores_follow(corpus, monkeypatch):
    """The score that ends the last short step is of short windows, too."""
    config = replace(TINY, batch=BatchConfig(32, 2), growth=GrowthConfig(8, 0.6), steps=10)
    state, loader, windows, seen = State(config, total_steps=10), training_loader(config, corpus), [], []
    state.model = None  # type: ignore[assignment]
    longest = lambda batches: max(next(batches).lengths[:-1])  # the last one fills up  # noqa: E731
    monkeypatch.setattr(
        pretraining, "evaluate", lambda model, batches, attend: seen.append(longest(batches)) or Score(0, 1, 1)
    )
    for _ in range(10):
        before, (made,) = state.counters.progress, next_batches(state, loader)
        assert len(made.tokens_T) == config.batch.tokens and max(made.lengths) <= len(made.tokens_T) // len(made.ids)
        windows.append(len(made.ids))
        state.counters.samples += len(made.ids)
        state.step()
        scored(state, corpus, before)
    assert windows == [8] * 6 + [2] * 4 and seen == [8] * 6 + [32] * 4


def test_a_run_has_phases_by_its_windows_and_modules():
    loss, grown = LossConfig(mtp_from=0.7, mtp_until=0.9), GrowthConfig(16, 0.6)
    late = replace(TINY, batch=BatchConfig(64, 1), growth=grown, loss=loss)
    shares = {(16, False): 0.6, (64, False): 0.1, (64, True): 0.3}
    assert phases(late) == pytest.approx(shares)
    assert phases(TINY) == pytest.approx({(32, True): 1.0})
    short = replace(late, batch=BatchConfig(16, 4), loss=LossConfig(mtp_weight=0, mtp_final=0))
    assert phases(short) == {(16, False): pytest.approx(1.0)}


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: replace(TINY, growth=GrowthConfig(12, 0.5)), "a divisor of batch.context"),
        (lambda: GrowthConfig(12), "both or neither"),
        (lambda: GrowthConfig(until=0.5), "both or neither"),
        (lambda: GrowthConfig(16, 1.0), "growth.until"),
    ],
)
def test_windows_that_cannot_grow_are_refused(make, said):
    with pytest.raises(ConfigError, match=said):
        make()


def test_the_step_that_ends_a_run_is_on_record_and_a_resumed_run_repeats_no_evidence(corpus, tmp_path, monkeypatch):
    config = replace(TINY, safety=SafetyConfig(most_skips=2), checkpoint=CheckpointConfig(steps=4), eval=EvalConfig(0))
    run = Run.create("tiny", tmp_path / "run", config, {}, ["shoal"])
    monkeypatch.setattr(steps, "fault", lambda state, loss, norm: 'a "bad" one' if state.counters.step >= 3 else None)
    for resume in (False, True):
        with pytest.raises(TrainingError, match="2 steps in a row"):
            pretrain(config, run, corpus, Economy(lambda lengths, mtp: 1.0, 1.0), resume=resume)
        assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4, 5]
        kept = [json.loads(line) for line in (run.logs / "skipped.jsonl").read_text().splitlines()]
        assert [line["step"] for line in kept] == [4, 5] and kept[1]["why"] == 'a "bad" one'
        assert kept[1]["samples"] == [8, 9]


def test_evidence_ends_at_line_ends_alone_wherever_a_kill_tore_it(tmp_path):
    path, text = tmp_path / "rollouts.jsonl", "a\u2028b\u2029c\x85d"
    lines = [json.dumps({"step": step, "text": text}, ensure_ascii=False) + "\n" for step in (1, 2)]
    path.write_bytes("".join(lines).encode() + '{"step": 1, "text": "…'.encode()[:-1])
    loop.forget_evidence(path, 1)
    assert path.read_text("utf-8") == lines[0]


@pytest.mark.slow
def test_a_fresh_run_starts_from_the_table(corpus):
    config = replace(TINY, init=InitConfig(embed_std=1.0, out_std=0.0, pair_steps=40, look_back=8.0))
    drawn, state = TrainState(config, "cpu"), TrainState(config, "cpu")
    prepare_weights(state, corpus.train, say=lambda words: None)
    assert state.counters.seconds > 0
    before, after = (held_out_score(s.model, corpus.val, corpus, config, None) for s in (drawn, state))
    assert after.bits_per_byte < 0.6 * before.bits_per_byte
    assert after.mtp_accept is not None and before.mtp_accept is not None and after.mtp_accept > before.mtp_accept
    for slot in state.optimizer.slots:
        assert torch.equal(slot.master, slot.weight.float()), slot.name


def test_resting_modules_are_no_work():
    always, late, never = (
        LossConfig(mtp_from=share, mtp_until=max(share, 0.5), mtp_final=0.1 * (share < 1)) for share in (0.0, 0.8, 1.0)
    )
    assert (always.mtp_share, never.mtp_share) == (1.0, 0.0) and late.mtp_share == pytest.approx(0.2)
    assert LossConfig(mtp_until=0.5, mtp_final=0.0).mtp_share == 0.5
    whole, without = (flops.training(TINY.model, 64, share) for share in (1.0, 0.0))
    assert without.mtp == 0 and without.total == pytest.approx(whole.total - whole.mtp)


def test_minutes_that_the_start_has_used_up_are_refused(monkeypatch):
    Time(monkeypatch)
    with pytest.raises(ResourceError, match="went into the start"):
        begin(State(replace(BY_MINUTES, minutes=0.1), seconds=6.5), 70)


@pytest.mark.parametrize(
    "make, key",
    [
        (lambda: BatchConfig(context=0), "batch.context"),
        (lambda: BatchConfig(accumulate=0), "batch.accumulate"),
        (lambda: OptimConfig(lr=float("nan")), "optim.lr"),
        (lambda: OptimConfig(lr=float("inf")), "optim.lr"),
        (lambda: OptimConfig(beta2=1.0), "optim.beta2"),
        (lambda: OptimConfig(clip=0.0), "optim.clip"),
        (lambda: ScheduleConfig(warmup=1.5), "schedule.warmup"),
        (lambda: ScheduleConfig(decay=-0.1), "schedule.decay"),
        (lambda: LossConfig(mtp_weight=-1), "loss.mtp_weight"),
        (lambda: LossConfig(bias_until=2), "loss.bias_until"),
        (lambda: EvalConfig(tokens=0), "eval.tokens"),
        (lambda: CheckpointConfig(keep=0), "checkpoint.keep"),
        (lambda: CheckpointConfig(minutes=0.0), "checkpoint.minutes"),
        (lambda: SafetyConfig(spike_nats=0.0), "safety.spike_nats"),
        (lambda: SafetyConfig(most_skips=0), "safety.most_skips"),
        (lambda: replace(TINY, steps=0), "steps"),
        (lambda: replace(BY_MINUTES, minutes=-1.0), "minutes"),
    ],
)
def test_settings_out_of_range_are_named(make, key):
    with pytest.raises(ConfigError) as e:
        make()
    assert e.value.got.startswith(f"{key} = ") and f"--{key}" in e.value.fix


@pytest.mark.parametrize("kind", ["wsd", "cosine", "v3"])
@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_schedules_hold_at_their_extremes(kind, warmup, decay):
    rates = [learning_rate(ScheduleConfig(kind, warmup, decay), p / 100) for p in range(1, 101)]
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[-1] == 1.0 if warmup == 1 else warmup == 0 or rates[29] == 1.0
