"""Fine-tuning from end to end: it learns, stops, goes on to the bit, and refuses what has changed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shoal.errors import ConfigError, DataError
from shoal.model import hf
from shoal.model.config import GQAConfig
from shoal.model.transformer import Transformer
from shoal.post import sft as module
from shoal.post.config import SftConfig, TuningConfig
from shoal.post.packing import samples_of
from shoal.post.sft import sft
from shoal.run import Run
from shoal.train.config import BatchConfig, CheckpointConfig, LossConfig, OptimConfig
from shoal.train.loop import steps_left
from tests.post.talks import model, talks, tokenizer

CONFIG = SftConfig(
    batch=BatchConfig(context=64, samples=2, accumulate=2),
    optim=OptimConfig(matrices="adamw", lr=1e-2, weight_decay=0.0),
    loss=LossConfig(mtp_weight=0.3),
    checkpoint=CheckpointConfig(steps=2),
    epochs=2.0,
    dtype="fp32",
)


def trained(path: Path, config: TuningConfig = CONFIG, resume: bool = False, seed: int = 0):
    samples = samples_of(talks()[:20], tokenizer(), config.batch.context)
    run = Run.open(path) if resume else Run.create("sft", path, config, {}, ["shoal"])
    return run, sft(config, run, model(seed), tokenizer(), samples, resume)


def newest(run: Run) -> dict[str, torch.Tensor]:
    folder = max(run.checkpoints.glob("step-*"))
    return load_file(folder / "model.safetensors") | load_file(folder / "train_state/state.safetensors")


def test_a_stopped_run_goes_on_to_the_bit(tmp_path, monkeypatch):
    whole, state = trained(tmp_path / "whole")
    assert state.counters.samples == pytest.approx(2 * 20, abs=8) and not steps_left(state)
    step = module.train_step

    class Stopper(module.Stop):
        def __init__(self, say):
            super().__init__(say)
            steppers.append(self)

    steppers: list[Stopper] = []

    def third(state, *args):
        if state.counters.step == 2:
            steppers[-1].asked = "SIGINT"
        return step(state, *args)

    monkeypatch.setattr(module, "Stop", Stopper)
    monkeypatch.setattr(module, "train_step", third)
    run, state = trained(tmp_path / "half")
    assert state.counters.step == 3 and steps_left(state)
    monkeypatch.setattr(module, "train_step", step)
    again, _ = trained(tmp_path / "half", resume=True, seed=1)  # another model: all must come from the checkpoint
    ours, theirs = newest(whole), newest(again)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    a, b = ([{k: m[k] for k in ("step", "train/loss", "train/mtp_loss")} for m in r.metrics()] for r in (whole, again))
    assert a == b


def test_it_learns_and_leaves_a_model_folder(tmp_path):
    run, _ = trained(tmp_path / "run", replace(CONFIG, epochs=4.0, checkpoint=CheckpointConfig()))
    losses = run.series("train/loss")[1]
    assert losses[-1] < 0.75 * losses[0]
    assert run.series("train/epoch")[1][-1] == 4 and "speed/mfu" not in run.metrics()[0]
    folder = max(run.checkpoints.glob("step-*"))
    assert {"config.json", "tokenizer.json", "generation_config.json"} <= {p.name for p in folder.iterdir()}
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]


def test_dense_students_learn_too(tmp_path):
    """A Qwen2's shape: grouped queries with biases, no experts, no multi-token module, tied ends."""
    shape = replace(model().config, attention=GQAConfig(4, 2, 16, bias=True), moe=None, n_mtp=0, tie_embeddings=True)
    run = Run.create("sft", tmp_path / "run", CONFIG, {}, ["shoal"])
    samples, student = samples_of(talks(), tokenizer(), 64), Transformer(shape).init_weights(0)
    sft(replace(CONFIG, epochs=None, steps=3), run, student, tokenizer(), samples)
    losses = run.series("train/loss")[1]
    assert losses[-1] < losses[0] and hf.load(run.checkpoints / "step-000003").config.attention == shape.attention


def test_other_samples_are_refused_on_resume(tmp_path):
    run, _ = trained(tmp_path / "run", replace(CONFIG, epochs=None, steps=1))
    fewer = samples_of(talks()[1:], tokenizer(), 64)
    with pytest.raises(DataError, match="have changed since it began"):
        sft(CONFIG, run, model(), tokenizer(), fewer, resume=True)


def test_one_budget_and_no_other():
    with pytest.raises(ConfigError, match=r"epochs 2 and steps 3"):
        SftConfig(steps=3)
    with pytest.raises(ConfigError, match="none of epochs"):
        SftConfig(epochs=None)
    assert replace(CONFIG, epochs=None, minutes=1.0).training(model().config, None).minutes == 1.0
