"""A teacher's right answers, four tries a problem, learnt for two epochs with a cosine to a tenth, as by R1's students.

The rate is for small students (see recipes/sft.py); fresh ones want more epochs.
"""

from shoal.post.config import DistillConfig
from shoal.train.config import BatchConfig, OptimConfig


def recipe() -> DistillConfig:
    return DistillConfig(
        batch=BatchConfig(context=1024, samples=4),
        optim=OptimConfig(matrices="muon", lr=4e-3, embed_lr=3.0, head_lr=0.3, weight_decay=0.0),
    )
