"""A student corrected by its teacher: it comes closer, on weights that the engine shares, and resumes to the bit."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from shoal.data.chat import Chat
from shoal.data.tokenizer import Tokenizer
from shoal.errors import DataError, ModelError
from shoal.post import on_policy as module
from shoal.post.config import DistillConfig, SamplingConfig
from shoal.post.distill import require_one_vocabulary
from shoal.post.on_policy import distill_on_policy
from shoal.post.selection import Prompt
from shoal.run import Run
from shoal.train.config import BatchConfig, CheckpointConfig, OptimConfig
from tests.post.talks import ROWS, model, tokenizer

PROMPTS = [Prompt(row[0]) for row in ROWS[:6]]
TEACHER = model(9, init_std=0.2)
CONFIG = DistillConfig(
    batch=BatchConfig(context=32, samples=1),
    optim=OptimConfig(matrices="adamw", lr=2e-2, weight_decay=0.0),
    checkpoint=CheckpointConfig(steps=1),
    sampling=SamplingConfig(max_tokens=3),
    samples=2,
    group=1,
    epochs=None,
    steps=2,
    dtype="fp32",
)


def distilled(path, config=CONFIG, resume=False, student_seed=0):
    run = Run.open(path) if resume else Run.create("distill", path, config, {}, ["shoal"])
    return run, distill_on_policy(
        config, run, model(student_seed), model(9, init_std=0.2), tokenizer(), PROMPTS, resume
    )


def test_the_student_comes_closer(tmp_path):
    whole, state = distilled(tmp_path / "whole", replace(CONFIG, group=3, steps=3))
    kl = whole.series("train/loss")[1]
    assert kl[-1] < kl[0] and state.counters.samples == 3 * 6
    assert 1 <= whole.series("rollout/tokens")[1][0] <= 3


def test_a_killed_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    whole, _ = distilled(tmp_path / "whole")
    step = module.TeacherKL.__call__
    calls = []

    def dying(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(module.TeacherKL, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        distilled(tmp_path / "half")
    monkeypatch.setattr(module.TeacherKL, "__call__", step)
    half, _ = distilled(tmp_path / "half", resume=True, student_seed=3)
    ours, theirs = (load_file(run.checkpoints / "step-000002/model.safetensors") for run in (whole, half))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert whole.series("train/loss") == half.series("train/loss")


def test_prompts_without_room_are_left_out():
    said = []
    short = module.questions([*PROMPTS, Prompt("x" * 99)], Chat(tokenizer()), 31, said.append)
    assert len(short) == 6 and "1 too long" in said[0]
    with pytest.raises(DataError, match="no prompt of at most 2"):
        module.questions(PROMPTS, Chat(tokenizer()), 2, said.append)


def test_another_vocabulary_is_refused():
    other = Tokenizer.train(["quite another text, with other words"], 300)
    require_one_vocabulary(model(), tokenizer(), model(1), tokenizer())
    with pytest.raises(ModelError, match="not the same"):
        require_one_vocabulary(model(), tokenizer(), model(1), other)
