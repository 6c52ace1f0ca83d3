"""The tokenizer that a GGUF file carries: byte-level BPE (`tokenizer.ggml.model` "gpt2") as a tokenizer.json.

The file has tokens with their types, merges, and of the pre-tokenizer a name alone; what the names stand for are the
published patterns, below. Where the whole tokenizer.json is in the file (`tokenizer.huggingface.json`, which we write
and few others do), it is taken as it is. SentencePiece vocabularies ("llama") are refused.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from shoal.data.tokenizer import Tokenizer, parse
from shoal.errors import DataError
from shoal.model.gguf_file import GGUFFile

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
FIX = "take the model's Hugging Face folder, or convert it with a newer llama.cpp"

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
MARKS_AND_SPACE = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CASED = (  # DeepSeek-V2's list of letters that have a case, as code points: some of them would be composed in an editor
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a 38c 38e-3a1 "
    "3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a "
    "1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 "
    "1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 2119-211d 2124 2126 2128 "
    "212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183-2184 2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d "
    "a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 "
    "104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943"
)
LETTERS = "".join("-".join(chr(int(end, 16)) for end in span.split("-")) for span in CASED.split())
PATTERNS: dict[str, tuple[str, ...]] = {  # one after the other, each splitting what is left whole
    "gpt-2": (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",),
    "llama-bpe": (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + MARKS_AND_SPACE,),
    "qwen2": (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + MARKS_AND_SPACE,),
    "deepseek-llm": (  # V2
        r"[\r\n]",
        rf"\s?[{LETTERS}]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        r"\p{N}",
    ),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
    "deepseek-v3": (  # V3 and R1
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}
WHOLE_WORDS = ("llama-bpe",)  # a word of the vocabulary is its token, whatever its merges


def tokenizer_in(path: Path) -> Tokenizer:
    """What `Tokenizer.load` opens a GGUF file with. Raises ModelError and DataError."""
    return tokenizer_of(GGUFFile(path).metadata, str(path))


def tokenizer_of(metadata: Mapping[str, object], where: str) -> Tokenizer:
    """Of a GGUF file's settings; `where` names the file in a DataError."""
    said = Said(metadata, where)
    tokens = said.tokens()
    bos = said.token("bos_token_id", tokens) if metadata.get("tokenizer.ggml.add_bos_token", True) else None
    template = metadata.get("tokenizer.chat_template")
    whole = metadata.get("tokenizer.huggingface.json")
    text = whole if isinstance(whole, str) else as_json(said, tokens)
    return Tokenizer(text, bos, said.token("eos_token_id", tokens), template if isinstance(template, str) else None)


