"""`shoal quantize MODEL --weights int4 --out DIR`: a model in few bits, and what that costs.

Rounded to the nearest, or with `--calibrate` in the light of what a text makes the matrices be multiplied with; then
the folder is held against the bf16 model on text that neither was made with: the standard library's held-out files.
"""

import argparse
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.cli.export import FORMS, add_group, group_of, shard_size, whole_output, write_in_few_bits
from shoal.cli.opened import MODEL_HELP, check_vocabulary, model_folder
from shoal.errors import ConfigError, DataError, ResourceError
from shoal.plan.memory import gib

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from shoal.data.corpus import Corpus
    from shoal.precision.convert import Make

LIBRARY, NONE = "library", "none"
WINDOW = 512  # tokens of a document, as calibration and report read them
STATES = 5  # of a token, at most, in memory at once


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal quantize", description="Write a model in few bits; say what it costs.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--weights", required=True, choices=FORMS, help="what matrices become")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to make")
    add_group(parser)
    parser.add_argument(
        "--calibrate",
        metavar="TEXTFILE",
        help=f"for int4: text that it is made with, or {LIBRARY!r} (default), the training part of the standard "
        f"library, or {NONE!r}: to the nearest",
    )
    parser.add_argument(
        "--tokens", type=int, default=16384, help="of text to calibrate with, and as many to report on; 0: no report"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of one file, such as 500MB; default 5GB")
    args = parser.parse_args(argv)
    group, shard_bytes, calibrate = group_of(args.weights, args.group), shard_size(args.max_shard_size), text_of(args)
    source = model_folder(args.model)
    with whole_output(args.out) as part:
        corpus = stdlib(source) if args.tokens else None  # first, in case there can be none
        make = None if calibrate == NONE else calibration(source, calibrate, args.tokens, group, corpus)
        print(write_in_few_bits(source, part, args.weights, group, shard_bytes, make), args.out)
        if corpus:
            facts = {"weights": args.weights, "group": group, "calibrated_with": calibrate}
            report(source, part, facts, args.tokens, corpus)
    return 0


def text_of(args: argparse.Namespace) -> str:
    """What to calibrate with. Raises ConfigError where there is nothing to calibrate or nothing to do it with."""
    given = args.calibrate or (LIBRARY if args.weights == "int4" else NONE)
    if given != NONE and args.weights != "int4":
        got = f"--calibrate for {args.weights}"
        raise ConfigError(got, "--weights int4: with 8 bits nothing is gained", "leave --calibrate out")
    if args.tokens and args.tokens < WINDOW:
        raise ConfigError(f"--tokens {args.tokens}", f"0, or at least {WINDOW}", "ask for more")
    if not args.tokens and given != NONE:
        raise ConfigError("calibration with --tokens 0", "some text", "add --calibrate none, or leave --tokens out")
    return given


def calibration(source: Path, text: str, tokens: int, group: int | None, corpus: "Corpus | None") -> "Make":
    from shoal.precision.calibrate import Calibration

    assert group is not None
    if text == LIBRARY:
        assert corpus, "text_of has seen to it"
        found = corpus.train.tokens
    else:
        from shoal.cli.score import read_text
        from shoal.data.tokenizer import Tokenizer

        found = Tokenizer.load(source).encode(read_text(Path(text)))
    return Calibration(source, windows(source, found, tokens, text), group)


def stdlib(source: Path) -> "Corpus":
    """The standard library in the model's own tokens."""
    from shoal.data.config import DataConfig
    from shoal.data.corpus import prepare
    from shoal.model import hf

    corpus = prepare(DataConfig(tokenizer=str(source)), say=print)
    check_vocabulary(corpus.tokenizer.vocab_size, hf.load_config(source).vocab_size)
    return corpus


def windows(source: Path, text: "list[int] | np.ndarray", tokens: int, name: str) -> "Tensor":
    """Windows [W, T] from all over a text, as many as make so many tokens; T has room in the model's context."""
    import numpy as np
    import torch

    from shoal.model import hf

    config = hf.load_config(source)
    T = min(WINDOW, config.max_positions)
    whole = len(text) // T
    if not whole:
        raise DataError(f"{name} of {len(text)} tokens", f"at least {T}", "give more text")
    check_states(min(whole, tokens // T) * T, config.dim)
    chosen = np.unique(np.linspace(0, whole - 1, min(whole, tokens // T)).astype(int))
    return torch.from_numpy(np.asarray(text[: whole * T], dtype=np.int64).reshape(whole, T)[chosen])


def check_states(tokens: int, dim: int) -> None:
    """The states that stand side by side, fp32 [tokens, dim] each, must fit into memory. At most they are STATES: the
    report has what a layer of either model takes, what one gave, and what the other gives, in parts and put together;
    calibration as many before a multi-token module. Raises ResourceError."""
    from shoal import runtime

    a_token, free = STATES * 4 * dim, runtime.free_bytes()
    if tokens * a_token > free:
        got = f"hidden states of {tokens:,} tokens need {gib(tokens * a_token)}, {gib(free)} are free"
        raise ResourceError(got, "a text whose states fit in memory", "ask for fewer --tokens; 16384 do")


def report(source: Path, part: Path, facts: dict, tokens: int, corpus: "Corpus") -> None:
    """Print the table; leave quality.json and quality.md in the folder."""
    from shoal.model.hf_files import write_json
    from shoal.precision import convert, quality

    text = windows(source, corpus.val.tokens, tokens, "the held-out text")
    spelled = int(corpus.tokenizer.byte_lengths()[text[:, 1:].numpy()].sum())
    q = quality.compare(part, source, text, spelled)
    sizes = convert.sizes(convert.Source(source), facts["weights"], facts["group"])
    found = facts | {
        "bytes": sizes.whole,
        "share_of_fp32": sizes.whole / sizes.whole_fp32,
        "matrices_share_of_fp32": sizes.matrices / sizes.matrices_fp32,
        "text": f"{q.tokens:,} held-out tokens of the standard library",
        "more_bits": q.loss,
        **asdict(q),
    }
    write_json(part / "quality.json", found)
    table = written(found)
    (part / "quality.md").write_text(table, encoding="utf-8")
    print(table, end="")


def written(found: dict) -> str:
    how = (
        f"calibrated with {found['calibrated_with']}" if found["calibrated_with"] != NONE else "rounded to the nearest"
    )
    group = f", groups of {found['group']}" if found["group"] else ""
    rows = {
        "weights, each counted once": f"{found['bytes'] / 1e6:,.1f} MB, {found['share_of_fp32']:.1%} of fp32",
        "matrices of the layers": f"{found['matrices_share_of_fp32']:.1%} of fp32",
        "bits per byte": f"{found['bits_per_byte']:.4f}, {found['more_bits']:+.2%} "
        f"(bf16 {found['reference_bits_per_byte']:.4f})",
        "KL to bf16": f"{found['kl']:.5f} bits a token",
        "same likeliest token": f"{found['agreement']:.1%}",
    }
    lines = [f"{found['weights']}{group}, {how}; {found['text']}", "", "| | |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {value} |" for name, value in rows.items())]) + "\n"
