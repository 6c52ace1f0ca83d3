"""`shoal data` and `shoal tokenizer`, from the command line to the files."""

import json
import random

import pytest

from shoal.cli import data, tokenizer
from shoal.data.corpus import Corpus
from shoal.data.tokenizer import Tokenizer
from shoal.errors import DataError


@pytest.fixture
def folder(tmp_path):
    rng = random.Random(1)
    (tmp_path / "text").mkdir()
    for i in range(100):
        (tmp_path / "text" / f"{i}.md").write_text(" ".join(rng.choices("ab cd ef gh".split(), k=40)))
    return tmp_path / "text"


def test_prepare_then_check(folder, tmp_path, capsys):
    out = str(tmp_path / "out")
    more = ["--source", "worked-arithmetic:50", "--vocab-size", "300", "--out", out]
    assert data.main(["prepare", "--source", str(folder / "*.md"), *more]) == 0
    corpus = Corpus.open(out)
    assert f"{len(corpus.train.tokens):,} tokens" in capsys.readouterr().out
    assert corpus.info["sources"][0]["unique"] == 100
    assert data.main(["check", out]) == 0
    tokens = tmp_path / "out" / "train" / "tokens.bin"
    tokens.write_bytes(bytes(len(tokens.read_bytes())))
    with pytest.raises(DataError, match="hash"):
        data.main(["check", out])


def test_a_glob_that_the_shell_opened_means_the_same(folder, tmp_path):
    for name, given in {"a": [str(folder / "*.md")], "b": sorted(map(str, folder.glob("*.md")))}.items():
        data.main(["prepare", "--source", *given, "--vocab-size", "290", "--out", str(tmp_path / name)])
    a, b = (json.loads((tmp_path / name / "corpus.json").read_text())["splits"] for name in "ab")
    assert a == b


def test_a_trained_tokenizer_can_be_given_to_prepare(folder, tmp_path, capsys):
    out = str(tmp_path / "tok")
    assert tokenizer.main(["train", "--source", str(folder), "--vocab-size", "270", "--out", out]) == 0
    assert Tokenizer.load(out).vocab_size == 270
    with pytest.raises(DataError, match="has a tokenizer"):
        tokenizer.main(["train", "--source", str(folder), "--out", out])
    data.main(["prepare", "--source", str(folder), "--tokenizer", out, "--out", str(tmp_path / "c")])
    assert Corpus.open(tmp_path / "c").tokenizer.sha256 == Tokenizer.load(out).sha256