def turn_ends(path: Path, vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a turn in a GGUF file. Raises ModelError."""
    metadata = GGUFFile(path).metadata
    ids = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return tuple(i for i in ids if type(i) is int and 0 <= i < vocab_size)


class Said:
    """What the file says of its tokenizer, each value of the type it must have."""

    def __init__(self, metadata: Mapping[str, object], where: str):
        self.metadata, self.where = metadata, where
        if (kind := metadata.get("tokenizer.ggml.model")) != "gpt2":
            raise self.bad(f"a tokenizer of model {str(kind)[:80]!r}", "gpt2, byte-level BPE")

    def bad(self, got: str, expected: str) -> DataError:
        return DataError(f"{self.where} with {got}", expected, FIX)

    def strings(self, name: str) -> list[str]:
        found = self.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(found, list):
            raise self.bad(f"no {name}", f"tokenizer.ggml.{name}, a list of strings")
        return found

    def tokens(self) -> list[str]:
        tokens = self.strings("tokens")
        if len(set(tokens)) < len(tokens):
            raise self.bad("a token that stands twice", "each once")
        return tokens

    def types(self, n: int) -> list[int]:
        found = self.metadata.get("tokenizer.ggml.token_type")
        if not isinstance(found, np.ndarray) or len(found) != n or found.dtype.kind not in "iu":
            raise self.bad("no types of its tokens", f"tokenizer.ggml.token_type, {n:,} whole numbers")
        return found.tolist()

    def token(self, key: str, tokens: list[str]) -> str | None:
        i = self.metadata.get(f"tokenizer.ggml.{key}")
        if i is None:
            return None
        if type(i) is not int or not 0 <= i < len(tokens):
            raise self.bad(f"{key} {str(i)[:40]}", f"an id from 0 to {len(tokens) - 1}")
        return tokens[i]

    def patterns(self) -> tuple[str, tuple[str, ...]]:
        name = str(self.metadata.get("tokenizer.ggml.pre"))
        name = SAME.get(name, name)
        if name not in PATTERNS:
            raise self.bad(f"the pre-tokenizer {name[:80]!r}", " or ".join((*PATTERNS, *SAME)))
        return name, PATTERNS[name]


def as_json(said: Said, tokens: list[str]) -> str:
    """tokenizer.json: the vocabulary with its special tokens, the merges, and the patterns before them."""
    types, (name, patterns) = said.types(len(tokens)), said.patterns()
    splits = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in patterns]
    spell = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    model = {
        "type": "BPE",
        "vocab": {token: i for i, token in enumerate(tokens) if types[i] != UNUSED},
        "merges": said.strings("merges"),
        "ignore_merges": name in WHOLE_WORDS,
    }
    added = [
        added_token(i, tokens[i], kind == CONTROL) for i, kind in enumerate(types) if kind in (CONTROL, USER_DEFINED)
    ]
    spec = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, spell]},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    return json.dumps(spec, ensure_ascii=False)


def added_token(i: int, content: str, special: bool) -> dict:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": content, **flags, "special": special}


def settings_of(
    tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...] = ()
) -> dict[str, bool | int | str | list[str] | np.ndarray]:
    """A tokenizer as a GGUF file's settings, its tokenizer.json among them. Raises DataError.

    `vocab_size` are the model's rows, all of which llama.cpp wants a token for; `ends` the tokens that end a turn, of
    which it knows one besides EOS. Where the tokenizer's patterns are none of the published ones, `pre` is "gpt-2", and
    llama.cpp will split text otherwise.
    """
    spec = parse(tokenizer.text)
    if spec["model"].get("type") != "BPE" or "ByteLevel" not in str(tokenizer.full.decoder):
        raise DataError("a tokenizer that isn't byte-level BPE", "one of GPT-2's kind", "export a folder instead")
    added = tokenizer.full.get_added_tokens_decoder()
    names = [tokenizer.name(i) for i in range(vocab_size)]
    kinds = [
        UNUSED if name is None else NORMAL if i not in added else CONTROL if added[i].special else USER_DEFINED
        for i, name in enumerate(names)
    ]
    found = {
        "model": "gpt2",
        "pre": published(tokenizer) or "gpt-2",
        "tokens": [f"[PAD{i}]" if name is None else name for i, name in enumerate(names)],
        "token_type": np.array(kinds, np.int32),
        "merges": [m if isinstance(m, str) else " ".join(m) for m in spec["model"].get("merges") or []],
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "eot_token_id": next((i for i in ends if i != tokenizer.eos_id), None),
        "add_bos_token": tokenizer.bos_id is not None,
    }
    template = {"tokenizer.chat_template": tokenizer.chat_template} if tokenizer.chat_template else {}
    whole = {"tokenizer.huggingface.json": tokenizer.text}
    return {f"tokenizer.ggml.{key}": x for key, x in found.items() if x is not None} | template | whole


def published(tokenizer: Tokenizer) -> str | None:
    """The name of a tokenizer's patterns, where they are known."""
    splits = (parse(tokenizer.text).get("pre_tokenizer") or {}).get("pretokenizers") or []
    patterns = tuple((split.get("pattern") or {}).get("Regex") for split in splits if split.get("type") == "Split")
    return next((name for name, known in PATTERNS.items() if known == patterns), None)
