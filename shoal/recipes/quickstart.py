"""The main job: V3's architecture at the size of this machine, on Python's own library source and on solutions of
problems, most of them without work. `shoal quickstart` goes on from there, stage by stage (`_chain.py`).

Sizes, rates and what is written down instead of learnt were chosen by held-out bits per byte, most of them after 300
to 500 steps; LOG.md has the trials, and what was never tried at full length.
"""

from shoal.data.config import DataConfig
from shoal.model.presets import PRESETS
from shoal.train.config import (
    BatchConfig,
    GrowthConfig,
    InitConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    SafetyConfig,
    ScheduleConfig,
)

LADDER = ("nano", "mini", "midi")  # of presets, smallest first: what `shoal quickstart` chooses from on a CPU
TOKENS_PER_ACTIVE = 1.2  # tokens that an active parameter should at least see

MINUTES = 15.0  # of the whole chain, where nobody says
SHARES = {  # of the minutes of `shoal quickstart`, by stage; what is left is for the evaluations at the end
    "pretrain": 0.34,
    "r1_zero": 0.18,
    "cold_start": 0.04,
    "reasoning": 0.12,
    "samples": 0.03,
    "tuning": 0.05,
    "r1": 0.08,
    "teaching": 0.03,
    "student": 0.08,
}
LEAST_MINUTES = 0.35  # of pretraining, however few there are for the whole
STUDENT = "nano"  # a preset, with fresh weights


def shares(minutes: float) -> dict[str, float]:
    """The table for so many minutes: where they are few, pretraining gets what its five steps need."""
    return SHARES | {"pretrain": max(SHARES["pretrain"], min(1.0, LEAST_MINUTES / minutes))}


def recipe() -> PretrainConfig:
    model = PRESETS["mini"]
    return PretrainConfig(
        model,
        data=DataConfig(sources=("python-stdlib", "solutions:150000@6"), vocab_size=model.vocab_size),
        batch=BatchConfig(context=2048, samples=2),
        growth=GrowthConfig(context=512, until=0.7),
        init=InitConfig(embed_std=1.0, out_std=0.0, pair_steps=32, look_back=8.0),
        optim=OptimConfig(matrices="muon", lr=8e-3, embed_lr=3.0, head_lr=0.3, beta1=0.8, momentum=0.9),
        schedule=ScheduleConfig(kind="wsd", warmup=0.02, decay=0.6),
        loss=LossConfig(mtp_from=0.85, mtp_until=0.92, bias_speed=0.005),
        safety=SafetyConfig(spike_nats=3.0),  # two long windows may both be of the harder text
        minutes=10.0,
    )
