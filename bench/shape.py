"""The shapes and the batches that every side of a speed or memory bench is given. Peers read the batches from a file.

107.5M parameters, 26M of them in matrices that multiply a token: DeepSeek-V3's architecture without its multi-token
module, which no peer trains. Eight rows of 512 tokens of real code (the interpreter's own library) make a step. `LARGE`
is for what only reads weights: 1.39B parameters, 193M of them a token's, more than any cache holds. `TINY`, 0.95M, is
for reinforcement learning, where a step is 128 answers: to the size of model that two cores teach to reason in minutes.
"""

from pathlib import Path

import numpy as np

from shoal.model.config import MLAConfig, ModelConfig, MoEConfig

SHAPE = ModelConfig(
    vocab_size=8192,
    dim=512,
    n_layers=8,
    hidden_dim=1536,
    attention=MLAConfig(
        n_heads=8, q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
    ),
    moe=MoEConfig(n_routed_experts=32, n_shared_experts=1, n_activated=4, moe_dim=256, n_group=4, topk_group=2),
    init_std=0.02,
)
LARGE = ModelConfig(
    vocab_size=8192,
    dim=1024,
    n_layers=14,
    hidden_dim=4096,
    attention=MLAConfig(
        n_heads=16, q_lora_rank=192, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64
    ),
    moe=MoEConfig(n_routed_experts=64, n_shared_experts=1, n_activated=6, moe_dim=512, n_group=4, topk_group=2),
)
TINY = ModelConfig(
    vocab_size=1024,
    dim=128,
    n_layers=4,
    hidden_dim=384,
    attention=MLAConfig(
        n_heads=4, q_lora_rank=64, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32
    ),
    moe=MoEConfig(n_routed_experts=8, n_shared_experts=1, n_activated=2, moe_dim=32, n_group=4, topk_group=2),
    init_std=0.02,
)
ROWS, CONTEXT, THREADS = 8, 512, 2
STEP_TOKENS = ROWS * CONTEXT
LEARNING_RATE, BETAS, WEIGHT_DECAY = 3e-4, (0.9, 0.95), 0.1

BATCHES = Path("build/bench/tokens.npy")
N_BATCHES = 64


def prepare_batches() -> None:
    """Tokenise enough of the library once; later benches find the file."""
    if BATCHES.exists():
        return
    from shoal.data.config import DataConfig
    from shoal.data.corpus import prepare

    tokens = prepare(DataConfig(vocab_size=SHAPE.vocab_size)).train.tokens
    BATCHES.parent.mkdir(parents=True, exist_ok=True)
    np.save(BATCHES, np.asarray(tokens[: N_BATCHES * STEP_TOKENS + 1]))


def batch(step: int) -> np.ndarray:
    """int64 [ROWS, CONTEXT + 1]: inputs are all columns but the last, targets all but the first."""
    tokens = np.load(BATCHES, mmap_mode="r")
    starts = (step % N_BATCHES) * STEP_TOKENS + CONTEXT * np.arange(ROWS)
    return np.stack([tokens[s : s + CONTEXT + 1] for s in starts]).astype(np.int64)
