"""Hugging Face model folders, both ways: what DeepSeek published opens here, what we train opens everywhere.

Reading goes in this order, and everything that can be wrong is found before memory is taken for weights: config.json is
translated (hf_config, hf_quantisation), the headers of all files are checked (hf_files), names, shapes, dtypes and
scales are held against the model (hf_names, hf_stored), and then tensors are read one at a time straight into their
places. The peak is the model plus one tensor. Weights in few bits become what they stand for; precision/weights.py
leaves them in few bits.

A path that ends in .gguf is llama.cpp's file, which gguf.py checks, and goes the same way.

Left out on purpose: other people's code.
"""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from shoal.errors import ModelError
from shoal.model.config import ModelConfig
from shoal.model.gguf import GGUF
from shoal.model.gguf_config import is_gguf
from shoal.model.hf_config import read_config, to_hf_config
from shoal.model.hf_files import Planned, TensorFolder, read_json, write_json, write_tensors
from shoal.model.hf_names import Piece, copies, pieces
from shoal.model.hf_quantisation import read_quantisation
from shoal.model.hf_stored import Stored, disagrees
from shoal.model.transformer import Transformer

SHARD_BYTES = 5 * 10**9
Tensors = Stored | GGUF  # of a folder, or of a file
log = logging.getLogger(__name__)


def load_config(folder: Path | str) -> ModelConfig:
    if is_gguf(folder):
        return GGUF(folder).config
    return read_config(read_json(as_folder(folder), "config.json"))


def load(folder: Path | str, dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "cpu") -> Transformer:
    """The model in `folder`, matrices in `dtype` (norms and routers fp32), ready to run. Raises ModelError.

    What is in few bits becomes what it stands for; `precision.weights.load` leaves it as it is.
    """
    model, stored = opened(folder, dtype)
    allocate(model, device)
    fill(model, stored)
    return model


def opened(folder: Path | str, dtype: torch.dtype) -> tuple[Transformer, Tensors]:
    """The model without memory and the tensors for it, held against each other. Raises ModelError."""
    if is_gguf(folder):
        file = GGUF(folder)
        return skeleton(file.config, dtype), file
    folder = as_folder(folder)
    raw = read_json(folder, "config.json")
    files = TensorFolder(folder)
    config = without_absent_modules(read_config(raw), files)
    if f"model.layers.{config.n_layers - 1}.input_layernorm.weight" not in files.entries:
        raise disagrees(f"config.json says {config.n_layers} layers, the files have no such layer", "as many in both")
    model, stored = skeleton(config, dtype), Stored(files, read_quantisation(raw))
    check(model, stored)
    return model, stored


def fill(model: Transformer, stored: Tensors) -> None:
    """Read what the model has memory for, in the order of the files."""
    state = model.state_dict()
    for piece in sorted(own_pieces(model), key=stored.place):
        stored.copy(piece, piece.of(state[piece.ours]))
    if isinstance(stored, GGUF):
        return  # copies there may be quantised in another way
    for piece in second_times(model.config, stored):
        if not stored.equal(piece, state.get(piece.ours)):
            raise disagrees(f"{piece.name} differs from the model's own", "a copy of it")


def skeleton(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """The model without memory: names, shapes and dtypes."""
    with torch.device("meta"):
        return Transformer(config).set_dtype(dtype)


def allocate(model: Transformer, device: torch.device | str) -> None:
    # Not `to_empty`: on meta tensors it imports sympy, for half a second.
    places = {name: torch.empty(t.shape, dtype=t.dtype, device=device) for name, t in model.state_dict().items()}
    model.load_state_dict(places, assign=True)
    if model.config.tie_embeddings:
        model.head.weight = model.embed.weight
    for buffer in model.buffers():
        buffer.zero_()  # the router's bias, which softmax models have no tensor for


def as_folder(folder: Path | str) -> Path:
    if not Path(folder).is_dir():
        raise ModelError(f"{folder} is not a folder", "a model folder", "check the path")
    return Path(folder)


def without_absent_modules(config: ModelConfig, files: TensorFolder) -> ModelConfig:
    """transformers keeps the number of multi-token modules but drops their tensors: believe the tensors, and say so."""
    present = 0
    for k in range(config.n_mtp):
        prefix = f"model.layers.{config.n_layers + k}."
        present += any(name.startswith(prefix) for name in files.entries)
    if present < config.n_mtp:
        log.warning("config.json says %d multi-token modules, the files hold %d", config.n_mtp, present)
    return replace(config, n_mtp=present)


def own_pieces(model: Transformer) -> Iterator[Piece]:
    return pieces(model.config, ((name, tuple(t.shape)) for name, t in model.state_dict().items()))


def second_times(config: ModelConfig, stored: Stored) -> list[Piece]:
    """Copies that the files hold of what stands elsewhere too: multi-token embeddings and heads, a tied head."""
    tied = Piece("lm_head.weight", "embed.weight", (config.vocab_size, config.dim))
    allowed = [*copies(config), tied] if config.tie_embeddings else copies(config)
    return [piece for piece in allowed if piece in stored]


def check(model: Transformer, stored: Stored) -> None:
    """Hold names, shapes, dtypes and scales against the model."""
    pieces = [*own_pieces(model), *second_times(model.config, stored)]
    expected = {name for piece in pieces for name in stored.check(piece)}
    extra = sorted(n for n in stored.files.entries.keys() - expected if not n.endswith("rotary_emb.inv_freq"))
    if extra:
        raise disagrees(f"the files hold {len(extra)} tensors the config has no place for: {extra[0]}", "none")


def save(model: Transformer, folder: Path | str, **how) -> None:
    """Write the model as a Hugging Face folder. `how` is `save_state`'s."""
    save_state(model.config, model.state_dict(), folder, **how)


def save_state(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    folder: Path | str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    bos_id: int | None = None,
    eos_id: int | None = None,
) -> None:
    """Write config.json, generation_config.json and the tensors of `state` (a model's state_dict or a snapshot of it).

    Every tensor keeps its dtype (matrices bf16, norms and routers fp32 after training), or all become `dtype` but the
    router's bias. Files are synced; making the folder appear at once is the caller's business.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    def planned(piece: Piece) -> Planned:
        source = state[piece.ours]
        target = source.dtype if dtype is None or piece.ours.endswith("router.bias") else dtype
        return Planned(piece.name, target, piece.shape, lambda: piece.of(source.detach()).to(target))

    own = pieces(config, ((name, tuple(t.shape)) for name, t in state.items()))
    write_tensors(folder, [planned(p) for p in [*own, *copies(config)]], max_shard_bytes)
    matrices = str(dtype or state["embed.weight"].dtype).removeprefix("torch.")
    write_json(folder / "config.json", to_hf_config(config, matrices, bos_id, eos_id))
    write_json(folder / "generation_config.json", generation_config(bos_id, eos_id))


def generation_config(bos_id: int | None, eos_id: int | None) -> dict:
    """Sampling as R1 recommends it: temperature 0.6, top-p 0.95."""
    ids = {"bos_token_id": bos_id, "eos_token_id": eos_id}
    return {k: v for k, v in ids.items() if v is not None} | {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
