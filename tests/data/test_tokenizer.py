import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.data import tokenizer as module
from shoal.data.tokenizer import ANSWER, BOS, EOS, SPECIALS, THINK, USER, Tokenizer
from shoal.errors import DataError

TEXTS = [Path(module.__file__).read_text(), Path(json.__file__).read_text(), Path(os.__file__).read_text()]
TOKENIZER = Tokenizer.train(TEXTS, 700)
SPECIAL_IDS = {TOKENIZER.special_id(s) for s in SPECIALS}


@given(st.text())
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@given(st.text())
def test_byte_lengths_of_the_tokens_add_up_to_the_text(text):
    assert TOKENIZER.byte_lengths()[TOKENIZER.encode(text)].sum() == len(text.encode())


@given(st.lists(st.sampled_from([*SPECIALS, "x", " ", "<"])))
def test_text_that_spells_special_tokens_stays_text(parts):
    text = "".join(str(p) for p in parts)
    ids = TOKENIZER.encode(text)
    assert not SPECIAL_IDS & set(ids)
    assert TOKENIZER.decode(ids) == text


def test_special_pieces_become_their_ids():
    ids = TOKENIZER.encode_pieces([BOS, "<think>", THINK, "x"])
    assert (ids[0], ids[-2]) == (TOKENIZER.bos_id, TOKENIZER.special_id(THINK))
    assert TOKENIZER.decode(ids, skip_special=True) == "<think><think>x"  # readers see the reasoning marks, not BOS
    assert TOKENIZER.byte_lengths()[ids].sum() == len("<think>x")


def test_a_line_break_takes_the_indentation_with_it():
    pieces = [TOKENIZER.plain.pre_tokenizer.pre_tokenize_str("f(x, *a):\n        return 12345\n\n    y_z")]
    assert [p.replace("Ġ", " ").replace("Ċ", "\n") for p, _ in pieces[0]] == [
        "f", "(x", ", *a", "):\n        ", "return", " ", "123", "45", "\n\n    ", "y", "_z",
    ]  # fmt: skip


def test_training_is_deterministic_across_processes():
    code = f"""
from pathlib import Path
from shoal.data.tokenizer import Tokenizer
files = {[module.__file__, json.__file__, os.__file__]}
print(Tokenizer.train([Path(f).read_text() for f in files], 700).sha256)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == TOKENIZER.sha256


def test_the_vocabulary_has_the_size_asked_for():
    assert TOKENIZER.vocab_size == 700
    with pytest.raises(DataError, match="at least 268"):
        Tokenizer.train(TEXTS, 200)


def test_transformers_opens_the_folder_and_gives_the_same_ids(tmp_path):
    transformers = pytest.importorskip("transformers")
    TOKENIZER.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v3"}')
    text = "def f(x):\n    return 'é漢字🙂'\r\n\t# 12345\n"
    for kind in (transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast):
        theirs = kind.from_pretrained(tmp_path)
        assert theirs.encode(text, add_special_tokens=False) == TOKENIZER.encode(text)
        assert theirs.encode(text) == [TOKENIZER.bos_id, *TOKENIZER.encode(text)]
        assert theirs.decode(TOKENIZER.encode(text)) == text
        assert (theirs.bos_token, theirs.eos_token, len(theirs)) == (BOS, EOS, 700)


def test_a_saved_tokenizer_is_the_same_one(tmp_path):
    TOKENIZER.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert (again.sha256, again.bos_id, again.eos_id) == (TOKENIZER.sha256, TOKENIZER.bos_id, TOKENIZER.eos_id)
    assert again.fim_ids == TOKENIZER.fim_ids


def saved(tmp_path, change) -> Path:
    spec = json.loads(TOKENIZER.text)
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    return tmp_path


def rename(spec, old, new):
    spec["model"]["vocab"][new] = spec["model"]["vocab"].pop(old)
    token = next(t for t in spec["added_tokens"] if t["content"] == old)
    token["content"] = new
    spec["post_processor"] = None


def test_other_peoples_special_names_are_read_from_their_config(tmp_path):
    def change(spec):
        rename(spec, str(EOS), "<|endoftext|>")
        rename(spec, str(BOS), "<|im_start|>")

    saved(tmp_path, change)
    config = {"eos_token": {"content": "<|endoftext|>", "special": True}, "bos_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    other = Tokenizer.load(tmp_path / "tokenizer.json")
    assert other.bos_id is None and other.name(other.eos_id) == "<|endoftext|>"
    assert other.eos_id not in other.encode("<|endoftext|>")
    with pytest.raises(DataError, match="begin"):
        other.special_id(BOS)


def test_sentencepiece_style_vocabularies_count_their_bytes():
    tokens = ["<unk>", "<s>", "</s>", "<0x0A>", "▁", "a", "▁a", "é"]
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": t, "special": True} | FLAGS for i, t in enumerate(tokens[:3])],
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": [["▁", "a"]]},
        "decoder": {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    }  # fmt: skip
    lengths = Tokenizer(json.dumps(spec), "<s>", "</s>").byte_lengths()
    assert lengths.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]


FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def set_id(token, value):
    return lambda spec: spec["model"]["vocab"].update({token: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_id("Ġ", 20), "one id"),
        (set_id("Ġ", -1), "id -1"),
        (set_id("Ġ", 10**9), "id 1000000000"),
        (set_id("Ġ", "7"), "id 7"),
        (lambda s: s["added_tokens"].append(s["added_tokens"][0]), "one token with two"),
        (lambda s: s["added_tokens"][0].update(id=699), "one id"),
        (lambda s: s["added_tokens"].append(s["added_tokens"][0] | {"content": "<far>", "id": 900}), "id 900"),
        (lambda s: s["added_tokens"].append(3), "vocabulary"),
        (lambda s: s["model"]["merges"].append(["a", "nowhere"]), "two tokens"),
        (lambda s: (s["model"]["vocab"].update({"": 700}), s["model"]["merges"].append(["", "a"])), "longer token"),
        (lambda s: s.update(added_tokens=[], model={"type": "BPE", "vocab": {}, "merges": []}), "id"),
        (lambda s: s.update(model=None), "without a vocabulary"),
        (lambda s: s["model"].update(type="Telepathy"), "refuses"),
        (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "("}), "refuses"),
    ],
)
def test_50_a_malformed_tokenizer_is_refused_by_name(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        Tokenizer.load(saved(tmp_path, change))


def test_a_repeated_key_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text(TOKENIZER.text.replace('"vocab": {', '"vocab": {"Ġ": 5,'))
    with pytest.raises(DataError, match="twice"):
        Tokenizer.load(tmp_path)


def test_50_files_that_are_huge_missing_deep_or_not_text_are_refused(tmp_path):
    file = tmp_path / "tokenizer.json"
    with pytest.raises(DataError, match="No such file"):
        Tokenizer.load(tmp_path)
    with file.open("wb") as sparse:
        sparse.truncate(2**30)
    with pytest.raises(DataError, match="at most 104,857,600"):
        Tokenizer.load(tmp_path)
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="UTF-8"):
        Tokenizer.load(tmp_path)
    file.write_text("[" * 100_000)
    with pytest.raises(DataError, match="JSON"):
        Tokenizer.load(tmp_path)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(DataError):
        Tokenizer.load(file)


def test_user_is_not_hidden_in_a_long_text():
    ids = TOKENIZER.encode_batch([f"{USER} {ANSWER}" * 100, "x"])
    assert not SPECIAL_IDS & set(ids[0]) and ids[1] == TOKENIZER.encode("x")
