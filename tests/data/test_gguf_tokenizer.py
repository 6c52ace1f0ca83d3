"""A tokenizer through a GGUF file's settings and back."""

import json
from itertools import pairwise

import numpy as np
import pytest
import tokenizers

from shoal.data.gguf_tokenizer import (
    CONTROL,
    PATTERNS,
    USER_DEFINED,
    Said,
    as_json,
    settings_of,
    tokenizer_of,
)
from shoal.data.tokenizer import PATTERN, Tokenizer, parse
from shoal.errors import DataError

TEXTS = ["def f(x):\n    return [12345, x]  # it's 漢字 and Ω\n", "I'LL see you're 7 years, déjà vu!\r\n\t ok"] * 9


def converted(tokenizer: Tokenizer, pre: str) -> dict:
    """As llama.cpp's converter writes them."""
    added = tokenizer.full.get_added_tokens_decoder()
    kinds = [
        1 if i not in added else CONTROL if added[i].special else USER_DEFINED for i in range(tokenizer.vocab_size)
    ]
    merges = parse(tokenizer.text)["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [tokenizer.name(i) for i in range(tokenizer.vocab_size)],
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.eot_token_id": 5,
    }


@pytest.fixture(scope="module")
def source() -> Tokenizer:
    return Tokenizer.train(TEXTS, 400, PATTERNS["qwen2"][0])


def test_the_same_ids_and_text(source):
    found = tokenizer_of(converted(source, "deepseek-r1-qwen"), "m.gguf")
    for text in (*TEXTS[:2], "", "<｜User｜>", "<think>hm</think>", "𝄞\0 e\u0301"):
        assert found.encode(text) == source.encode(text)
        assert found.decode(found.encode(text)) == text
    assert (found.vocab_size, found.bos_id, found.eos_id) == (source.vocab_size, source.bos_id, source.eos_id)
    assert found.full.get_added_tokens_decoder().keys() == source.full.get_added_tokens_decoder().keys()
    assert found.spellings == source.spellings
    assert found.chat_template == source.chat_template


def test_no_bos_where_the_file_says_so(source):
    assert tokenizer_of(converted(source, "qwen2") | {"tokenizer.ggml.add_bos_token": False}, "m").bos_id is None


def test_a_whole_tokenizer_in_the_file_is_taken_as_it_is():
    ours = Tokenizer.train(TEXTS, 400, PATTERN)
    said = converted(ours, "gpt-2") | {"tokenizer.huggingface.json": ours.text, "tokenizer.chat_template": "{{ 1 }}"}
    found = tokenizer_of(said, "m")
    assert found.sha256 == ours.sha256 and found.chat_template == "{{ 1 }}"


def pre_tokenizer(text: str) -> tokenizers.pre_tokenizers.PreTokenizer:
    found = tokenizers.Tokenizer.from_str(text).pre_tokenizer
    assert found is not None
    return found


@pytest.mark.parametrize("pre", PATTERNS)
def test_every_pattern_is_one_that_the_library_takes(source, pre):
    text = as_json(Said(converted(source, pre), "m"), converted(source, pre)["tokenizer.ggml.tokens"])
    split = pre_tokenizer(text).pre_tokenize_str("Ab's 1234年漢字 héllo!x\n\n  ok")
    pieces = [at for _, at in split]
    assert pieces[0][0] == 0 and all(a[1] == b[0] for a, b in pairwise(pieces))
    assert json.loads(text)["model"]["ignore_merges"] == (pre == "llama-bpe")


def test_deepseek_v3_splits_as_published(source):
    text = as_json(
        Said(converted(source, "deepseek-v3"), "m"), converted(source, "deepseek-v3")["tokenizer.ggml.tokens"]
    )
    split = pre_tokenizer(text).pre_tokenize_str("a 12345.foo(b) 漢字x;\n y")
    pieces = ["a 12345.foo(b) 漢字x;\n y"[i:j] for _, (i, j) in split]
    assert pieces == ["a", " ", "123", "45", ".foo", "(b", ")", " ", "漢字", "x", ";\n", " y"]


@pytest.mark.parametrize(
    "change, match",
    [
        ({"model": "llama"}, "a tokenizer of model 'llama'"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken'"),
        ({"tokens": None}, "no tokens"),
        ({"tokens": ["a", "a"]}, "stands twice"),
        ({"token_type": np.array([1], np.int32)}, "no types"),
        ({"token_type": np.ones(400, np.float32)}, "no types"),
        ({"merges": ["a"]}, "the merge 'a'"),
        ({"bos_token_id": 10**6}, "bos_token_id 1000000"),
        ({"eos_token_id": -1}, "eos_token_id -1"),
    ],
)
def test_what_makes_no_tokenizer_is_refused(source, change, match):
    said = converted(source, "qwen2") | {f"tokenizer.ggml.{name}": value for name, value in change.items()}
    with pytest.raises(DataError, match=match):
        tokenizer_of(said, "m.gguf")


def test_what_is_written_is_read(source):
    said = settings_of(source, 512, (source.eos_id or 0, 9))
    assert len(said["tokenizer.ggml.tokens"]) == 512 and said["tokenizer.ggml.pre"] == "qwen2"  # type: ignore[arg-type]
    theirs = {key: value for key, value in said.items() if key != "tokenizer.huggingface.json"}
    for found in (tokenizer_of(said, "m"), tokenizer_of(theirs, "m")):
        assert found.encode(TEXTS[1]) == source.encode(TEXTS[1])
        assert (found.vocab_size, found.bos_id, found.eos_id) == (source.vocab_size, source.bos_id, source.eos_id)
        assert found.chat_template == source.chat_template
    assert said["tokenizer.ggml.eot_token_id"] == 9
    assert settings_of(Tokenizer.train(TEXTS, 400), 400)["tokenizer.ggml.pre"] == "gpt-2"
