"""What the field did before: a dense decoder in fp32, AdamW, a cosine, the next token only. A baseline to be beaten.

It has what any good decoder of 2023 has (rotary positions, SwiGLU, RMS norms, no dropout), so that what is measured
against it is the frontier's recipe and not a weak opponent. Same text, same loop, same held-out score as ours.
"""

from shoal.data.config import DataConfig
from shoal.model.config import GQAConfig, ModelConfig
from shoal.train.config import BatchConfig, LossConfig, OptimConfig, PretrainConfig, ScheduleConfig


def recipe() -> PretrainConfig:
    model = ModelConfig(
        vocab_size=4096,
        dim=256,
        n_layers=5,
        hidden_dim=704,
        attention=GQAConfig(n_heads=4, n_kv_heads=4, head_dim=64),
        init_std=0.02,
    )
    return PretrainConfig(
        model,
        data=DataConfig(sources=("python-stdlib",), vocab_size=model.vocab_size),
        batch=BatchConfig(context=512, samples=8),
        optim=OptimConfig(matrices="adamw", lr=1e-3, beta2=0.95),
        schedule=ScheduleConfig(kind="cosine", warmup=0.02, final=0.1),
        loss=LossConfig(mtp_weight=0.0, mtp_final=0.0),
        dtype="fp32",
        minutes=10.0,
    )
