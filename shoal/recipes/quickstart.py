"""The main job: V3's architecture at the size of this machine, on Python's own library source."""

from shoal.data.config import DataConfig
from shoal.model.presets import PRESETS
from shoal.train.config import BatchConfig, PretrainConfig


def recipe() -> PretrainConfig:
    model = PRESETS["mini"]
    return PretrainConfig(
        model,
        data=DataConfig(sources=("python-stdlib",), vocab_size=model.vocab_size),
        batch=BatchConfig(context=512, samples=8),
        minutes=10.0,
    )
