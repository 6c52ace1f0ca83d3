"""The page of a whole chain: models side by side, and what any file of it may hold."""

import json
from pathlib import Path

import pytest

from shoal.report import chain, page
from tests.report.chained import FILES, MODELS, write_chain
from tests.report.test_page import HOSTILE, Document, containers, put


@pytest.fixture
def run(tmp_path) -> Path:
    return write_chain(tmp_path / "2026-11-22_quickstart_k3f9")


def written(run: Path) -> Document:
    return Document(chain.write(run).read_text("utf-8"))


def said(run: Path) -> str:
    return " ".join(" ".join(written(run).text).split())


def test_the_page_tells_what_came_of_each_model(run):
    text = said(run)
    assert "A model that solved 28.0% of problems it had never seen learned to solve 66.0%" in text
    for name in MODELS:
        assert name in text
    assert "✗ wrong" in text and "✓ right" in text and "9+4=13" in text
    assert "R1-Zero: reinforcement alone 2.0 min 2.2 min 20 steps, 10.2K answers" in text
    assert "kept 300 (30%)" in text and "75 general questions were added" in text
    assert "shoal quickstart --minutes 10" in text
    assert (run / "base.html").exists() and "| R1 |" in (run / "report.md").read_text()


def test_a_gain_that_chance_could_make_is_called_none(run):
    path = run / "stages/6_r1/evals/problems.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    wrong = [line | {"outcome": "right" if line["item"] == 0 else "wrong"} for line in lines]
    path.write_text("\n".join(map(json.dumps, wrong)))
    assert "no gain that these problems could show" in said(run)


def test_a_line_is_what_ends_at_its_end_whatever_marks_are_in_it(run):
    path, problems = run / "stages/6_r1/evals/problems.jsonl", []
    lines = [json.loads(line) | {"said": "a\u2028b\u2029c\x85d"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    found = chain.attempts(path, problems)
    assert sum(map(len, found.values())) == len(lines) / 2 and not problems


def test_before_all_stages_are_done_it_says_so(run):
    table = json.loads((run / "pipeline.json").read_text())
    put(run / "pipeline.json", {"stages": [table["stages"][0] | {"state": "running"}]})
    text = said(run)
    assert "not all of them done" in text and "running" in text


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", [b"\x00\xff\xfe[[", b"[" * 100_000, b"{}{"], ids=range(3))
def test_damaged_and_missing_files_cost_their_part(run, file, damage):
    (run / file).write_bytes(damage)
    written(run)
    (run / file).unlink()
    written(run)


@pytest.mark.parametrize("file", [f for f in FILES if f != "stages/1_r1_zero/metrics.jsonl"])
@pytest.mark.parametrize("value", [None, [], {}, "text", -1e308, True], ids=str)
def test_any_value_in_any_place_gives_a_page(run, file, value):
    """All values of one key at a time, in each line of the file."""
    lines = [json.loads(line) for line in (run / file).read_text().splitlines()]
    keys = list(lines[0])
    for key in keys:
        (run / file).write_text("\n".join(json.dumps(line | {key: value}) for line in lines))
        chain.look(chain.read(run), run)


def test_whatever_a_chain_holds_is_text_and_leads_nowhere(run):
    for file in FILES:
        lines = [json.loads(line) for line in (run / file).read_text().splitlines()]
        for record in lines:
            for box, key in list(containers(record)):
                if isinstance(box[key], str) and key not in ("folder", "kind", *MODELS):
                    box[key] = HOSTILE
        (run / file).write_text("\n".join(map(json.dumps, lines)) + "\n")
    table = json.loads((run / "pipeline.json").read_text())
    table["stages"].append(table["stages"][0] | {"folder": "javascript:alert(1)//"})
    table["stages"].append(table["stages"][0] | {"folder": "../../etc"})
    put(run / "pipeline.json", table)
    for tag, attributes in written(run).tags:
        assert tag not in ("script", "img", "iframe", "object", "embed", "form", "base")
        assert (attributes.get("href") or "#").startswith(("#", "data:image/svg+xml,", "stages/", "base.html"))
        assert not any(name.startswith("on") for name in attributes)


def test_the_pages_of_fine_tuning_and_sampling_open_with_what_came_of_them(run):
    put(run / "status.json", {"recipe": "samples"})
    put(run / "evals/kept.json", {"name": "kept", "metric": "share", "value": 0.25})
    assert page.look(chain.read(run), "x")["verdict"][0].startswith("Of a model's answers 25.0% were right")
    put(run / "status.json", {"recipe": "sft"})
    assert page.look(chain.read(run), "x")["verdict"][0].startswith("A model that learned its lessons: from 8.")
