"""`shoal export MODEL OUT.gguf`: write a model as a file that llama.cpp opens, its tokenizer in it.

One matrix is in memory at a time. Multi-token modules are left out, as llama.cpp's own converter does.
"""

from pathlib import Path

from shoal.cli.opened import check_vocabulary, end_ids

WEIGHTS = ("f32", "f16", "bf16", "q8_0", "q4_0")


def to_file(source: Path, target: Path, weights: str) -> str:
    """Read `source`, a folder or another GGUF file, and write `target`; says what was written."""
    import torch
    from torch import Tensor

    from shoal.data import gguf_tokenizer
    from shoal.data.tokenizer import Tokenizer
    from shoal.model import gguf_config, gguf_write, hf
    from shoal.model.counts import count_parameters
    from shoal.model.hf_names import Piece

    model, stored = hf.opened(source, torch.bfloat16)
    config, tokenizer = model.config, Tokenizer.load(source)
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
    left = "; its multi-token module is left out" if config.n_mtp else ""
    millions = count_parameters(config).total / 1e6
    return f"{settings['general.architecture']}, {millions:,.1f}M parameters, {weights}{known}{left} →"
