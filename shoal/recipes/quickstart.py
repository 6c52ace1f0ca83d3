"""The main job: V3's architecture at the size of this machine, on Python's own library source."""

from shoal.data.config import DataConfig
from shoal.model.presets import PRESETS
from shoal.train.config import BatchConfig, PretrainConfig

LADDER = ("nano", "mini", "midi")  # of presets, smallest first: what `shoal quickstart` chooses from on a CPU
TOKENS_PER_ACTIVE = 1.2  # tokens that an active parameter should at least see


def recipe() -> PretrainConfig:
    model = PRESETS["mini"]
    return PretrainConfig(
        model,
        data=DataConfig(sources=("python-stdlib",), vocab_size=model.vocab_size),
        batch=BatchConfig(context=512, samples=8),
        minutes=10.0,
    )
