"""Fine-tuning on conversations: two epochs, a cosine to a tenth, as R1 was tuned on its own samples.

The rate is for the small models we train here. Larger ones want less: R1's students took 1e-4 at 1.5B parameters, and
down to 2e-5 at 70B.
"""

from shoal.post.config import SftConfig
from shoal.train.config import BatchConfig, OptimConfig


def recipe() -> SftConfig:
    return SftConfig(
        batch=BatchConfig(context=1024, samples=4),
        optim=OptimConfig(matrices="adamw", lr=1e-3, weight_decay=0.0),
    )
