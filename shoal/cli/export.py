"""`shoal export MODEL OUT`: write a model as a Hugging Face folder that transformers, vLLM and SGLang open, or as
OUT.gguf for llama.cpp.

The model is checked as it is read (names, shapes, ranges, scales), what is in few bits is dequantised, and what is
written has canonical names. With `--weights` its matrices are rounded to 8 or 4 bits; `shoal quantize` looks closer at
what that costs. The folder appears whole or not at all.
"""

import argparse
import errno
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

from shoal.cli.export_gguf import WEIGHTS, to_file
from shoal.cli.opened import DTYPES, MODEL_HELP, check_memory, check_vocabulary, end_ids, model_folder
from shoal.cli.sizes import size
from shoal.errors import ConfigError, ResourceError
from shoal.model.gguf_config import is_gguf

if TYPE_CHECKING:
    from shoal.ops.quant import Form
    from shoal.precision.convert import Make

FORMS = ("fp8", "int8", "int4")
WEIGHTS_HELP = f"matrices in few bits, rounded to the nearest: {', '.join(FORMS)}; of a GGUF file {', '.join(WEIGHTS)}"
INT4_GROUP = 64
BESIDE = (  # copied as they are where they exist
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="shoal export", description="Write a model as a folder or a GGUF file.")
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    return convert(parser, argv)


def convert(parser: argparse.ArgumentParser, argv: list[str]) -> int:
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to make, or a file whose name ends in .gguf")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dtype", choices=DTYPES, help="of all tensors but the router's bias (default: as they are)")
    what.add_argument("--weights", choices=(*FORMS, *WEIGHTS), help=WEIGHTS_HELP)
    add_group(parser)
    parser.add_argument("--max-shard-size", default="5GB", help="of one file, such as 500MB; default 5GB")
    args = parser.parse_args(argv)
    shard_bytes, group = shard_size(args.max_shard_size), group_of(args.weights, args.group)
    as_file = is_gguf(args.out)
    check_weights(args.weights, args.dtype, as_file)
    with whole_output(args.out) as part:
        source = model_folder(args.model)
        if as_file:
            print(to_file(source, part, args.weights or "bf16"), args.out)
        elif args.weights:
            print(write_in_few_bits(source, part, args.weights, group, shard_bytes), args.out)
        else:
            print(write(source, part, args.dtype, shard_bytes), args.out)
    return 0


def check_weights(weights: str | None, dtype: str | None, as_file: bool) -> None:
    """Raises ConfigError for what the output has no form for."""
    known, what = (WEIGHTS, "a GGUF file") if as_file else (FORMS, "a folder")
    if weights and weights not in known:
        fix = f"leave --weights out, or {'name a folder' if as_file else 'let OUT end in .gguf'}"
        raise ConfigError(f"--weights {weights} for {what}", " or ".join(known), fix)
    if as_file and dtype:
        raise ConfigError("--dtype for a GGUF file", "--weights", f"give one of {', '.join(WEIGHTS)}")


def add_group(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group",
        type=int,
        choices=(32, 64, 128),
        help="numbers that share a scale; default: int4 64, int8 a whole row",
    )


def group_of(weights: str | None, group: int | None) -> int | None:
    """Raises ConfigError for a group of what has none."""
    if group and weights not in ("int8", "int4"):
        fix = "leave --group out"
        raise ConfigError(f"--group with {weights or 'no --weights'}", "--weights int8 or int4", fix)
    return group or (INT4_GROUP if weights == "int4" else None)


