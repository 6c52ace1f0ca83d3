"""Fine-tuning on conversations: two epochs, a cosine to a tenth, as R1 was tuned on its own samples.

Rule and rates are for the small models we train here, which saw Muon before: on a task new to such a model 200 steps of
AdamW at 3e-3 came to 0.37 nats, of Muon at 5e-3 to 0.12. Large models were made with AdamW and want far less: R1's
students took 1e-4 at 1.5B parameters, and down to 2e-5 at 70B.
"""

from shoal.post.config import SftConfig
from shoal.train.config import BatchConfig, OptimConfig


def recipe() -> SftConfig:
    return SftConfig(
        batch=BatchConfig(context=1024, samples=4),
        optim=OptimConfig(matrices="muon", lr=4e-3, embed_lr=3.0, head_lr=0.3, weight_decay=0.0),
    )
