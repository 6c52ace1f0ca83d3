"""R1-Zero: a base model learns to reason by reinforcement alone (arXiv 2501.12948, section 2.2).

Accuracy and format are the only rewards; no trace is shown after pretraining. The objective is DAPO's: every token
counts the same, so long thoughts are not diluted, and prompts that teach nothing are replaced. Rates and sizes are for
the models that two cores train in minutes; LOG.md has the trials. R1-Zero itself took 32 questions of 16 answers a
step, a rate of 3e-6, β 0.001, and up to 32,768 tokens an answer.
"""

from shoal.post.rewards import RewardConfig
from shoal.post.rl_config import PolicyConfig, RLConfig, RolloutConfig
from shoal.train.config import OptimConfig, ScheduleConfig


def recipe() -> RLConfig:
    return RLConfig(
        rollout=RolloutConfig(prompts=32, group=8, max_tokens=128),
        rewards=RewardConfig(accuracy=1.0, format=0.1),
        policy=PolicyConfig(variant="dapo", bias_speed=0.005),
        optim=OptimConfig(matrices="muon", lr=3e-4, beta2=0.95, weight_decay=0.0),
        schedule=ScheduleConfig(kind="wsd", warmup=0.05, decay=0.2),
        minutes=10.0,
    )
