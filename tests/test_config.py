"""Layers, origins, unions, errors, and the exact round trip through TOML."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import flatten, from_toml, load, read, to_toml
from shoal.errors import ConfigError
from shoal.model.config import GQAConfig, MLAConfig, ModelConfig, MoEConfig


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    decay: Literal["cosine", "wsd"] = "wsd"
    clip: float | None = 1.0


@dataclass(frozen=True)
class Schedule:
    kind: Literal["wsd", "cosine"] = "wsd"  # a field like any other: nothing stands here but a Schedule


@dataclass(frozen=True)
class Config:
    model: ModelConfig
    optim: Optim = field(default_factory=Optim)
    sources: tuple[str, ...] = ("python-stdlib",)
    out: Path | None = None
    schedule: Schedule = field(default_factory=Schedule)
    steps: int | None = None
    minutes: float | None = None
    compile: bool = False
    note: str = ""

    def __post_init__(self):
        if self.steps and self.minutes:
            raise ConfigError("steps and minutes", "one of them", "drop one")


MODEL = ModelConfig(100, 8, 2, 16, MLAConfig(2, 8, 4, 4, 4), moe=MoEConfig(4, 1, 2, 8))
CONFIG = Config(MODEL)


def test_later_layers_win_and_every_leaf_knows_its_origin():
    file = {"optim": {"lr": 2e-3, "decay": "cosine"}, "note": "from the file"}
    flags = ["--optim.lr", "3e-3", "--model.attention.kv-lora-rank=64", "--compile"]
    config, origins = load(CONFIG, ("file mine.toml", file), flags=flags, origin="recipe quickstart")
    assert (config.optim.lr, config.optim.decay, config.note) == (3e-3, "cosine", "from the file")
    assert isinstance(config.model.attention, MLAConfig) and config.model.attention.kv_lora_rank == 64
    assert config.compile is True
    assert origins["optim.lr"] == origins["model.attention.kv_lora_rank"] == "flag"
    assert origins["optim.decay"] == "file mine.toml"
    assert origins["model.dim"] == "recipe quickstart"
    assert origins["model.norm_eps"] == origins["optim.betas"] == "default"
    assert origins.keys() == flatten(config).keys()


@pytest.mark.parametrize(
    "flags, meant",
    [
        (["--optim.lrr", "1"], "did you mean optim.lr?"),
        (["--lr", "1"], "did you mean optim.lr?"),
        (["--model.attention.kv_lora_rnk", "1"], "did you mean model.attention.kv_lora_rank?"),
        (["--optim.decay", "cosin"], "did you mean cosine?"),
        (["--model.attention.kind", "GQA"], "did you mean GQAConfig?"),
    ],
)
def test_a_misspelling_names_what_was_meant(flags, meant):
    with pytest.raises(ConfigError, match=".") as e:
        load(CONFIG, flags=flags)
    assert meant in e.value.fix


@pytest.mark.parametrize(
    "flags",
    [
        ["--model.dim", "8.5"],
        ["--model.dim", "wide"],
        ["--model.dim", "true"],
        ["--optim.lr", "fast"],
        ["--optim.betas", "0.9"],
        ["--compile", "perhaps"],
        ["--optim.clip", "nothing"],
        ["--model.attention", "8"],
        ["--model.dim", "none"],
        ["model.dim", "8"],
        ["--steps", "3", "--minutes", "1"],
    ],
)
def test_values_of_the_wrong_type_are_refused(flags):
    with pytest.raises(ConfigError):
        load(CONFIG, flags=flags)


def test_values_parse_by_their_annotation():
    flags = ["--optim.betas", "0.8,1", "--optim.clip", "none", "--steps", "1_000", "--note", "3", "--optim.lr", "1"]
    flags += ["--sources", "a b,c", "--out", "x y", "--schedule.kind", "cosine"]
    config, _ = load(CONFIG, flags=flags)
    assert config.optim == Optim(1.0, (0.8, 1.0), "wsd", None)
    assert (config.steps, config.note, config.sources) == (1000, "3", ("a b", "c"))
    assert (config.out, config.schedule.kind) == (Path("x y"), "cosine")
    assert load(CONFIG, flags=["--sources", '["a,b"]'])[0].sources == ("a,b",)


def test_naming_another_class_starts_afresh():
    gqa = ["--model.attention.kind", "GQAConfig", "--model.attention.n_heads", "4"]
    with pytest.raises(ConfigError, match="model.attention.head_dim, model.attention.n_kv_heads not set"):
        load(CONFIG, flags=gqa)
    flags = [*gqa, "--model.attention.n_kv_heads", "2", "--model.attention.head_dim", "8", "--model.moe", "none"]
    config, origins = load(CONFIG, flags=flags)
    assert config.model.attention == GQAConfig(4, 2, 8) and config.model.moe is None
    assert origins["model.moe"] == "flag" and "model.moe.moe_dim" not in origins


def test_a_layer_from_python_may_replace_a_whole_part():
    attention = GQAConfig(4, 2, 8)
    config, origins = load(CONFIG, ("sizing", {"model": {"attention": attention, "moe": None}, "optim.lr": 1}))
    assert (config.model.attention, config.model.moe, config.optim.lr) == (attention, None, 1.0)
    assert origins["model.attention.head_dim"] == origins["optim.lr"] == "sizing"


def test_contradictions_are_judged_after_the_last_layer():
    config, _ = load(CONFIG, ("file", {"steps": 10}), flags=["--steps", "none", "--minutes", "5"])
    assert (config.steps, config.minutes) == (None, 5.0)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no config file"):
        read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("lr = fast")
    with pytest.raises(ConfigError, match="bad.toml"):
        read(tmp_path / "bad.toml")


text = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda s: s != "none")
number = st.floats(allow_nan=False)
attention = st.one_of(
    st.builds(MLAConfig, *[st.integers()] * 5, q_lora_rank=st.none() | st.integers()),
    st.builds(GQAConfig, *[st.integers()] * 3, bias=st.booleans()),
)
moe = st.builds(MoEConfig, *[st.integers()] * 4, routed_scaling_factor=number)


@given(
    st.builds(
        Config,
        st.builds(ModelConfig, *[st.integers()] * 4, attention, moe=st.none() | moe, norm_eps=number),
        st.builds(Optim, number, st.tuples(number, number), st.sampled_from(["cosine", "wsd"]), st.none() | number),
        st.lists(text, max_size=3).map(tuple),
        st.none() | text.map(Path).filter(lambda p: str(p) != "none"),
        st.builds(Schedule, st.sampled_from(["wsd", "cosine"])),
        st.none() | st.integers(min_value=1),
        compile=st.booleans(),
        note=text,
    )
)
def test_toml_round_trips_exactly(config):
    assert from_toml(Config, to_toml(config)) == config
