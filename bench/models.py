"""The models that are held side by side, with random weights: build/bench/small, build/bench/large, build/bench/tiny;
in few bits as build/bench/large-int8, -int4, -fp8.

What weights say doesn't change how fast they are read, but where everything is nearly zero all tokens go to the same
experts and nobody sees a mistake. So they are drawn to keep activations at size one, with norms around one and router
biases that change what is chosen. The head's rows of special tokens are zero: greedy decoding never ends by itself. Nor
does it walk in circles, which would keep a few experts in the caches: of 129 tokens 99 to 122 were different ones.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import torch

from bench.shape import LARGE, SHAPE, TINY
from shoal.data.config import DataConfig
from shoal.data.corpus import prepare as prepare_corpus
from shoal.data.tokenizer import SPECIALS
from shoal.model import hf
from shoal.model.config import ModelConfig
from shoal.model.transformer import Transformer
from shoal.precision import convert

SHAPES = {"small": SHAPE, "large": LARGE, "tiny": TINY}
GROUPS = {"int8": 128, "int4": 128, "fp8": None}  # numbers with a scale
FOLDER = Path("build/bench")
PROMPT, DECODE, PREFILL = 16, 128, 512  # tokens: before decoding, decoded after the first one, and read at once


def folder(name: str) -> Path:
    return FOLDER / name


def prompt(seed: int, n: int) -> list[int]:
    """Random tokens, no special ones: nothing of it was ever in a cache."""
    return np.random.default_rng(seed).integers(len(SPECIALS), SHAPE.vocab_size, n).tolist()


def prepare(*names: str) -> None:
    """Draw and write what isn't there yet; later benches find the folders."""
    for name in names:
        if not folder(name).exists():
            base, _, form = name.partition("-")
            print(f"{'rounding' if form else 'drawing'} the weights of {folder(name)}", flush=True)
            if form:
                prepare(base)
                write_rounded(base, form)
            else:
                write(name)


def write(name: str) -> None:
    config = SHAPES[name]
    tokenizer = prepare_corpus(DataConfig(vocab_size=config.vocab_size)).tokenizer
    model = random_model(config, seed=1)
    model.head.weight.data[[tokenizer.special_id(s) for s in SPECIALS]] = 0
    fresh = FOLDER / f"{name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    hf.save(model, fresh, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    tokenizer.save(fresh)
    os.replace(fresh, folder(name))


def write_rounded(base: str, form: str) -> None:
    """As `shoal quantize` without a calibration does."""
    fresh = FOLDER / f"{base}-{form}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    convert.write(convert.Source(folder(base)), fresh, form, GROUPS[form])  # type: ignore[arg-type]
    for part in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(folder(base) / part, fresh)
    os.replace(fresh, folder(f"{base}-{form}"))


@torch.no_grad()
def random_model(config: ModelConfig, seed: int) -> Transformer:
    """Matrices bf16, norms and routers fp32."""
    with torch.device("meta"):
        model = Transformer(config).set_dtype(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, x in model.state_dict().items():
        if name.endswith("norm.weight"):
            x.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("router.bias"):
            x.normal_(0, 0.1, generator=generator)
        else:
            x.normal_(0, 1 if name == "embed.weight" else x.shape[-1] ** -0.5, generator=generator)
    return model
