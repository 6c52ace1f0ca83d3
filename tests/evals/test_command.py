"""`shoal eval` as a user calls it, on a model that knows nothing."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.cli import eval as verb
from shoal.cli import score
from shoal.errors import ConfigError
from shoal.evals import record
from shoal.evals.harness import Attempt, Rules, problems
from shoal.model import hf
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.tasks import catalog
from shoal.tasks.catalog import resolve
from shoal.tasks.task import Made, Task
from tests.engine.outputs import TOKENIZER, VOCAB
from tests.evals.spoken import ITEMS, item

ASKED = ["--tasks", "addition,countdown", "--levels", "1,2", "--items", "6", "--samples", "2", "--max-tokens", "20"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint where a run would keep it."""
    run = tmp_path_factory.mktemp("runs") / "r"
    folder = run / "checkpoints" / "step-000012"
    folder.mkdir(parents=True)
    (run / "config.toml").write_text("")
    config = replace(PRESETS["tiny"], vocab_size=VOCAB, max_positions=256, init_std=0.2)
    hf.save(Transformer(config).init_weights(0), folder, bos_id=TOKENIZER.bos_id, eos_id=TOKENIZER.eos_id)
    TOKENIZER.save(folder)
    return folder


def test_it_prints_a_row_a_budget_and_leaves_files_in_the_run(model, capsys):
    assert verb.main([str(model), *ASKED, "--budgets", "0,8,free", "--dtype", "float32"]) == 0
    shown = capsys.readouterr().out
    head, *rows = [line.split() for line in shown.splitlines()]
    assert head == "task level budget problems pass@1 95% pass@2 cons@2 thinking".split()
    assert [row[:4] for row in rows[:3]] == [["all", "all", budget, "6"] for budget in ("0", "8", "free")]
    assert rows[0][-1] == "0.0" and float(rows[1][-1]) <= 8
    folder = model.parent.parent / "evals"
    found = json.loads((folder / "tasks.json").read_text())
    assert (found["metric"], found["step"], found["better"]) == ("accuracy", 12, "higher")
    assert found["value"] == found["budgets"][-1]["rows"][0]["accuracy"]
    attempts = [json.loads(line) for line in (folder / "tasks.jsonl").read_text().splitlines()]
    assert len(attempts) == 6 * 2 * 3 and {a["budget"] for a in attempts} == {0, 8, None}
    assert all(not a["thinking"] and a["said"].startswith("</think><answer>") for a in attempts if a["budget"] == 0)


def test_the_same_seed_gives_the_same_files_and_json_is_what_is_written(model, tmp_path, capsys):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        more = ["--seed", seed, "--out", str(tmp_path / name), "--json", "--dtype", "float32"]
        assert verb.main([str(model), *ASKED, *more]) == 0
        assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / name / "tasks.json").read_text())
    a, b, c = ((tmp_path / name / "tasks.jsonl").read_text() for name in "abc")
    assert a == b != c


def test_bits_per_byte_are_those_of_score(model, tmp_path, capsys):
    (tmp_path / "t.txt").write_text("def add(a, b): return a + b\n" * 9)
    assert verb.main([str(model), "--text", str(tmp_path / "t.txt"), "--dtype", "float32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["text"]
    assert score.main([str(model), "--text-file", str(tmp_path / "t.txt"), "--json"]) == 0
    assert found["value"] == json.loads(capsys.readouterr().out)["bits_per_byte"]
    assert json.loads((model.parent.parent / "evals" / "text.json").read_text()) == found


@pytest.mark.parametrize(
    "flags",
    [[], ["--tasks", "countup"], [*ASKED, "--budgets", "20"], [*ASKED, "--samples", "0"], [*ASKED, "--items", "0"]],
)
def test_what_cannot_be_asked(model, flags):
    with pytest.raises(ConfigError):
        verb.main([str(model), *flags])


def test_problems_are_held_out_and_none_comes_twice():
    found = problems(resolve("addition,countdown"), 40, 0, [1])
    assert {it.split for it in found} == {"held_out"} and {it.level for it in found} == {1}
    assert len({(it.task, it.content) for it in found}) == 40


def test_a_name_that_leads_elsewhere_is_refused(tmp_path):
    for name in ("../x", "a/b", ".hidden", ""):
        with pytest.raises(ConfigError, match="the name"):
            record.write(tmp_path, name, {}, [])


def test_an_attempt_is_whole_in_its_line():
    a = Attempt(ITEMS[0], "so</think><answer>1</answer>", 1, 5, "1", "right", 7, 3)
    line = record.line(a)
    assert line["thinking"] + line["said"] == a.completion and line["prompt"] == ITEMS[0].prompt
    cut = record.line(replace(a, completion="so so"))
    assert (cut["thinking"], cut["said"]) == ("so so", "")


def test_where_nothing_could_be_graded_nothing_is_claimed():
    a = Attempt(item("x"), "</think><answer>1</answer>", 0, 4, "1", "failed", 0, 0)
    found = record.record("x", [(0, [[a, a]])], Rules(2))
    assert found["value"] is None and found["interval"] is None
    assert verb.table(found)[1][-1] == "2" and "-" in verb.table(found)[1]


def test_a_benchmark_may_be_taken_whole(monkeypatch):
    asked = verb.parse(["m", "--tasks", "math:gsm", "--whole", "--levels", "1"])
    made = Task("math:gsm", (1, 2), lambda rng, level: Made("", "", "", ""), tuple(ITEMS))
    monkeypatch.setattr(catalog, "resolve", lambda names: (made,))
    assert verb.chosen(asked) == ITEMS[:2]
    monkeypatch.setattr(catalog, "resolve", lambda names: (made, replace(made, name="endless", items=())))
    with pytest.raises(SystemExit):
        verb.parse(["m", "--tasks", "math:gsm", "--whole", "--items", "20"])
    with pytest.raises(ConfigError, match="--whole with endless"):
        verb.chosen(asked)
