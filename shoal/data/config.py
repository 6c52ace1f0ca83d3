"""What text to train on, in settings. Torch-free."""

from dataclasses import dataclass

from shoal.errors import ConfigError

LEAST_VOCAB = 256 + 12  # every byte, every special token


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

    def __post_init__(self):
        if not self.sources:
            raise ConfigError("data.sources = []", "at least one source", "name one, for instance python-stdlib")
        if self.vocab_size < LEAST_VOCAB:
            got = f"data.vocab_size = {self.vocab_size}"
            raise ConfigError(got, f"at least {LEAST_VOCAB}: every byte and special token", "raise it")
        if not self.val_suffixes or not set(self.val_suffixes) < set("0123456789abcdef"):
            got = f"data.val_suffixes = {self.val_suffixes!r}"
            raise ConfigError(got, "some, not all, of the digits 0-9 and a-f", "hold out 'f' for 1/16")
        if not 0 <= self.fim_rate <= 1:
            raise ConfigError(f"data.fim_rate = {self.fim_rate}", "a share from 0 to 1", "V3 used 0.1")
