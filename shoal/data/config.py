"""What text to train on, in settings. Torch-free."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    """`sources` are read in order; see `sources.py` for their forms (built-ins, folders, globs, files, `hf:`).

    A document is held out when its SHA-256 ends in one of the hex digits `val_suffixes`: one of them is 1/16 of the
    documents. `tokenizer` names a folder or a tokenizer.json to use; otherwise one of `vocab_size` is trained.
    """

    sources: tuple[str, ...] = ("python-stdlib",)
    vocab_size: int = 4096
    tokenizer: str | None = None
    val_suffixes: str = "f"
    mask_documents: bool = True  # no attention across documents; False is V3's own packing
    fim_rate: float = 0.0  # share of document parts rearranged to fill in the middle; V3 trained with 0.1
