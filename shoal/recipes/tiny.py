"""Every mechanism in a model of a few hundred thousand parameters: for tests, and to see a run go by in seconds."""

from shoal.data.config import DataConfig
from shoal.model.presets import PRESETS
from shoal.train.config import BatchConfig, EvalConfig, PretrainConfig


def recipe() -> PretrainConfig:
    model = PRESETS["tiny"]
    return PretrainConfig(
        model,
        data=DataConfig(sources=("worked-arithmetic:2000",), vocab_size=model.vocab_size),
        batch=BatchConfig(context=64, samples=4, accumulate=2),
        eval=EvalConfig(times=2, tokens=1024, final_tokens=4096),
        steps=20,
    )
