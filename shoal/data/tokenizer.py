"""Text to token ids and back: byte-level BPE, our own or anyone's `tokenizer.json`.

Any string is spelled by bytes, so nothing is ever unknown and `decode(encode(text)) == text`. What decides the length
of a text is the pre-tokenizer, the regex that says which bytes may ever merge. Ours differs from the usual one of chat
models in two rules, made for code: a line break takes the next line's indentation with it, and a word up to three
marks before it, so "):\\n        return" can be two tokens and ", *args" one. Digits come in threes from the left, as
in DeepSeek-V3. Bytes a token on held-out Python source, vocabulary 4096 (8192): GPT-2's regex 3.38 (3.64), the chat
models' 3.50 (3.85), with the first rule 3.74 (4.16), with both 3.82 (4.32).

Text can never forge structure. `encode` reads a string that spells `<｜User｜>` or `</think>` as ordinary characters;
the real ids come only from `Special` pieces in `encode_pieces`. (Plain `tokenizers` and transformers do find special
tokens in text; on any other text they give the same ids.)
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from shoal.data.config import LEAST_VOCAB
from shoal.errors import DataError
from shoal.model.gguf_config import is_gguf


class Special(str):
    """A token that stands for structure, not for its characters."""


BOS, EOS, PAD = Special("<｜begin▁of▁sentence｜>"), Special("<｜end▁of▁sentence｜>"), Special("<｜▁pad▁｜>")
FIM_HOLE, FIM_BEGIN, FIM_END = Special("<｜fim▁hole｜>"), Special("<｜fim▁begin｜>"), Special("<｜fim▁end｜>")
USER, ASSISTANT = Special("<｜User｜>"), Special("<｜Assistant｜>")
THINK, THINK_END = Special("<think>"), Special("</think>")
ANSWER, ANSWER_END = Special("<answer>"), Special("</answer>")

HIDDEN = (BOS, EOS, PAD, FIM_HOLE, FIM_BEGIN, FIM_END, USER, ASSISTANT)  # `decode(skip_special=True)` drops these
SHOWN = (THINK, THINK_END, ANSWER, ANSWER_END)  # these a reader of the output wants to see
SPECIALS = HIDDEN + SHOWN
assert len(SPECIALS) + 256 == LEAST_VOCAB

WORD = r"[^\r\n\p{L}\p{N}]{0,3}\p{L}+"  # with the marks before it: " self", "__init", ", *args"
DIGITS = r"\p{N}{1,3}"
MARKS = r" ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?"  # and the line break and indentation after them
SPACE = r"\s*[\r\n]+[ \t]*|\s+(?!\S)|\s+"
PATTERN = f"{WORD}|{DIGITS}|{MARKS}|{SPACE}"
RECIPE = (PATTERN, *SPECIALS, tokenizers.__version__)  # what a trained tokenizer depends on besides text and size

CHAT_TEMPLATE = Path(__file__).with_name("chat.jinja").read_text(encoding="utf-8")  # `chat.py` renders the same

MAX_FILE_BYTES = 100 * 2**20
MAX_VOCAB = 2**22
FIX_FILE = "use a tokenizer.json that the `tokenizers` library wrote, or train one with `shoal tokenizer train`"


class FimIds(NamedTuple):
    """What fill-in-the-middle training needs to rearrange a document part."""

    bos: int
    eos: int
    begin: int
    hole: int
    end: int


class Tokenizer:
    """`bos_id` and `eos_id` are None where there is none; `chat_template` is ours where all our specials are there."""

    def __init__(self, text: str, bos: str | None = BOS, eos: str | None = EOS, chat_template: str | None = None):
        """`text` is the content of a tokenizer.json. Raises DataError when it is malformed."""
        spec = parse(text)
        self.full, self.plain = built(text), built(without_specials(spec))
        for token in spec.get("added_tokens") or []:
            if self.id(token["content"]) != token["id"]:  # the library numbers them by itself where there is a gap
                raise DataError(f"{token['content']} with id {token['id']}", "ids without gaps", FIX_FILE)
        self.text = text
        self.vocab_size = 1 + max(self.full.get_vocab(with_added_tokens=True).values())
        self.bos_id, self.eos_id = (None if name is None else self.full.token_to_id(name) for name in (bos, eos))
        ours = all(self.id(s) is not None for s in SPECIALS)
        self.chat_template = chat_template or (CHAT_TEMPLATE if ours else None)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Open a tokenizer.json, a folder that has one, or a GGUF file. The names of bos and eos and the chat template
        come from tokenizer_config.json beside it; a chat_template.jinja goes first."""
        path = Path(path)
        if is_gguf(path):
            from shoal.data.gguf_tokenizer import tokenizer_in

            return tokenizer_in(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        config = json_object(read(file.with_name("tokenizer_config.json"), missing="{}"), "tokenizer_config.json")
        template = read(file.with_name("chat_template.jinja"), missing="") or chat_template(config)
        bos, eos = (token_name(config.get(key, name)) for key, name in (("bos_token", BOS), ("eos_token", EOS)))
        return cls(read(file), bos, eos, template)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, pattern: str = PATTERN) -> "Tokenizer":
        """Learn `vocab_size` tokens, specials included (fewer where the text is too small). Same texts, same tokens."""
        if vocab_size < LEAST_VOCAB:
            raise DataError(f"a vocabulary of {vocab_size}", f"at least {LEAST_VOCAB}", "raise vocab_size")
        bpe = tokenizers.Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        bpe.pre_tokenizer = pre_tokenizers.Sequence([split, spell])  # pyright: ignore[reportAttributeAccessIssue]
        bpe.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        bpe.train_from_iterator(
            texts,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                special_tokens=[AddedToken(str(s), special=True, normalized=False) for s in SPECIALS],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        return cls(finish(bpe))

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json, and tokenizer_config.json with the template; transformers' AutoTokenizer opens them."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        names = {"bos_token": self.name(self.bos_id), "eos_token": self.name(self.eos_id)}
        names["pad_token"] = str(PAD) if self.id(PAD) is not None else names["eos_token"]
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        (folder / "tokenizer.json").write_text(self.text, encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: nothing added, special tokens spelled in it stay characters. Other threads go on."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each, on all threads."""
        return [e.ids for e in self.plain.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_pieces(self, pieces: Iterable[str]) -> list[int]:
        """Ids of text pieces with `Special` ones between them."""
        return [i for p in pieces for i in ([self.special_id(p)] if isinstance(p, Special) else self.encode(p))]

    def decode(self, ids: Sequence[int], skip_special: bool = False) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self.full.decode(list(ids), skip_special_tokens=skip_special)

    def id(self, token: str) -> int | None:
        return self.full.token_to_id(str(token))

    def name(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.full.id_to_token(token_id)

    def special_id(self, token: Special) -> int:
        """Raises DataError where this tokenizer lacks the token."""
        found = self.id(token)
        if found is None:
            raise DataError(f"a tokenizer without {token}", "one that has it", "choose another tokenizer or source")
        return found

    @property
    def fim_ids(self) -> FimIds:
        return FimIds(*(self.special_id(t) for t in (BOS, EOS, FIM_BEGIN, FIM_HOLE, FIM_END)))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()

    @cached_property
    def spellings(self) -> list[bytes]:
        """The bytes of text that each token spells; none for special tokens and unused ids."""
        spell = spelled_bytes if "ByteLevel" in str(self.full.decoder) else spelled_words
        found = [b""] * self.vocab_size
        for token, i in self.plain.get_vocab(with_added_tokens=False).items():
            found[i] = spell(token)
        for i, token in self.full.get_added_tokens_decoder().items():
            found[i] = b"" if is_marker(token.content, token.special) else token.content.encode()
        return found

    def byte_lengths(self) -> np.ndarray:
        """int32 [vocab]: how many bytes of text each token spells."""
        return np.array([len(s) for s in self.spellings], np.int32)


def finish(bpe: tokenizers.Tokenizer) -> str:
    """The JSON, where every encoding by transformers starts with BOS, as every document of ours does, and what a reader
    wants to see is not marked special (training marks everything)."""
    bos = str(BOS)
    post = processors.TemplateProcessing(f"{bos} $A", f"{bos} $A {bos} $B", [(bos, bpe.token_to_id(bos))])
    bpe.post_processor = post  # pyright: ignore[reportAttributeAccessIssue]
    spec = json.loads(bpe.to_str())
    for token in spec["added_tokens"]:
        token["special"] = token["content"] in HIDDEN
    return json.dumps(spec, indent=1, ensure_ascii=False)


def built(text: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as e:  # the library raises bare Exception, and a BaseException of its own where Rust panics
        if isinstance(e, KeyboardInterrupt | SystemExit):
            raise
        got = f"a tokenizer the library refuses: {str(e)[:200]}"
        raise DataError(got, "a whole tokenizer.json", FIX_FILE) from e


def is_marker(content: str, special: bool) -> bool:
    """Added tokens that stand for structure. DeepSeek flags <think> as not special, so the shape counts too."""
    return special or bool(re.fullmatch(r"[<\[]\S+[>\]]", content))


def without_specials(spec: dict) -> str:
    """The same tokenizer blind to markers in text; other added tokens (runs of spaces, say) stay."""
    kept = [t for t in spec.get("added_tokens") or [] if not is_marker(str(t["content"]), bool(t.get("special")))]
    return json.dumps(spec | {"added_tokens": kept, "post_processor": None, "truncation": None, "padding": None})


def byte_alphabet() -> dict[str, int]:
    """The character that byte-level vocabularies write for each byte: itself where it is printable, else the next one
    from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


BYTE_ALPHABET = byte_alphabet()


def spelled_bytes(token: str) -> bytes:
    known = BYTE_ALPHABET.keys() >= set(token)
    return bytes(BYTE_ALPHABET[c] for c in token) if known else token.encode()


def spelled_words(token: str) -> bytes:
    """SentencePiece-style vocabularies: <0x0A> is one byte, and ▁ is a space."""
    is_byte = re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token)
    return bytes([int(token[3:5], 16)]) if is_byte else token.replace("▁", " ").encode()


def chat_template(config: dict) -> str | None:
    """A string, or a list of named ones of which "default" counts."""
    value = config.get("chat_template")
    if isinstance(value, list):
        value = {t.get("name"): t.get("template") for t in value if isinstance(t, dict)}.get("default")
    return value if isinstance(value, str) else None


def token_name(value) -> str | None:
    """tokenizer_config.json holds a name, or an object with `content`, or null."""
    return value.get("content") if isinstance(value, dict) else value


def read(file: Path, missing: str | None = None) -> str:
    try:
        if missing is not None and not file.exists():
            return missing
        size = file.stat().st_size
        if size > MAX_FILE_BYTES or not file.is_file():
            raise DataError(f"{file} of {size:,} bytes", f"a file of at most {MAX_FILE_BYTES:,}", FIX_FILE)
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{file}: {e}", "a readable UTF-8 file", FIX_FILE) from e


def json_object(text: str, what: str) -> dict:
    def unique(pairs):
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ValueError("a key that appears twice")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{what}: {e}", "valid JSON", FIX_FILE) from e
    if not isinstance(value, dict):
        raise DataError(f"{what} holding a {type(value).__name__}", "a JSON object", FIX_FILE)
    return value


def parse(text: str) -> dict:
    """The JSON of a tokenizer, ids checked: whole numbers, in range, each used once. Raises DataError."""
    spec = json_object(text, "tokenizer.json")
    model, added = spec.get("model"), spec.get("added_tokens") or []
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(vocab, dict | list) or not isinstance(added, list):
        raise DataError("tokenizer.json without a vocabulary", "model.vocab and a list added_tokens", FIX_FILE)
    try:
        ids = dict(vocab) if isinstance(vocab, dict) else {token: i for i, (token, _) in enumerate(vocab)}
        extra = {str(t["content"]): t["id"] for t in added}
    except (TypeError, KeyError, ValueError) as e:
        raise DataError(f"tokenizer.json: {e!r} in its vocabulary", "tokens with ids", FIX_FILE) from e
    both = ids | extra
    wrong = [i for i in both.values() if type(i) is not int or not 0 <= i < MAX_VOCAB]
    if wrong or not both:
        got = f"a token with id {wrong[0]}" if wrong else "no token with an id"
        raise DataError(got, f"ids from 0 to {MAX_VOCAB - 1}", FIX_FILE)
    repeated = len(ids) < len(vocab) or len(extra) < len(added) or len(set(both.values())) < len(both)
    if repeated or any(ids.get(t, i) != i for t, i in extra.items()):
        raise DataError("two tokens with one id, or one token with two", "one id each", FIX_FILE)
    check_merges(model, ids)
    return spec


def check_merges(model: dict, ids: dict) -> None:
    """A merge joins two non-empty tokens into a longer one of the vocabulary, so merging always ends."""
    prefix, merges = model.get("continuing_subword_prefix") or "", model.get("merges") or []
    if not isinstance(prefix, str) or not isinstance(merges, list):
        raise DataError("tokenizer.json with odd merges", "a list of pairs, and a prefix that is text", FIX_FILE)
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(p, str) and p in ids for p in pair)):
            raise DataError(f"the merge {str(merge)[:80]!r}", "two tokens of the vocabulary", FIX_FILE)
        if not all(pair) or pair[0] + pair[1].removeprefix(prefix) not in ids:
            raise DataError(f"the merge {str(merge)[:80]!r}", "one that makes a longer token", FIX_FILE)
