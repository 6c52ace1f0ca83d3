"""MODEL on the command line: a run (its newest whole checkpoint), a checkpoint folder, or any Hugging Face folder.

A run of several stages (`shoal quickstart`, `shoal r1`) is the model that its pipeline.json names, R1, once that stage
is done; before, it is the run's own. A stage by itself is a run: RUN/stages/1_r1_zero; a base is RUN/checkpoints/STEP.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from shoal.errors import CheckpointError, ModelError, ResourceError, RunError
from shoal.model.config import ModelConfig
from shoal.model.gguf_config import is_gguf
from shoal.run import Run, find

if TYPE_CHECKING:
    from shoal.data.tokenizer import Tokenizer
    from shoal.engine.turns import Turns
    from shoal.model.transformer import Transformer

MODEL_HELP = "a run (path, id, latest), a checkpoint folder, a Hugging Face model folder, or a GGUF file"
DTYPES = ("float32", "bfloat16")
OF_CONFIG = {"bf16": "bfloat16", "fp32": "float32"}  # what training configs call them
FP32_BYTES, BF16_BYTES = 4, 2


class Opened(NamedTuple):
    model: "Transformer"
    tokenizer: "Tokenizer"
    folder: Path  # or a GGUF file
    unchanged: Callable[[], None] = lambda: None  # raises StorageError where files that are mapped were written to


def model_folder(name: str) -> Path:
    """The folder or GGUF file MODEL names. A checkpoint is checked byte by byte; a run's damaged ones are passed by."""
    path = Path(name)
    if is_gguf(path) and path.exists():
        return path
    if (path / "config.json").exists():
        whole(path)
        return path
    if path.is_dir() and not (path / "config.toml").exists():
        raise ModelError(f"{name} has neither config.json nor config.toml", MODEL_HELP, "check the path")
    try:
        run = find(name).of_model()
    except RunError as e:
        raise ModelError(f"no model {name}", MODEL_HELP, e.fix) from None
    from shoal.train import checkpoint

    newest, refused = checkpoint.newest(run.checkpoints)
    for path, why in refused:
        print(f"passed over {path}: {why}", file=sys.stderr)
    if newest is None:
        raise CheckpointError(f"{run.path} has no whole checkpoint", "at least one", "train it on with --resume")
    return newest.path


def whole(folder: Path) -> None:
    """Hold a checkpoint folder against its manifest; other folders have none."""
    if not (folder / "manifest.json").exists():
        return
    from shoal.model.hf_files import read_json
    from shoal.train import manifest

    step = read_json(folder, "manifest.json").get("step")
    if faults := manifest.faults(folder, step if isinstance(step, int) else -1):
        raise CheckpointError(f"{folder} is damaged: {'; '.join(faults)[:500]}", "every file as written", "use another")


def prepared(name: str, threads: int | None) -> "tuple[Path, ModelConfig, Tokenizer, str]":
    """The model's folder and what it says of itself, its own tokenizer, and this machine's device, set up."""
    folder = model_folder(name)

    from shoal import runtime
    from shoal.data.tokenizer import Tokenizer
    from shoal.model import hf

    config = hf.load_config(folder)
    tokenizer = Tokenizer.load(folder)
    check_vocabulary(tokenizer.vocab_size, config.vocab_size)
    return folder, config, tokenizer, runtime.setup(threads).device


def open_model(name: str, dtype: str, threads: int | None = None) -> Opened:
    """The model on this machine's device in the form it is stored in, and its tokenizer, which must be its own.

    What is stored in few bits stays so; `dtype` is of the rest.
    """
    folder, _, tokenizer, device = prepared(name, threads)
    import torch

    from shoal.model import hf
    from shoal.precision import weights

    model, stored = hf.opened(folder, getattr(torch, dtype))
    if device == "cpu":
        check_room(weights.n_bytes(model, stored), dtype)
    return Opened(weights.bring(model, stored, device), tokenizer, folder, stored.files.unchanged)


def open_to_train(name: str, dtype: str, threads: int | None = None) -> Opened:
    """The same with all of it in `dtype`."""
    folder, config, tokenizer, device = prepared(name, threads)
    import torch

    from shoal.model import hf

    if device == "cpu":
        check_memory(config, dtype)
    return Opened(hf.load(folder, getattr(torch, dtype), device), tokenizer, folder)


def reopened(run: Run, base: str, dtype: str, threads: int | None) -> Opened:
    """What a run goes on from: its newest whole checkpoint, else the `base` it began with. `dtype` as in its config."""
    source = str(run.path) if any(run.checkpoints.glob("step-*")) else base
    return open_to_train(source, OF_CONFIG[dtype], threads or run.env().get("threads"))


def turns_of(opened: Opened) -> "Turns":
    """Conversations with this model; its turn also ends at the tokens that its generation_config.json lists."""
    from shoal.engine.turns import Turns

    vocab_size = opened.model.config.vocab_size
    return Turns(opened.tokenizer, vocab_size, end_ids(opened.folder, vocab_size))


def end_ids(folder: Path, vocab_size: int) -> tuple[int, ...]:
    """`eos_token_id` of generation_config.json: absent, one id, or a list of them. Raises ModelError."""
    from shoal.model.hf_files import read_json

    if is_gguf(folder):
        from shoal.data.gguf_tokenizer import turn_ends

        return turn_ends(folder, vocab_size)
    name = "generation_config.json"
    found = read_json(folder, name).get("eos_token_id") if (folder / name).exists() else None
    ids = [] if found is None else found if isinstance(found, list) else [found]
    if wrong := [i for i in ids if type(i) is not int or not 0 <= i < vocab_size]:
        fix = "correct it, or take the file away"
        raise ModelError(f"{folder / name}: eos_token_id {wrong[0]!r}", f"ids from 0 to {vocab_size - 1}", fix)
    return tuple(ids)


def check_vocabulary(of_tokenizer: int, of_model: int) -> None:
    """A model may have some rows to spare (vocabularies are padded to round numbers), never too few."""
    spare = of_model - of_tokenizer
    if spare < 0 or spare > max(1024, of_model // 20):
        raise ModelError(
            f"a tokenizer of {of_tokenizer:,} tokens with a model of {of_model:,}",
            "the tokenizer this model was trained with",
            "put its tokenizer.json into the model folder",
        )


def check_memory(config: ModelConfig, dtype: str) -> None:
    from shoal.model.counts import count_parameters

    counts = count_parameters(config)
    check_room((counts.total + counts.mtp_total) * (FP32_BYTES if dtype == "float32" else BF16_BYTES), dtype)


def check_room(needed: int, dtype: str) -> None:
    import psutil

    free = psutil.virtual_memory().available
    if needed > free:
        raise ResourceError(
            f"the model needs {needed / 2**30:.1f} GiB in {dtype}, {free / 2**30:.1f} GiB are free",
            "a model that fits in memory",
            "try --dtype bfloat16, free some memory, or choose a smaller model",
        )
