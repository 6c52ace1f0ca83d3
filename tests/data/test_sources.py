import json
import sys

import pytest

from shoal.data.sources import read_files, resolve
from shoal.data.tokenizer import ASSISTANT, THINK
from shoal.errors import DataError


def read(spec, generators=None) -> tuple[list, list[str]]:
    skipped: list[str] = []
    return list(resolve(str(spec), generators or {}).documents(skipped)), skipped


def test_text_is_taken_byte_for_byte(tmp_path):
    content = "\ufeffa\r\nb\rc\n\tü".encode()
    (tmp_path / "a.txt").write_bytes(content)
    assert [d.encode() for d in read(tmp_path / "a.txt")[0]] == [content]


def test_a_folder_means_its_text_and_says_what_it_skipped(tmp_path):
    for name, content in {"b.py": b"b", "sub/a.md": b"a", "x.png": b"\x89PNG\0", "latin.txt": b"\xe9"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    documents, skipped = read(tmp_path)
    assert documents == ["b", "a"]
    assert [s.rsplit("/", 1)[1] for s in skipped] == ["latin.txt", "x.png"]


def test_a_glob_reaches_into_folders(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c.md").write_text("c")
    (tmp_path / "a" / "d.txt").write_text("d")
    assert read(tmp_path / "**" / "*.md")[0] == ["c"]


def test_jsonl_and_parquet_give_their_text(tmp_path):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"content": "two\\n", "id": 2}\n')
    parquet.write_table(pyarrow.table({"id": [1, 2, 3], "text": ["three", None, "four"]}), tmp_path / "b.parquet")
    assert read(tmp_path)[0] == ["one", "two\n", "three", "four"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\0", "not text"),
        ("a.txt", b"\xff", "not text"),
        ("a.jsonl", b'{"text": "x"}\n{oops\n', "line 2"),
        ("a.jsonl", b'{"txet": "x"}', "line 1 without text"),
        ("a.jsonl", b"[" * 100_000, "line 1"),
        ("a.parquet", b"PAR1", "Parquet"),
    ],
)
def test_a_named_file_that_is_not_what_it_says_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


@pytest.mark.parametrize("spec", ["no/such/path", "no/*.such", "worked-arithmetic", "python-stdlib@0"])
def test_a_source_that_names_nothing_is_refused(spec):
    with pytest.raises(DataError):
        resolve(spec, {})


def test_the_stamp_changes_with_the_content(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    before = resolve(str(tmp_path), {})
    assert before.stamp == resolve(str(tmp_path), {}).stamp
    (tmp_path / "a.txt").write_text("longer")
    assert before.stamp != resolve(str(tmp_path), {}).stamp
    assert resolve(f"{tmp_path}@3", {}).repeat == 3


def count_to(n):
    return ((f"after {i}?", "add one", str(i + 1)) for i in range(n))


def test_generated_items_become_turns_with_special_tokens():
    documents, _ = read("counting:2", {"counting": count_to})
    assert len(documents) == 2
    assert documents[1][1:5] == ("after 1?", ASSISTANT, THINK, "add one")
    assert resolve("counting:2", {"counting": count_to}).stamp != resolve("counting:3", {"counting": count_to}).stamp
    with pytest.raises(DataError, match="whole number"):
        resolve("counting:many", {"counting": count_to})


def test_python_stdlib_is_this_interpreters_own_source():
    source = resolve("python-stdlib", {})
    files = source.documents.args[0]
    assert len(files) > 500 and not any("site-packages" in f.parts for f in files)
    chosen = [f for f in files if f.name == "textwrap.py"]
    assert list(read_files(chosen, False, [])) == [chosen[0].read_bytes().decode()]


def test_hugging_face_datasets_are_read_where_installed(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["a", "b"]}).save_to_disk(tmp_path / "set")
    assert read(f"hf:{tmp_path / 'set'}")[0] == ["a", "b"]


def test_missing_datasets_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="pip install"):
        resolve("hf:some/name", {})


def test_half_a_character_is_skipped_not_fatal(tmp_path):
    from shoal.data.corpus import Reader

    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "\ud800"}) + "\n" + json.dumps({"text": "fine"}))
    source = resolve(str(tmp_path / "a.jsonl"), {})
    reader = Reader([source])
    assert [pieces for _, pieces in reader.documents(source)] == [("fine",)]
    assert len(reader.counts[0].skipped) == 1
