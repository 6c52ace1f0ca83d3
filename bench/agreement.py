"""Whether llama.cpp computes our model from the GGUF we write: `python -m bench.agreement`

Log-probabilities of the whole vocabulary after prompts of several lengths, mean difference, random weights. In fp32
with an fp32 cache they must be equal but for rounding; in bf16, which speeds are measured in, the two round in
different places (llama.cpp keeps the residual stream in fp32, we in bf16), and experts that score alike may be swapped.
"""

import argparse

import torch

from bench import models
from bench.peers import gguf_file, llama
from bench.record import emit
from bench.table import show
from shoal.data.tokenizer import Tokenizer
from shoal.model import hf

FP32_APART = 1e-4


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if (what := llama.missing()) is not None:
        raise SystemExit(f"llama.cpp: missing: {what}")
    models.prepare("small", "large")
    llama.prepare("small", "large")
    found = {"small, fp32": in_fp32("small")}
    for name in ("small", "large"):
        found[f"{name}, bf16"] = llama.apart(hf.load(models.folder(name)), llama.file(name), "-fa", "on")
    limits = [FP32_APART, llama.BF16_APART, llama.BF16_APART]
    show(
        ["log-probabilities apart", *(f"{n} tokens" for n in llama.LENGTHS), "limit"],
        [[row, *apart, limit] for (row, apart), limit in zip(found.items(), limits)],
    )
    ours = [max(apart) for apart in found.values()]
    emit(
        "agreement",
        rows=list(found),
        ratio=[apart / limit for apart, limit in zip(ours, limits)],
        ours=ours,
        peer="llama.cpp",
        spread=[[min(apart), max(apart)] for apart in found.values()],
        limit=limits,
        lengths=llama.LENGTHS,
    )


def in_fp32(name: str) -> list[float]:
    model, gguf = hf.load(models.folder(name), torch.float32), models.FOLDER / "fp32.gguf"
    try:
        gguf_file.write(model, Tokenizer.load(models.folder(name)), gguf)
        return llama.apart(model, gguf, "-fa", "off", "-ctk", "f32", "-ctv", "f32")
    finally:
        gguf.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
