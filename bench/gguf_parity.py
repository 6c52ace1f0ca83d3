"""Whether llama.cpp computes our models from the GGUF files we write, of every architecture: `LLAMA_CPP=… python -m
bench.gguf_parity [--quick]`

Random weights, fp32 with an fp32 cache, prompts of 7, 64 and 300 tokens, the last of them far past a stretched context
of 64. What is written is also read here, and has to be the model that was written, number for number. `ours` is the
largest difference of any log-probability; the limit is 1e-4. V2's groups of experts are left out: llama.cpp takes a
group for its two best experts, DeepSeek's code for its best one.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from bench.models import random_model
from bench.parity import our_log_probs
from bench.peers import llama
from bench.record import emit
from bench.table import show
from shoal.data import gguf_tokenizer
from shoal.data.tokenizer import SPECIALS, Tokenizer
from shoal.model import hf
from shoal.model.config import GQAConfig, Llama3RopeConfig, MLAConfig, ModelConfig, MoEConfig, YarnConfig
from shoal.model.gguf_config import settings_of
from shoal.model.gguf_write import write
from shoal.model.transformer import Transformer

LIMIT, LENGTHS = 1e-4, (7, 64, 300)
ASCII = range(len(SPECIALS), len(SPECIALS) + 90)  # tokens that spell whole characters, or llama-server says nothing
LATENT = MLAConfig(4, kv_lora_rank=32, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, q_lora_rank=64)
V3 = ModelConfig(
    vocab_size=288,
    dim=128,
    n_layers=4,
    hidden_dim=256,
    attention=LATENT,
    moe=MoEConfig(16, 1, 4, 64, n_group=4, topk_group=2, routed_scaling_factor=2.5),
    max_positions=2560,
)
V2_LITE = replace(
    V3,
    n_layers=27,  # by which llama.cpp knows that queries have no latent
    attention=replace(LATENT, q_lora_rank=None),
    moe=MoEConfig(16, 2, 4, 64, scoring="softmax", norm_topk_prob=False),
)
LLAMA = replace(V3, attention=GQAConfig(4, 2, 32), moe=None, rope_theta=5e5)
ROWS = {
    "V3": V3,
    "V3, stretched": replace(V3, rope_scaling=YarnConfig(40.0, original=64)),
    "V2-Lite, stretched": replace(V2_LITE, rope_scaling=YarnConfig(40.0, 64, mscale=0.707, mscale_all_dim=0.707)),
    "Llama-3.1": replace(LLAMA, rope_scaling=Llama3RopeConfig(8.0)),
    "Llama, tied": replace(LLAMA, tie_embeddings=True),
    "Qwen2": replace(LLAMA, attention=GQAConfig(4, 2, 32, bias=True), rope_theta=1e6),
}


def main() -> None:
    if (what := llama.missing()) is not None:
        raise SystemExit(f"llama.cpp: missing: {what}")
    rows = dict(list(ROWS.items())[:2] if "--quick" in sys.argv else ROWS.items())
    with tempfile.TemporaryDirectory() as folder:
        found = {name: apart(config, Path(folder) / "model.gguf") for name, config in rows.items()}
    shown = [[row, *differences, LIMIT] for row, differences in found.items()]
    show(["log-probabilities apart", *(f"{n} tokens" for n in LENGTHS), "limit"], shown)
    ours = [max(differences) for differences in found.values()]
    emit(
        "gguf_parity",
        rows=list(found),
        ratio=[x / LIMIT for x in ours],
        ours=ours,
        peer="llama.cpp",
        spread=[[min(differences), max(differences)] for differences in found.values()],
        limit=LIMIT,
        lengths=LENGTHS,
        llama_cpp=llama.version(),
    )


@torch.no_grad()
def apart(config: ModelConfig, path: Path) -> list[float]:
    """The largest difference of any log-probability after each prompt."""
    model = random_model(config, seed=1).float()
    if config.tie_embeddings:
        model.head.weight = model.embed.weight
        model.head.weight *= config.dim**-0.5
    if config.moe and config.moe.scoring == "softmax":
        for bias in model.buffers():
            bias.zero_()  # of a router, of which there is none
    speechless = [i for i in range(config.vocab_size) if i not in ASCII]
    model.head.weight[speechless] = 0
    written(model, path)
    found = []
    with llama.serve(path, "-np", "1", "-c", "1024", "-fa", "off", "-ctk", "f32", "-ctv", "f32") as server:
        for length in LENGTHS:
            generator = torch.Generator().manual_seed(length)
            prompt = torch.randint(ASCII.start, ASCII.stop, (length,), generator=generator)
            asked = {"prompt": prompt.tolist(), "n_predict": 1, "n_probs": config.vocab_size, "temperature": 0}
            (step,) = server.post("/completion", asked)["completion_probabilities"]
            theirs = {top["id"]: top["logprob"] for top in step["top_logprobs"]}
            theirs_V = torch.tensor([theirs[token] for token in range(config.vocab_size)])
            found.append((our_log_probs(model, prompt)[-1] - theirs_V).abs().max().item())
    return found


def written(model: Transformer, path: Path) -> None:
    """A file of the model, which is the model when it is read."""
    config, state = model.config, model.state_dict()
    tokenizer = Tokenizer.train(["def f(x):\n    return x\n"] * 9, config.vocab_size)
    settings = settings_of(config, str(path)) | gguf_tokenizer.settings_of(tokenizer, config.vocab_size)
    write(path, config, lambda piece: piece.of(state[piece.ours]), "f32", settings)
    again = hf.load(path, torch.float32).state_dict()
    assert all(torch.equal(x, again[name]) for name, x in state.items()), config


if __name__ == "__main__":
    main()
