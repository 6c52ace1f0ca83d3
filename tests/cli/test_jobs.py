"""What surrounds a training run: sizing, plans, resuming, and the commands it prints."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from shoal import config as configs
from shoal.cli import pretrain as verb
from shoal.cli import quickstart
from shoal.data.tokenizer import Tokenizer
from shoal.errors import ConfigError, DataError, ResourceError, RunError
from shoal.model.presets import PRESETS
from shoal.plan import hardware, size
from shoal.recipes import _job, _plan
from shoal.recipes._machine import Here
from shoal.recipes._teller import Teller
from shoal.recipes.quickstart import LADDER, MINUTES, SHARES
from shoal.run import Run, find
from shoal.runtime import Runtime
from shoal.train.config import PretrainConfig

MACHINE = hardware.cpu("two threads", 8e11, 2e11, 2e10, 8 << 30, threads=2)
NO_CORPUS: Any = None
HERE = Here(Runtime("cpu", 2, 0, "two threads"), MACHINE)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def teller(said) -> Teller:
    return Teller(said.append, lambda metrics: None)


@pytest.fixture
def two_cores(monkeypatch):
    """Steps take what they take on two cores of 2026: 10,000 tokens/s of mini."""
    mini = size.Measured(PRESETS["mini"], 512, 4096, micro_seconds=0.36, update_seconds=0.04)
    monkeypatch.setattr(_plan, "corpus_of", lambda config, teller: None)
    monkeypatch.setattr(_plan, "timed_step", lambda config, corpus, device: mini.scaled_to(config.model))


def sized(teller: Teller, *flags: str):
    config, origins = verb.configured(verb.parse(["quickstart", *flags]), PretrainConfig)
    return _plan.sized(config, origins, HERE, teller)


@pytest.mark.parametrize("minutes, model", [("0.3", "nano"), ("10", "mini"), ("600", "midi")])
def test_the_minutes_choose_the_model(two_cores, teller, said, minutes, model):
    config, origins = sized(teller, "--minutes", minutes)
    assert config.model == PRESETS[model] and config.data.vocab_size == config.model.vocab_size
    assert origins.keys() == configs.flatten(config).keys()
    assert {v for k, v in origins.items() if k.startswith("model.")} == {"sized for this machine"}
    assert origins["minutes"] == "flag" and any(f"{model}: in {minutes} minutes" in words for words in said)


def test_more_minutes_take_larger_batches(two_cores, teller):
    batches = [sized(teller, "--minutes", m)[0].batch.accumulate for m in ("1", "10", "100000")]
    assert batches == sorted(batches) and batches[0] == batches[1] == 1 < batches[2]


def test_what_the_user_set_is_not_chosen_again(two_cores, teller):
    config, origins = sized(teller, "--minutes", "0.3", "--model.n_layers", "3")
    assert config.model == replace(PRESETS["mini"], n_layers=3) and origins["model.n_layers"] == "flag"
    config, _ = sized(teller, "--minutes", "100000", "--batch.accumulate", "1")
    assert config.batch.accumulate == 1


def test_a_preset_takes_the_place_of_the_recipes_model():
    asked = verb.shaped(verb.parse(["tiny", "--model", "small", "--model.n_mtp=2", "--batch.context", "64"]))
    config, origins = verb.configured(asked, PretrainConfig)
    assert config.model == replace(PRESETS["small"], n_mtp=2) and config.data.vocab_size == config.model.vocab_size
    assert origins["model.dim"] == "flag --model small" and origins["model.n_mtp"] == "flag"
    assert origins["data.vocab_size"] == "flag --model small" and config.steps == 20
    with pytest.raises(ConfigError, match="did you mean nano"):
        verb.shaped(verb.parse(["tiny", "--model", "nanno"]))


def test_a_preset_is_not_chosen_again(two_cores, teller):
    asked = verb.shaped(verb.parse(["quickstart", "--model=nano"]))
    config, origins = _plan.sized(*verb.configured(asked, PretrainConfig), HERE, teller)
    assert config.model == PRESETS["nano"] and origins["model.dim"] == "flag --model nano"


def test_a_tokenizer_larger_than_the_model_is_refused_before_anything_runs(tmp_path, monkeypatch, teller):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    Tokenizer.train(["some text to learn from, some more of it"], 300).save(tmp_path / "tokenizer")
    words = ["tiny", "--model.vocab_size", "270", "--data.tokenizer", str(tmp_path / "tokenizer")]
    config, _ = verb.configured(verb.parse([*words, "--data.sources", "worked-addition:200"]), PretrainConfig)
    with pytest.raises(DataError, match=r"a model of 270 tokens and a corpus of [\s\S]*set --model.vocab_size"):
        _plan.corpus_of(config, teller)


def test_a_model_too_large_is_refused_before_its_text_is_prepared(run, teller, monkeypatch):
    monkeypatch.setattr(_plan, "corpus_of", lambda config, teller: 1 // 0)
    config, _ = verb.configured(verb.shaped(verb.parse(["tiny", "--model", "v2-lite-16b"])), PretrainConfig)
    with pytest.raises(ResourceError, match="a training step of"):
        _job.dry_run(config, {}, teller, HERE)
    with pytest.raises(ResourceError, match="a training step of"):
        _job.run_job(config, run, teller, here=HERE)


def test_a_start_that_fails_leaves_its_place_free(tmp_path):
    def job(config, run, teller, here):
        raise DataError("no text", "some", "give some")

    with pytest.raises(DataError):
        verb.launch(verb.parse(["tiny", "--out", str(tmp_path / "run")]), ["shoal"], job=job)
    assert not (tmp_path / "run").exists()


def test_a_ladder_climbs():
    active = [_plan.count_parameters(PRESETS[name]).active for name in LADDER]
    assert active == sorted(active)


def test_scores_on_the_way_take_a_tenth_of_the_minutes_unless_asked_for(two_cores, teller):
    config, origins = verb.configured(verb.parse(["quickstart", "--minutes", "0.5"]), PretrainConfig)
    measured = _plan.timed_step(config, NO_CORPUS, "cpu")
    fitted = _plan.affordable_scores(config, measured, origins)
    taken = (fitted.eval.times - 1) * _plan.score_seconds(fitted, measured)
    assert taken <= 3 < taken + _plan.score_seconds(fitted, measured)
    assert _plan.plan_of(fitted, measured, HERE, teller)["steps"] > size.LEAST_STEPS
    assert _plan.affordable_scores(config, measured, origins | {"eval.times": "flag"}) == config
    hours = replace(config, minutes=600.0)
    assert _plan.affordable_scores(hours, measured, origins) == hours


def test_minutes_for_fewer_than_five_steps_are_refused(two_cores, teller):
    config, origins = verb.configured(verb.parse(["quickstart", "--minutes", "0.03"]), PretrainConfig)
    measured = _plan.timed_step(config, NO_CORPUS, "cpu")
    with pytest.raises(ResourceError, match="at least 5 steps"):
        _plan.plan_of(_plan.affordable_scores(config, measured, origins), measured, HERE, teller)


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    monkeypatch.chdir(tmp_path)
    config, origins = verb.configured(verb.parse(["tiny"]), PretrainConfig)
    return Run.create("tiny", "else where/mine", config, origins, ["shoal"])


def test_printed_commands_find_a_run_outside_runs(run):
    import shlex

    (word,) = shlex.split(_job.typed(run))
    assert find(word).path == run.path


@pytest.fixture
def launched(monkeypatch) -> list:
    found = []
    monkeypatch.setattr(verb, "launch", lambda asked, command, **more: found.append((asked, more)) or 0)
    return found


def test_quickstart_shares_its_minutes_out(launched):
    quickstart.main([])
    quickstart.main(["--minutes", "3", "--optim.lr", "0.01"])
    for (asked, more), minutes in zip(launched, (MINUTES, 3)):
        config, origins = verb.configured(asked, PretrainConfig)
        assert config.minutes == pytest.approx(minutes * SHARES["pretrain"]) and more["size"] and more["job"]
        assert origins["minutes"] == f"share of {minutes:g} minutes"
    assert origins["optim.lr"] == "flag"


def test_quickstart_gives_steps_to_every_stage_or_stops_at_the_base(launched):
    quickstart.main(["--steps", "3"])
    quickstart.main(["--stages", "base", "--minutes", "3"])
    config, _ = verb.configured(launched[0][0], PretrainConfig)
    assert config.steps == 3 and launched[0][1]["job"]
    assert launched[1][0].flags == ["--minutes", "3", "--steps=none"] and launched[1][1] == {"size": True}


@pytest.mark.parametrize("flags", [["--stages", "r1"], ["--steps", "0"], ["--minutes", "x"], ["--minutes", "-1"]])
def test_quickstart_refuses_what_it_cannot_do(launched, flags):
    with pytest.raises(ConfigError):
        quickstart.main(flags)
    assert not launched


def test_a_resumed_quickstart_goes_on_with_its_stages_if_it_has_some(run, launched):
    quickstart.main(["--resume", str(run.path)])
    (run.path / "pipeline.json").write_text('{"minutes": 3, "steps": null, "stages": []}')
    quickstart.main(["--resume", str(run.path)])
    assert ["job" in more for _, more in launched] == [False, True]
    assert all(asked.resume == str(run.path) and not asked.flags for asked, _ in launched)
    with pytest.raises(ConfigError, match="goes on"):
        quickstart.main(["--resume", str(run.path), "--minutes", "5"])


def test_a_resume_holds_the_lock_from_its_first_look_at_the_settings(run, monkeypatch):
    held = []

    def busy(*args, **more):
        with pytest.raises(RunError, match="in use"), run.lock():
            pass
        held.append(1)
        return config

    config = verb.reconfigured(run, verb.Asked(), PretrainConfig)
    monkeypatch.setattr(verb, "reconfigured", busy)
    monkeypatch.setattr(_job, "run_job", lambda *args, **more: (busy(), 0)[1])
    assert verb.launch(verb.parse(["--resume", str(run.path)]), []) == 0 and len(held) == 2


def test_a_resumed_run_keeps_its_plan(run, teller):
    (run.path / "plan.json").write_text('{"steps": 7}')
    config = verb.reconfigured(run, verb.Asked(), PretrainConfig)[0]
    assert _job.planned(config, run, NO_CORPUS, HERE, True, teller) == (config, {"steps": 7})


def test_a_text_is_known_by_its_content(run):
    def corpus(train: str) -> Any:
        splits = {"train": {"sha256": train}, "val": {"sha256": "v"}}
        return SimpleNamespace(info={"splits": splits, "tokenizer_sha256": "t", "key": object()})

    _job.require_same_text(run, corpus("a"))
    _job.require_same_text(run, corpus("a"))  # another key: files that were touched
    with pytest.raises(DataError, match="changed since it began: train"):
        _job.require_same_text(run, corpus("b"))


def test_a_resume_on_other_kernels_says_what_is_lost(run, teller, said, monkeypatch):
    _job.note_place(run, HERE, False, teller)
    _job.note_place(run, HERE, True, teller)
    assert not said
    monkeypatch.setattr(_job.ops, "describe", lambda: "kernels: others")
    _job.note_place(run, HERE, True, teller)
    assert "kernels: others" in said[0] and "not end bit-equal" in said[0]
    assert json.loads((run.path / "env.json").read_text())["kernels"] != "kernels: others"
