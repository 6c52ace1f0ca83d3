import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from shoal.data import corpus as module
from shoal.data.config import DataConfig
from shoal.data.corpus import Corpus, Split, duplicates, prepare
from shoal.data.tokenizer import ANSWER, ANSWER_END, ASSISTANT, THINK, THINK_END, USER, Tokenizer
from shoal.errors import ConfigError, DataError, ResourceError
from shoal.tasks.catalog import GENERATORS

VOCAB = 290
TURN = (USER, ASSISTANT, THINK, THINK_END, ANSWER, ANSWER_END)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path):
    """200 small documents, of which some are equal and one is empty."""
    rng = random.Random(0)
    place = tmp_path / "text"
    place.mkdir()
    for i in range(200):
        words = (rng.choice(["def ", "é漢 ", "return\r\n", "    x = 1\n"]) for _ in range(rng.randint(1, 30)))
        (place / f"{i:03}.txt").write_bytes("".join(words).encode())
    (place / "copy.txt").write_bytes((place / "007.txt").read_bytes())
    (place / "empty.txt").write_bytes(b"")
    return place


def config(*sources, **changes) -> DataConfig:
    return replace(DataConfig(tuple(map(str, sources)), VOCAB), **changes)


def documents(split: Split, tokenizer: Tokenizer) -> list[bytes]:
    bounds = zip(split.doc_starts, split.doc_starts[1:])
    return [tokenizer.decode(split.tokens[a:b].tolist(), skip_special=True).encode() for a, b in bounds]


def test_every_document_stands_whole_on_its_side_of_the_hash(folder):
    corpus = prepare(config(folder))
    contents = {f.read_bytes() for f in folder.iterdir()} - {b""}
    train, val = (documents(s, corpus.tokenizer) for s in (corpus.train, corpus.val))
    assert len(train + val) == len(contents) and set(train + val) == contents
    assert all(hashlib.sha256(d).hexdigest().endswith("f") == (d in val) for d in contents)
    assert len(val) > 3
    starts = corpus.train.doc_starts
    assert set(corpus.train.tokens[starts[:-1]]) == {corpus.tokenizer.bos_id}
    assert set(corpus.train.tokens[starts[1:] - 1]) == {corpus.tokenizer.eos_id}


def test_bytes_add_up_to_those_of_the_files(folder):
    corpus = prepare(config(folder))
    lengths = corpus.tokenizer.byte_lengths()
    total = sum(len(d) for d in {f.read_bytes() for f in folder.iterdir()})
    assert corpus.train.n_bytes + corpus.val.n_bytes == total
    assert lengths[corpus.train.tokens].sum() == corpus.train.n_bytes
    assert lengths[corpus.val.tokens].sum() == corpus.val.n_bytes


def test_what_was_dropped_is_counted(folder):
    (folder / "image.png").write_bytes(b"\0")
    (count,) = prepare(config(folder)).info["sources"]
    contents = {f.read_bytes() for f in folder.glob("*.txt")} - {b""}
    assert (count["unique"], count["empty"], count["skipped"]) == (len(contents), 1, 1)
    assert count["duplicates"] == 202 - 1 - len(contents) >= 1


def test_a_second_start_reads_the_cache_and_a_change_does_not(folder, monkeypatch):
    first = prepare(config(folder))
    with monkeypatch.context() as m:
        m.setattr(module, "build", None)
        assert prepare(config(folder)).folder == first.folder
    (folder / "new.txt").write_text("something new")
    assert prepare(config(folder)).folder != first.folder
    assert prepare(config(folder, vocab_size=280)).tokenizer.vocab_size == 280


def test_the_same_sources_make_the_same_bytes(folder, tmp_path):
    a, b = (prepare(config(folder), out=tmp_path / name) for name in "ab")
    assert a.info == b.info
    a.verify()


def test_a_given_tokenizer_is_used_as_it_is(folder, tmp_path):
    Tokenizer.train(["other text"], 300).save(tmp_path / "tok")
    corpus = prepare(config(folder, tokenizer=str(tmp_path / "tok")))
    assert corpus.tokenizer.sha256 == Tokenizer.load(tmp_path / "tok").sha256


