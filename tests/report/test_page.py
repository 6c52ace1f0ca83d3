"""A report shows what a run says, says what is missing, and lets nothing a model wrote act."""

import json
import random
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import RunError
from shoal.model.config import MoEConfig
from shoal.model.counts import count_parameters
from shoal.model.presets import PRESETS
from shoal.plan import memory
from shoal.report import page, words
from tests.report.synthetic import put, solved, write_run

FILES = [
    "config.toml",
    "config.origin.json",
    "command.txt",
    "env.json",
    "status.json",
    "metrics.jsonl",
    "plan.json",
    "receipt.json",
    "evals/held_out.json",
    "evals/expert_load.json",
    "evals/tasks.json",
    "samples/1.json",
]
HOSTILE = """</pre></title></style>-->
<script>alert(1)</script><img src=//x.test/a onerror=alert(2)><a href="javascript:1">
' onmouseover='alert(3)' {{ 7 * 7 }} | `]]> **bold** [x](http://x.test) <b>\0&amp;"""
VOID = {"meta", "link", "br", "line", "use", "polyline", "polygon", "path"}


class Document(HTMLParser):
    """Tags and attributes as a browser would find them, and the text of each kind of element."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.code: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "pre":
            self.code.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "pre" in self.open:
            self.code[-1] += data


@pytest.fixture
def run(tmp_path) -> Path:
    return write_run(tmp_path / "2026-11-21_quickstart_k3f9", steps=150)


def written(run: Path) -> Document:
    document = Document(page.write(run).read_text("utf-8"))
    assert document.open == []
    return document


def test_the_page_says_what_the_files_say(run):
    text = " ".join(" ".join(written(run).text).split())
    size = words.count(count_parameters(PRESETS["mini"]).total)
    assert f"{size}-parameter language model that needs 0.862 bits per byte" in text
    assert "36% less than xz -9e" in text
    assert "It took 1% less than the 9.7 min predicted." in text
    moe = PRESETS["mini"].moe
    assert moe is not None and f"A layer's {moe.n_routed_experts} experts." in text and "the 2 lit ones" in text
    cache = f"{memory.cache_bytes_per_token(PRESETS['mini']):,} bytes a token"
    for said in ("9,850 10,000 +1.5%", cache, "1a2b3c4d5e6f", "optim.lr 0.02 flag"):
        assert said in text
    assert "not measured" not in text and "could not be read" not in text


def test_markdown_tells_the_same_facts(run):
    page.write(run)
    text = (run / "report.md").read_text("utf-8")
    for said in ("0.862 bits per byte", "36% less than xz -9e", "| tokens a second | 9,850 | 10,000 | +1.5% |", "k3f9"):
        assert said in text


def test_a_worse_model_than_a_compressor_is_said_to_be_worse(run):
    put(run / "evals/held_out.json", {"metric": "bits_per_byte", "value": 2.031, "yardsticks": {"xz -9e": 1.354}})
    assert "50% more than xz -9e" in " ".join(written(run).text)


def test_problems_solved_are_drawn_and_tabled(run):
    found = page.look(page.read(run), "x")["solved"]
    assert [c.title for c in found["charts"]] == ["Thinking longer", "More attempts", "Harder problems"]
    longer, more, harder = found["charts"]
    assert [it.name for it in longer.lines] == ["one attempt", "majority of 16"] and len(longer.lines[0].band) == 5
    assert [len(it.points) for it in more.lines] == [5, 5] and [t.text for t in more.x_ticks] == "1 2 4 8 16".split()
    assert [(it.name, len(it.points)) for it in harder.lines] == [("countdown", 2), ("chain_sum", 3)]
    text = " ".join(" ".join(written(run).text).split())
    rows = json.loads((run / "evals/tasks.json").read_text())["budgets"]
    shown = [f"{point['rows'][3]['accuracy']:.1%}" for point in rows]
    assert "chain_sum 1 40 " + " ".join(shown) in text
    assert "| chain\\_sum | 1 | 40 | " + " | ".join(shown) in (run / "report.md").read_text()


def test_several_evaluations_stand_side_by_side(run):
    put(run / "evals/tasks.json", solved("base", -0.2))
    put(run / "evals/zero.json", solved("R1-Zero", 0.1))
    found = page.look(page.read(run), "x")["solved"]
    assert all([it.name for it in chart.lines] == ["base", "R1-Zero"] for chart in found["charts"])
    assert [t["name"] for t in found["tables"]] == ["base", "R1-Zero"]


def test_one_budget_makes_no_curve_over_budgets(run):
    one = solved("x", 0.0)
    put(run / "evals/tasks.json", one | {"budgets": one["budgets"][-1:]})
    assert [c.title for c in page.look(page.read(run), "x")["solved"]["charts"]] == ["More attempts", "Harder problems"]


def test_samples_are_shown_as_they_are(run):
    sample = json.loads((run / "samples/1.json").read_text())
    assert sample["prompt"] + sample["text"] in written(run).code


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_a_gap_and_no_crash(run, file):
    (run / file).unlink()
    document = written(run)
    gaps = {"evals/held_out.json": "0.8", "receipt.json": "not measured", "plan.json": "not predicted"}
    assert gaps.get(file, "") in " ".join(document.text)
    assert "could not be read" not in " ".join(document.text)


def test_a_run_that_has_only_begun_has_a_page(run):
    for file in FILES[1:]:
        (run / file).unlink()
    shutil.rmtree(run / "samples")
    shutil.rmtree(run / "evals")
    text = " ".join(written(run).text)
    assert "quality on held-out text was not measured" in text
    assert text.count("not measured") >= 7


def test_no_run_is_an_error_that_says_so(tmp_path):
    with pytest.raises(RunError, match="is not a run"):
        page.write(tmp_path)


@pytest.mark.parametrize("file", [f for f in FILES if f != "command.txt"])
@pytest.mark.parametrize("damage", [b"\x00\xff\xfe[[", b"[" * 100_000, b'{"step": NaN', b"= = =\n{}{"], ids=range(4))
def test_a_damaged_file_is_named_on_the_page(run, file, damage):
    (run / file).write_bytes(damage)
    text = " ".join(written(run).text)
    assert "could not be read" in text and Path(file).name in text


def test_a_torn_last_line_costs_that_line_alone(run):
    before = page.look(page.read(run), "x")["charts"][0].lines[0].points
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"step": 151, "train/lo')
    after = page.read(run)
    assert len(after.series["train/loss"]) == len(before) == 150
    assert after.problems == ["1 damaged line in metrics.jsonl left out"]


NUMBERS = st.floats() | st.integers(-(10**400), 10**400) | st.sampled_from([0, -1, 1e-320, 1e29, 1e308])
ANYTHING = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_in_any_place_gives_a_page(run, data):
    """One value anywhere in any JSON file replaced by any other: a page comes out, whole and well formed."""
    file = data.draw(st.sampled_from([f for f in FILES if f.endswith((".json", ".jsonl"))]))
    original = (run / file).read_text()
    lines = original.splitlines()
    at = data.draw(st.integers(0, len(lines) - 1))
    record = box = json.loads(lines[at])
    while True:
        key = data.draw(st.sampled_from(sorted(box) if isinstance(box, dict) else range(len(box))))
        if not isinstance(box[key], (dict, list)) or not box[key] or data.draw(st.booleans()):
            break
        box = box[key]
    box[key] = data.draw(ANYTHING)
    lines[at] = json.dumps(record)
    try:
        (run / file).write_text("\n".join(lines) + "\n")
        written(run)
    finally:
        (run / file).write_text(original)


def containers(value):
    """(container, key) of every value inside."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from containers(inner)


