"""The page of a run of reinforcement: what it could before and after, what it answered, gaps where a run has them."""

import json
from pathlib import Path

import pytest

from shoal.report import page
from shoal.report.dialogues import ends
from tests.report.synthetic import put, write_reinforced
from tests.report.test_page import HOSTILE, written


@pytest.fixture
def run(tmp_path) -> Path:
    return write_reinforced(tmp_path / "run", steps=60)


def looked(run: Path) -> dict:
    return page.look(page.read(run), "x", ends(run))


def test_before_and_after_make_the_headline(run):
    found = looked(run)
    assert found["verdict"][0] == "From 13.0% to 63.0% of held-out problems solved"
    assert [e.name for e in page.reasoning.evaluations(page.read(run))] == ["before", "after"]
    assert found["next_command"] == "shoal samples x"


def test_an_untested_run_speaks_of_training(run):
    (run / "evals/after.json").unlink()
    assert looked(run)["verdict"][0].startswith("Right answers in training: ")


def test_every_curve_is_drawn_from_its_metric(run):
    titles = [chart.title for chart in looked(run)["charts"]]
    assert titles[:3] == ["Right answers", "Reward", "Length of an answer"]
    assert {"Entropy", "What teaches", "Engine against trainer"} < set(titles) and "Training loss" not in titles
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    few = "".join(json.dumps({k: v for k, v in line.items() if k != "gap/k3"}) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(few)
    assert "Engine against trainer" not in [chart.title for chart in looked(run)["charts"]]


def test_tasks_are_in_the_order_of_what_is_solved(run):
    rows = looked(run)["reinforced"]["levels"]
    assert rows[0]["name"] == "addition 1" and rows[-1]["name"] == "chain_sum 2"
    assert all(0 <= cell["share"] <= 1 for row in rows for cell in row["cells"])
    assert rows[0]["cells"][0]["share"] < rows[0]["cells"][-1]["share"]


def test_answers_of_the_first_and_of_the_last_step(run):
    talks = looked(run)["reinforced"]["talks"]
    assert [talk["step"] for talk in talks] == [1, 1, 60, 60] and talks[-1]["thinking"].startswith("Step by step.")
    document = written(run)
    assert any("17 + 48 = 65" in text for text in document.code)
    assert "17 + 48 = 65" in (run / "report.md").read_text("utf-8")


def test_an_answer_may_hold_any_mark(run):
    line = {"step": 1, "index": 9, "sample": 0, "prompt": "?", "text": "a\u2028b\u2029c\x85d"}
    (run / "samples/rollouts.jsonl").write_text(json.dumps(line, ensure_ascii=False) + "\n", "utf-8")
    assert [d.said or d.thinking for d in ends(run)] == [line["text"]]


@pytest.mark.parametrize("damage", ["", "{", '{"step": 1, "prompt": 3}', "\x00\n[]"])
def test_damaged_rollouts_leave_a_page(run, damage):
    (run / "samples/rollouts.jsonl").write_text(damage)
    assert ends(run) == [] and written(run)
    (run / "samples/rollouts.jsonl").unlink()
    assert ends(run) == [] and written(run)


def test_nothing_a_model_wrote_acts(run):
    line = {
        "step": 60,
        "index": 9,
        "sample": 0,
        "prompt": HOSTILE,
        "text": HOSTILE,
        "outcome": HOSTILE,
        "task": HOSTILE,
    }
    (run / "samples/rollouts.jsonl").write_text(json.dumps(line) + "\n")
    put(run / "evals/after.json", {"metric": "accuracy", "value": HOSTILE, "budgets": [{"rows": [{"task": HOSTILE}]}]})
    document = written(run)
    assert not {"script", "img", "a"} & {tag for tag, _ in document.tags}
    assert not any(name.startswith("on") for _, attributes in document.tags for name in attributes)