def test_a_prepared_corpus_is_a_source_of_its_own(folder, tmp_path):
    made = prepare(config(folder), out=tmp_path / "corpus")
    again = prepare(DataConfig((str(made.folder),)))
    assert again.folder == made.folder and again.info == made.info
    for sources in ((str(made.folder), str(folder)), (f"{made.folder}@2",)):
        with pytest.raises(DataError, match="a prepared corpus"):
            prepare(DataConfig(sources))
    other = Tokenizer.train(["some other text"], 300)
    other.save(tmp_path / "other")
    with pytest.raises(DataError, match="with the tokenizer"):
        prepare(DataConfig((str(made.folder),), tokenizer=str(tmp_path / "other")))


def test_large_vocabularies_take_four_bytes(folder, tmp_path):
    tokenizer = Tokenizer.train(["x"], 300)
    spec = json.loads(tokenizer.text)
    spec["model"]["vocab"]["far"] = 70_000
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    corpus = prepare(config(folder, tokenizer=str(tmp_path)))
    assert corpus.train.tokens.dtype == np.uint32
    assert sum(map(len, documents(corpus.train, corpus.tokenizer))) == corpus.train.n_bytes


def test_worked_items_keep_their_special_tokens_and_their_own_held_out_part(folder):
    corpus = prepare(config(folder, "worked-arithmetic:300"), GENERATORS)
    part = corpus.held_out("worked-arithmetic")
    tokenizer = corpus.tokenizer
    assert corpus.held_out(str(folder)).n_documents + part.n_documents == corpus.val.n_documents
    texts = {
        f"<｜User｜>{p}<｜Assistant｜><think>{r}</think><answer>{a}</answer>"
        for p, r, a in GENERATORS["worked-arithmetic"](300)
    }
    for start, end in zip(part.doc_starts, part.doc_starts[1:]):
        ids = part.tokens[start:end].tolist()
        assert tokenizer.decode(ids[1:-1]) in texts
        assert all(ids.count(tokenizer.special_id(s)) == 1 for s in TURN)
    assert part.n_bytes == tokenizer.byte_lengths()[part.tokens].sum()
    with pytest.raises(DataError, match="no held-out"):
        corpus.held_out("elsewhere")


def test_a_repeated_source_repeats_in_training_only(folder):
    once, thrice = prepare(config(folder)), prepare(config(f"{folder}@3"))
    assert thrice.train.tokens.tolist() == once.train.tokens.tolist() * 3
    assert thrice.train.n_bytes == 3 * once.train.n_bytes
    assert thrice.val.tokens.tolist() == once.val.tokens.tolist()


def test_duplicates_between_foreign_splits_are_found():
    def split(*docs):
        return Split(np.concatenate(docs), np.cumsum([0, *map(len, docs)]), 0)

    a, b, c = np.array([1, 2, 3], np.uint16), np.array([1, 2], np.uint32), np.array([3, 1, 2], np.uint16)
    assert duplicates(split(a, c), split(b, b, c.astype(np.uint32))) == [2]
    with pytest.raises(DataError, match="1 held-out documents"):
        module.check_disjoint(split(a), split(b, a))


