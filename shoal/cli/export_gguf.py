"""`shoal export` to and from GGUF: OUT.gguf is a file that llama.cpp opens, MODEL.gguf becomes a folder.

A file holds the tokenizer too. It is written with one matrix in memory at a time; multi-token modules are left out, as
llama.cpp's own converter does.
"""

from pathlib import Path

from shoal.cli.opened import check_memory, check_vocabulary, end_ids, tokenizer_in

WEIGHTS = ("f32", "f16", "bf16", "q8_0", "q4_0")


def to_file(source: Path, target: Path, weights: str) -> str:
    """Read `source`, a folder or another GGUF file, and write `target`; says what was written."""
    import torch
    from torch import Tensor

    from shoal.data import gguf_tokenizer
    from shoal.model import gguf_config, gguf_write, hf
    from shoal.model.counts import count_parameters
    from shoal.model.hf_names import Piece

    model, stored = hf.opened(source, torch.bfloat16)
    config, tokenizer = model.config, tokenizer_in(source)
    check_vocabulary(tokenizer.vocab_size, config.vocab_size)
    ends = end_ids(source, config.vocab_size)
    settings = gguf_config.settings_of(config, str(source))
    settings |= gguf_tokenizer.settings_of(tokenizer, config.vocab_size, ends)

    def read(piece: Piece) -> Tensor:
        value = torch.empty(piece.shape)
        stored.copy(piece, value)
        return value

    gguf_write.write(target, config, read, weights, settings)
    known = "" if gguf_tokenizer.published(tokenizer) else "; llama.cpp doesn't know its tokenizer: give it token ids"
    millions = count_parameters(config).total / 1e6
    return f"{settings['general.architecture']}, {millions:,.1f}M parameters, {weights}{known} →"


def to_folder(source: Path, target: Path, dtype: str, shard_bytes: int) -> str:
    """Read a GGUF file and write it to `target` as a Hugging Face folder, computed out; says what was written."""
    import torch

    from shoal.model import hf
    from shoal.model.counts import count_parameters
    from shoal.model.hf_config import architecture
    from shoal.model.hf_files import write_json

    config, tokenizer = hf.load_config(source), tokenizer_in(source)
    check_vocabulary(tokenizer.vocab_size, config.vocab_size)
    check_memory(config, dtype)
    model = hf.load(source, getattr(torch, dtype))
    ids = {"bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    hf.save(model, target, max_shard_bytes=shard_bytes, **ids)
    tokenizer.save(target)
    ends = end_ids(source, config.vocab_size)
    if len(set(ends)) > 1:
        write_json(target / "generation_config.json", hf.generation_config(**ids) | {"eos_token_id": list(ends)})
    counts = count_parameters(config)
    return f"{architecture(config)}, {(counts.total + counts.mtp_total) / 1e6:,.1f}M parameters, {dtype} →"
