"""llama.cpp as a peer: where its programs are, the file it reads, and whether it computes what we compute.

LLAMA_CPP names the folder with llama-bench and llama-server. The GGUF that speeds are measured on is ours to write, and
a file with rotated heads or without its groups would be as fast: so a fresh one is put to llama-server first, and its
log-probabilities of the whole vocabulary are held against our model's (`bench.agreement` does that exactly, in fp32).
"""

import os
import subprocess
from importlib.util import find_spec
from pathlib import Path

import torch

from bench import models
from bench.peers import gguf_file
from bench.servers import Server
from bench.shape import THREADS
from shoal.data.tokenizer import Tokenizer
from shoal.model import hf
from shoal.model.attend import Packed
from shoal.model.transformer import Transformer

PROGRAMS = ("llama-bench", "llama-server")
LENGTHS = (1, 7, 64, 200)  # of prompts that are compared
BF16_APART = 0.25  # mean difference of log-probabilities; without groups, or turned otherwise, it is 0.3 and more
APART = {"": BF16_APART, "q8_0": 0.4, "q4_0": 0.7}  # in few bits: the model itself is another


def missing() -> str | None:
    if not all(os.access(program(name), os.X_OK) for name in PROGRAMS):
        return f"build llama.cpp for this processor and set LLAMA_CPP to the folder of {' and '.join(PROGRAMS)}"
    return None if find_spec("gguf") else "pip install gguf"


def program(name: str) -> Path:
    return Path(os.environ.get("LLAMA_CPP", "")) / name


def version() -> str | None:
    if missing():
        return None
    said = subprocess.run([program("llama-server"), "--version"], capture_output=True, text=True)
    return (said.stdout + said.stderr).splitlines()[0]


def file(name: str) -> Path:
    return models.FOLDER / f"{name}.gguf"


def serve(gguf: Path, *flags: str) -> Server:
    """llama-server without its chat page and without caches of prompts."""
    fixed = ["-t", str(THREADS), "--no-ui", "--no-cache-prompt", "--cache-ram", "0", "--host", "127.0.0.1"]
    return Server("llama-server", [str(program("llama-server")), "-m", str(gguf), *fixed, *flags])


def prepare(*names: str) -> None:
    """Write the files that aren't there yet; nothing where the peer is missing. "large" is in bf16, "large-q8_0" in
    8 bits, "large-q4_0" in 4."""
    for name in names:
        if missing() or file(name).exists():
            continue
        base, _, form = name.partition("-")
        fresh, model = file(name).with_suffix(".new"), hf.load(models.folder(base))
        gguf_file.write(model, Tokenizer.load(models.folder(base)), fresh, form or None)
        worst = max(apart(model, fresh, "-fa", "on"))
        print(f"{file(name)}: log-probabilities {worst:.3f} from ours", flush=True)
        assert worst <= APART[form], f"{fresh} is not the model it was written from"
        os.replace(fresh, file(name))


@torch.inference_mode()
def apart(model: Transformer, gguf: Path, *flags: str) -> list[float]:
    """Mean difference of all log-probabilities after some prompts, ours by plain attention over all tokens."""
    vocab, found = model.config.vocab_size, []
    with serve(gguf, "-np", "1", "-c", "1024", *flags) as server:
        for seed, length in enumerate(LENGTHS):
            prompt = models.prompt(seed, length)
            ours_V = model(torch.tensor(prompt), torch.arange(length), Packed([length]))[-1].float().log_softmax(-1)
            asked = {"prompt": prompt, "n_predict": 1, "n_probs": vocab, "temperature": 0}
            (step,) = server.post("/completion", asked)["completion_probabilities"]
            theirs = {top["id"]: top["logprob"] for top in step["top_logprobs"]}
            theirs_V = torch.tensor([theirs[token] for token in range(vocab)])
            found.append((ours_V - theirs_V).abs().mean().item())
    return found