@pytest.mark.parametrize("content", [b"", b"\0\1\2"])
def test_an_empty_or_binary_corpus_is_refused_and_leaves_nothing(tmp_path, cache, content):
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "file").write_bytes(content)
    with pytest.raises(DataError, match="no documents"):
        prepare(config(tmp_path / "only"))
    assert list((cache / "corpora").iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing(folder, tmp_path):
    code = f"""
import resource
from shoal.data.config import DataConfig
from shoal.data.corpus import prepare
from shoal.errors import ResourceError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # smaller than the tokenizer.json
try:
    prepare(DataConfig(sources=({str(folder)!r},), vocab_size=2000))
except ResourceError as e:
    print("refused:", e)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.startswith("refused: a full disk"), out
    assert os.listdir(tmp_path / "cache" / "corpora") == []


def test_a_full_disk_in_the_middle_of_the_tokens_leaves_nothing(folder, cache, monkeypatch):
    write = module.SplitWriter.write

    def full(self, ids, n_bytes):
        if self.n_documents == 20:
            raise OSError(28, "No space left on device")
        write(self, ids, n_bytes)

    monkeypatch.setattr(module.SplitWriter, "write", full)
    with pytest.raises(ResourceError, match="full disk"):
        prepare(config(folder))
    assert os.listdir(cache / "corpora") == []


def test_a_draft_of_a_killed_process_is_no_obstacle(folder, tmp_path):
    (tmp_path / ".out.draft" / "train").mkdir(parents=True)
    prepare(config(folder), out=tmp_path / "out").verify()
    assert not (tmp_path / ".out.draft").exists()


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_prepare_killed_at_any_moment_leaves_the_whole_or_nothing(folder, tmp_path):
    code = f"""
from pathlib import Path
from shoal.data.config import DataConfig
from shoal.data.corpus import prepare
print("ready", flush=True)
prepare(DataConfig(sources=({str(folder)!r},), vocab_size=290), out=Path({str(tmp_path / "out")!r}))
"""
    outcomes = set()
    for delay in np.linspace(0.001, 0.12, 25):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline()
            time.sleep(delay)
            process.kill()
        if (tmp_path / "out").exists():
            Corpus.open(tmp_path / "out").verify()
            shutil.rmtree(tmp_path / "out")
            outcomes.add("whole")
        else:
            outcomes.add("nothing")
    assert outcomes == {"whole", "nothing"}
    prepare(config(folder), out=tmp_path / "out").verify()
    assert not (tmp_path / ".out.draft").exists()


def test_two_processes_that_want_one_corpus_build_it_once(folder, tmp_path):
    code = f"""
from shoal.data import corpus
from shoal.data.config import DataConfig
build = corpus.build
corpus.build = lambda *args: (print("built"), build(*args))
corpus.prepare(DataConfig(sources=({str(folder)!r},), vocab_size=290))
"""
    twins = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [twin.communicate()[0] for twin in twins]
    assert [twin.returncode for twin in twins] == [0, 0] and sorted(outputs) == [b"", b"built\n"]


@pytest.mark.parametrize("changes", [{"sources": ()}, {"vocab_size": 200}, {"val_suffixes": "F"}, {"fim_rate": 2.0}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(ConfigError):
        replace(DataConfig(), **changes)


def test_an_occupied_place_is_left_alone(folder, tmp_path):
    prepare(config(folder), out=tmp_path / "out")
    with pytest.raises(DataError, match="another corpus"):
        prepare(config(folder, vocab_size=280), out=tmp_path / "out")
    with pytest.raises(DataError, match=r"corpus\.json"):
        prepare(config(folder), out=folder)
    Corpus.open(tmp_path / "out").verify()


@pytest.mark.parametrize("name", ["corpus.json", "tokenizer.json", "train/tokens.bin", "val/doc_starts.bin"])
@pytest.mark.parametrize("how", ["cut", "deleted", "emptied"])
def test_damage_is_found_on_opening(folder, tmp_path, name, how):
    prepare(config(folder), out=tmp_path / "out")
    file = tmp_path / "out" / name
    content = file.read_bytes()
    file.unlink()
    if how != "deleted":
        file.write_bytes(content[: len(content) // 2] if how == "cut" else b"")
    with pytest.raises(DataError):
        Corpus.open(tmp_path / "out")


def test_of_a_folder_that_is_no_corpus_nobody_is_told_to_remove_it(folder):
    with pytest.raises(DataError, match="without corpus.json") as e:
        Corpus.open(folder)
    assert "remove" not in e.value.fix


def test_a_flipped_token_is_found_by_verifying(folder, tmp_path):
    corpus = prepare(config(folder), out=tmp_path / "out")
    file = tmp_path / "out" / "val" / "tokens.bin"
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="val"):
        corpus.verify()


def test_a_model_with_too_few_rows_is_refused(folder):
    corpus = prepare(config(folder))
    corpus.check_vocabulary(VOCAB)
    with pytest.raises(DataError, match="a model of 289 tokens"):
        corpus.check_vocabulary(289)