def test_whatever_a_run_holds_is_text_and_nothing_else(run):
    plain = written(run)
    for file in FILES:
        if file.endswith(".json"):
            record = json.loads((run / file).read_text())
            for box, key in list(containers(record)):
                if isinstance(box[key], str):
                    box[key] = HOSTILE
            record |= {HOSTILE: HOSTILE}
            put(run / file, record)
    held_out = json.loads((run / "evals/held_out.json").read_text())
    put(run / "evals/held_out.json", held_out | {"metric": "bits_per_byte", "yardsticks": {HOSTILE: 1.354}})
    (run / "command.txt").write_text(HOSTILE)
    run = run.rename(run.with_name("<script>x<"))
    document = written(run)
    assert sorted({tag for tag, _ in document.tags}) == sorted({tag for tag, _ in plain.tags})
    for tag, attributes in document.tags:
        assert tag not in ("script", "img", "iframe", "object", "embed", "form", "base", "a")
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in attributes)
        assert (attributes.get("href") or "#").startswith(("#", "data:image/svg+xml,"))
        assert "url(" not in (attributes.get("style") or "")
    shown = HOSTILE.replace("\0", "\ufffd")
    assert sum(shown.strip() in text.replace("\0", "\ufffd") for text in document.code) >= 2


def test_nothing_in_the_page_names_another_place(run):
    html = page.write(run).read_text("utf-8")
    assert "default-src 'none'" in html and "<script" not in html and "@import" not in html
    assert "http" not in html.replace("http-equiv", "").replace("xmlns='http://www.w3.org/2000/svg'", "")


def test_the_lit_fish_are_the_experts_a_token_meets():
    for n, lit in ((8, 2), (32, 4), (64, 6), (256, 8), (5, 3)):
        fish = page.school(replace(PRESETS["mini"], moe=MoEConfig(n, 1, n_activated=lit, moe_dim=8)))
        assert len(fish) == n and sum(f["lit"] for f in fish) == lit
        assert all(0 < f["x"] < 100 and 0 < f["y"] < 100 for f in fish)


def test_a_page_does_not_grow_with_the_length_of_a_run(tmp_path):
    sizes = [page.write(write_run(tmp_path / str(n), steps=n)).stat().st_size for n in (1000, 8000)]
    assert sizes[1] < 1.2 * sizes[0]


def test_reading_twice_gives_the_same_page(run):
    first = page.write(run).read_bytes()
    random.seed(7)
    assert page.write(run).read_bytes() == first


@pytest.mark.parametrize("recipe", ["sft", "distill"])
def test_a_page_of_fine_tuning_shows_what_there_is_and_no_gaps(run, recipe):
    for file in ("plan.json", "receipt.json", "evals/held_out.json", "evals/expert_load.json", "evals/tasks.json"):
        (run / file).unlink()
    shutil.rmtree(run / "samples")
    lines = [{"step": i, "train/loss": 3.0 - i, "train/tokens": 10 * i, "time/seconds": i} for i in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.toml").write_text('model = "base"\n')
    put(run / "status.json", {"recipe": recipe, "state": "done"})
    document = written(run)
    text = " ".join(document.text)
    assert "from 2.00 to 1.00 nats a token" in text and "How it learned" in text
    assert any("shoal chat" in code for code in document.code)
    for said in (text, (run / "report.md").read_text("utf-8")):
        for word in ("not measured", "not known", "How well it predicts", "What it writes", "Receipt"):
            assert word not in said