@contextmanager
def whole_output(out: Path) -> Iterator[Path]:
    """A path to write a folder or file to, which becomes OUT when all is well and vanishes when it isn't: when we are
    asked to end, too. What one left that was killed goes first."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists and is not empty", "a new one", "choose another OUT")
    part = out.parent / f".{out.name}.{os.getpid()}"
    heard = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is not signal.SIG_IGN]  # nohup stays
    before = {number: signal.signal(number, end) for number in heard}
    try:
        for left in abandoned(out):
            discard(left)
        yield part
        part.rename(out)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(f"{out}: {e.strerror}", "room on the disk", "free some space") from None
        raise ConfigError(f"{out}: {e.strerror}", "a folder we may write", "choose another OUT") from None
    finally:
        discard(part)
        for number, handler in before.items():
            signal.signal(number, handler)


def end(number: int, _) -> NoReturn:
    raise SystemExit(128 + number)


def abandoned(out: Path) -> Iterator[Path]:
    """Parts of OUT whose processes are gone."""
    for path in out.parent.iterdir() if out.parent.is_dir() else ():
        name, _, pid = path.name.rpartition(".")
        if name == f".{out.name}" and pid.isdecimal() and not psutil.pid_exists(int(pid)):
            yield path


def discard(part: Path) -> None:
    if part.is_file():
        part.unlink()
    shutil.rmtree(part, ignore_errors=True)


def write(source: Path, target: Path, dtype: str | None, shard_bytes: int) -> str:
    """Read `source` and write it to `target`, canonical; says what was written."""
    import torch

    from shoal.model import hf
    from shoal.model.counts import count_parameters

    raw, config = said_of(source), hf.load_config(source)
    stored = raw.get("torch_dtype") or raw.get("dtype")
    matrices = dtype or (stored if stored in DTYPES else "float32")  # holds any other without loss
    check_memory(config, matrices)
    model = hf.load(source, getattr(torch, matrices))
    ids = {"bos_id": raw.get("bos_token_id"), "eos_id": raw.get("eos_token_id")}
    hf.save(model, target, dtype=getattr(torch, dtype) if dtype else None, max_shard_bytes=shard_bytes, **ids)
    copy_beside(source, target)
    counts = count_parameters(model.config)
    return f"{raw['model_type']}, {(counts.total + counts.mtp_total) / 1e6:,.1f}M parameters, {matrices} →"


def write_in_few_bits(
    source: Path, target: Path, weights: "Form", group: int | None, shard_bytes: int, make: "Make | None" = None
) -> str:
    """The same with matrices in few bits, one of them in memory at a time; `make` makes them, rounding if it's None."""
    from shoal.precision import convert

    raw, opened = said_of(source), convert.Source(source)
    ids = {"bos_id": raw.get("bos_token_id"), "eos_id": raw.get("eos_token_id")}
    convert.write(opened, target, weights, group, make, shard_bytes, **ids)
    copy_beside(source, target)
    s = convert.sizes(opened, weights, group)
    groups = f" in groups of {group}" if group else ""
    smaller = [p for p in opened.pieces if (how := convert.kept(p, weights, group)) and how.group not in (None, group)]
    groups += f" ({len(smaller)} matrices, whose rows are no whole groups, in smaller ones)" if smaller else ""
    return f"{raw['model_type']} in {weights}{groups}, {s.whole / 1e6:,.1f} MB, {s.whole / s.whole_fp32:.1%} of fp32 →"


def said_of(source: Path) -> dict:
    """The model's config.json, or what it would be of a GGUF file; the tokenizer, if there is one, is checked."""
    from shoal.data.tokenizer import Tokenizer
    from shoal.model import hf
    from shoal.model.hf_config import to_hf_config
    from shoal.model.hf_files import read_json

    config = hf.load_config(source)
    if not is_gguf(source) and not (source / "tokenizer.json").exists():
        return read_json(source, "config.json")
    tokenizer = Tokenizer.load(source)
    check_vocabulary(tokenizer.vocab_size, config.vocab_size)
    if is_gguf(source):
        return to_hf_config(config, "bfloat16", tokenizer.bos_id, tokenizer.eos_id)
    return read_json(source, "config.json")


def copy_beside(source: Path, target: Path) -> None:
    """The tokenizer, and which tokens end a turn."""
    from shoal.data.tokenizer import Tokenizer
    from shoal.model import hf
    from shoal.model.hf_files import open_regular, read_json, write_json

    if is_gguf(source):
        Tokenizer.load(source).save(target)
        ends = list(end_ids(source, hf.load_config(source).vocab_size))
        if len(ends) > 1:
            name = "generation_config.json"
            write_json(target / name, read_json(target, name) | {"eos_token_id": ends})
        return
    for name in BESIDE:
        if (source / name).exists():
            with open_regular(source, name) as file, open(target / name, "wb") as copy:
                shutil.copyfileobj(file, copy)


def shard_size(text: str) -> int:
    """Bytes of a file at most. Raises ConfigError."""
    if not (found := size(text)):
        raise ConfigError(f"--max-shard-size {text}", "some bytes", "give a size such as 500MB")
    return found
