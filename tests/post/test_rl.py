"""The loop: it learns what is rewarded, goes on to the bit, and won't learn from another model's answers."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from shoal.errors import ConfigError, ResourceError, TrainingError
from shoal.plan import memory
from shoal.post import grpo, rl, rollout
from shoal.post.rewards import RewardConfig
from shoal.post.rl import reinforce
from shoal.post.rl_config import JudgeConfig, PolicyConfig, RLConfig, RolloutConfig
from shoal.recipes import _plan, _reinforce
from shoal.recipes._teller import Teller
from shoal.run import Run
from shoal.tasks.catalog import resolve
from shoal.train.config import CheckpointConfig, OptimConfig, SafetyConfig
from shoal.train.loop import SKIPPED, steps_left
from tests.post.talks import model, tokenizer

TASKS = resolve("addition,chain_sum")
CONFIG = RLConfig(
    tasks="addition,chain_sum",
    levels=(1,),
    rollout=RolloutConfig(prompts=3, group=4, max_tokens=8),
    policy=PolicyConfig(variant="dr_grpo", mtp_weight=0.1),
    optim=OptimConfig(matrices="adamw", lr=3e-3, weight_decay=0.0),
    checkpoint=CheckpointConfig(steps=1, keep=9),
    steps=4,
    minutes=None,
    dtype="fp32",
)


SLICED = replace(
    CONFIG,
    rollout=RolloutConfig(prompts=6, group=2, max_tokens=9, slice=3),
    policy=replace(CONFIG.policy, minibatches=2, kl_weight=0.1, reference_steps=2),
)


def letters(config, prompt: str, text: str, outcome: str) -> float:
    """A reward that a random model earns now and then."""
    return sum(c.isalpha() and c.isascii() for c in text) / 8


@pytest.fixture(autouse=True)
def rewarded(monkeypatch):
    monkeypatch.setattr(rl, "reward", letters)


def trained(path: Path, config: RLConfig = CONFIG, resume: bool = False, seed: int = 0, **more):
    run = Run.open(path) if resume else Run.create("r1_zero", path, config, {}, ["shoal"])
    return run, reinforce(config, run, model(seed), tokenizer(), TASKS, resume=resume, **more)


def newest(run: Run) -> dict[str, torch.Tensor]:
    folder = max(run.checkpoints.glob("step-*"))
    return load_file(folder / "model.safetensors") | load_file(folder / "train_state/state.safetensors")


def samples(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.samples / rl.SAMPLES).read_text().splitlines()]


class Restless(rl.Rollouts):
    """Many tokens end an answer, so that answers of a random model differ in length."""

    def __init__(self, *args, **more):
        super().__init__(*args, **more)
        self.stops = frozenset(range(0, 512, 3))


def stopped_at(step: int, monkeypatch) -> None:
    """As if somebody pressed Ctrl-C in that step."""
    stops: list = []

    class Stopper(rl.Stop):
        def __init__(self, say):
            super().__init__(say)
            stops.append(self)

    def last(stage, clock):
        metrics = own(stage, clock)
        stops[-1].asked = "SIGINT" if stage.state.counters.step >= step else None
        return metrics

    own = rl.iterate
    monkeypatch.setattr(rl, "Stop", Stopper)
    monkeypatch.setattr(rl, "iterate", last)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["dr_grpo", "dapo"])
def test_what_is_rewarded_becomes_likelier(tmp_path, variant):
    config = replace(
        CONFIG,
        steps=15,
        checkpoint=CheckpointConfig(minutes=9),
        rollout=RolloutConfig(prompts=4, group=8, max_tokens=8),
        policy=replace(CONFIG.policy, variant=variant),
        optim=replace(CONFIG.optim, lr=1e-2),
    )
    run, _ = trained(tmp_path / "run", config)
    rewards = run.series("rl/reward")[1]
    assert sum(rewards[-3:]) > 1.3 * sum(rewards[:3]), rewards
    assert max(run.series("gap/mean")[1]) < 1e-5  # fp32: the engine's numbers are the trainer's


@pytest.mark.parametrize("sliced", [None, 3])
def test_a_run_goes_on_to_the_bit_with_answers_under_way(tmp_path, sliced, monkeypatch):
    config = replace(SLICED, rollout=replace(SLICED.rollout, slice=sliced))
    monkeypatch.setattr(rl, "Rollouts", Restless)
    whole, _ = trained(tmp_path / "whole", config)
    stopped_at(2, monkeypatch)
    half, state = trained(tmp_path / "half", config)
    assert state.counters.step < state.counters.total_steps and steps_left(state)
    with open(half.samples / rl.SAMPLES, "a") as file:  # what a kill leaves of a step that is met again
        file.write('{"step": 99}\n{"step": 4, "te')
    monkeypatch.undo()
    monkeypatch.setattr(rl, "reward", letters)
    monkeypatch.setattr(rl, "Rollouts", Restless)
    again, state = trained(tmp_path / "half", config, resume=True, seed=1)  # all must come from the checkpoint
    assert not steps_left(state)
    ours, theirs = newest(whole), newest(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert samples(whole) == samples(again)
    assert max(whole.series("rl/kl")[1]) > 0
    assert (0 < max(whole.series("rl/stale")[1]) < 1) == bool(sliced)


def longer(long: int):
    """Every so many prompts there is one that is too long."""

    class Longer(rl.Rollouts):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            own = self.draw
            self.draw = lambda index: replace(own(index), prompt=own(index).prompt * (1 if index % long else 99))

    return Longer


def test_prompts_without_room_for_an_answer_are_passed_over(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(rl, "Rollouts", longer(2))
    run, state = trained(tmp_path / "run", replace(CONFIG, steps=2))
    assert {line["index"] % 2 for line in samples(run)} == {1}
    assert state.counters.stage["rollouts"]["next_index"] == 12 and "prompts 0, 2, 4 leave no room" in caplog.text


def test_nothing_but_long_prompts_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "Rollouts", longer(1))
    monkeypatch.setattr(rollout, "MOST_PASSED_OVER", 9)
    with pytest.raises(ConfigError, match="raise --rollout.prompt_tokens"):
        trained(tmp_path / "run")


@pytest.mark.parametrize("every, drawn", [(1, False), (9, True)])
def test_a_renewed_reference_draws_nowhere(tmp_path, every, drawn):
    """KL is measured before the update: to the weights that a step begins with it is nought."""
    config = replace(CONFIG, steps=2, policy=replace(CONFIG.policy, kl_weight=0.1, reference_steps=every))
    run, _ = trained(tmp_path / "run", config)
    assert (run.series("rl/kl")[1][-1] > 1e-9) == drawn


def test_a_reference_is_renewed_by_a_step_that_teaches_nothing(tmp_path, monkeypatch):
    def taught(stage, clock):
        if stage.iteration:
            monkeypatch.setattr(rl, "reward", lambda *_: 1.0)
        return own(stage, clock)

    own = rl.iterate
    monkeypatch.setattr(rl, "iterate", taught)
    config = replace(CONFIG, steps=2, policy=replace(CONFIG.policy, kl_weight=0.1, reference_steps=1))
    _, state = trained(tmp_path / "run", config)
    assert state.counters.updates == 1
    assert all(torch.equal(state.stage[name], t) for name, t in state.model.state_dict().items())


def test_another_models_answers_end_the_run(tmp_path, monkeypatch):
    own = rl.engine_for
    monkeypatch.setattr(rl, "engine_for", lambda config, m: own(config, model(seed=7)))
    with pytest.raises(TrainingError, match="engine and trainer differ by"):
        trained(tmp_path / "run", replace(CONFIG, policy=replace(CONFIG.policy, most_gap=1e-4)))


def test_weights_that_changed_unannounced_end_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(rl.Rollouts, "synchronise", lambda self, version: None)
    with pytest.raises(TrainingError, match="rollouts of version 0 for weights of version"):
        trained(tmp_path / "run")


def test_groups_that_teach_nothing_make_no_update(tmp_path, monkeypatch):
    monkeypatch.setattr(rl, "reward", lambda *_: 1.0)
    before = {name: p.clone() for name, p in model().state_dict().items()}
    run, state = trained(tmp_path / "run", replace(CONFIG, steps=2))
    assert state.counters.step == 2 and state.counters.updates == 0 and run.series("rl/teaching")[1] == [0, 0]
    assert all(torch.equal(before[name], p) for name, p in state.model.state_dict().items())


def test_a_skipped_update_is_told_of_and_its_answers_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.train.step.fault", lambda state, loss, norm: "a spike")
    heard: list[str] = []
    config = replace(CONFIG, policy=replace(CONFIG.policy, minibatches=2), safety=SafetyConfig(most_skips=4))
    config = replace(config, checkpoint=CheckpointConfig(minutes=9))
    with pytest.raises(TrainingError, match="4 steps in a row were skipped, the last because of a spike"):
        trained(tmp_path / "run", config, say=heard.append)
    run = Run.open(tmp_path / "run")
    kept = [json.loads(line) for line in (run.logs / SKIPPED).read_text().splitlines()]
    assert run.series("train/skipped") == ([2], [2]) and [line["step"] for line in kept] == [2, 2, 4, 4]
    assert all(line["samples"] and line["why"] == "a spike" for line in kept) and len(heard) == 4


def test_a_failed_grader_is_no_evidence(tmp_path, monkeypatch):
    def grade(self, pairs):
        return ["failed" if i % 4 == 0 else "right" for i, _ in enumerate(pairs)]

    monkeypatch.setattr(rl.Graders, "grade", grade)
    monkeypatch.setattr(rl, "reward", lambda c, prompt, text, outcome: float(outcome == "right"))
    run, state = trained(tmp_path / "run", replace(CONFIG, steps=1))
    assert run.series("rl/failed")[1] == [0.25] and state.counters.updates == 0
    assert {line["reward"] for line in samples(run)} == {1.0}


def test_a_judge_that_scores_nothing_is_told_of_once(tmp_path):
    gone = JudgeConfig("http://127.0.0.1:9/v1", "judge", tries=1)
    config = replace(CONFIG, steps=2, rewards=RewardConfig(preference=0.5), judge=gone)
    heard: list[str] = []
    run, _ = trained(tmp_path / "run", config, say=heard.append)
    assert run.series("rl/unjudged")[1] == [1.0, 1.0]
    assert [words for words in heard if "127.0.0.1:9" in words and "scores nothing" in words] == heard


def test_samples_are_written_token_by_token(tmp_path):
    run, _ = trained(tmp_path / "run", replace(CONFIG, steps=1))
    lines = samples(run)
    assert len(lines) == rl.KEPT_GROUPS * CONFIG.rollout.group
    for line in lines:
        assert len(line["tokens"]) == len(line["logprobs"]) <= 8 and line["step"] == 1
        assert not line["ratios"] or all(abs(r - 1) < 1e-3 for r in line["ratios"])


@pytest.mark.parametrize("variant", ["dr_grpo", "gspo"])
def test_samples_have_the_advantages_that_are_learnt_from(tmp_path, variant):
    config = replace(CONFIG, steps=1, policy=replace(CONFIG.policy, variant=variant))
    lines = samples(trained(tmp_path / "run", config)[0])
    rewards_SG = torch.tensor([line["reward"] for line in lines]).reshape(-1, config.rollout.group)
    expected_SG = grpo.advantages(rewards_SG, grpo.VARIANTS[variant].by_std)
    assert [line["advantage"] for line in lines] == pytest.approx(expected_SG.flatten().tolist())
    assert rewards_SG.unique().numel() > 1


def test_a_step_that_does_not_fit_is_refused_before_it_begins(tmp_path, monkeypatch):
    """What is free goes to the cache first: one byte short of both is too little."""
    policy_model = model()
    cache, step = rl.cache_bytes(CONFIG, policy_model), rl.largest(CONFIG, policy_model)
    need = memory.of_training(policy_model.config, _plan.memory_step(step, "cpu")).total * memory.OVERHEAD
    run = Run.create("r1_zero", tmp_path / "run", CONFIG, {}, ["shoal"])
    silent = Teller(lambda words: None, lambda metrics: None)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=need + cache - 1))
    with pytest.raises(ResourceError, match="a training step of"):
        _reinforce.trained(CONFIG, run, policy_model, tokenizer(), TASKS, silent, False)
    assert run.status()["state"] == "created"
