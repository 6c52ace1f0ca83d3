"""generate, score, export and import, as a user calls them, against transformers where it can say what is right."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.cli import export, generate, import_, score
from shoal.cli.main import run_verb
from shoal.cli.opened import check_memory, check_vocabulary, end_ids, model_folder, open_model, turns_of
from shoal.data.tokenizer import Tokenizer
from shoal.errors import CheckpointError, ConfigError, DataError, ModelError, ResourceError, StorageError
from shoal.model import hf
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.train import manifest

TEXT = "def add(a, b):\n    return a + b  # größer 漢字 🙂\n" * 20


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], 400)


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    """A random model as training leaves it: bf16 matrices, fp32 norms and routers, its tokenizer beside it."""
    config = replace(PRESETS["tiny"], vocab_size=512, max_positions=512, init_std=0.2)
    model = Transformer(config).init_weights(0).set_dtype(torch.bfloat16)
    hf.save(model, tmp_path / "model", bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id)
    tokenizer.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text_file(tmp_path) -> Path:
    (tmp_path / "text.py").write_text(TEXT[:400], encoding="utf-8")
    return tmp_path / "text.py"


def answered(capsys, verb, *argv) -> dict:
    assert verb.main([str(a) for a in argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_score_gives_the_log_probabilities_of_transformers(folder, text_file, capsys):
    pytest.importorskip("transformers")
    from bench.peers.transformers_model import log_probs, open_folder

    found = answered(capsys, score, folder, "--text-file", text_file, "--json")
    tokens_T = torch.tensor(found["tokens"])
    theirs = log_probs(open_folder(folder), tokens_T)[:-1].gather(1, tokens_T[1:, None])[:, 0]
    assert len(found["logprobs"]) == len(tokens_T) - 1
    assert (torch.tensor(found["logprobs"]) - theirs).abs().max() < 1e-4
    n_bytes = len(text_file.read_bytes())
    assert found["bytes"] == n_bytes
    assert found["bits_per_byte"] == pytest.approx(-theirs.sum().item() / n_bytes / 0.6931471805599453, rel=1e-5)


def test_greedy_text_is_that_of_transformers(folder, capsys):
    pytest.importorskip("transformers")
    from bench.peers.transformers_model import open_folder

    found = answered(capsys, generate, folder, "--prompt", "def", "--max-tokens", "20", "--temperature", "0", "--json")
    t = Tokenizer.load(folder)
    assert t.bos_id is not None
    before = torch.tensor([[t.bos_id, *t.encode("def")]])
    theirs = open_folder(folder).generate(before, max_new_tokens=20, do_sample=False)[0, before.shape[1] :]
    assert found["tokens"] == theirs.tolist()
    assert found["prompt_tokens"] == before.shape[1]


def test_the_same_seed_samples_the_same_text_and_json_and_plain_agree(folder, capsys):
    asked = [folder, "--prompt", "x", "--max-tokens", "30", "--temperature", "2", "--seed"]
    one, again, other = (answered(capsys, generate, *asked, seed, "--json") for seed in ("1", "1", "2"))
    assert one == again
    assert one["tokens"] != other["tokens"]
    assert generate.main([*map(str, asked), "1"]) == 0
    assert capsys.readouterr().out == "x" + one["text"] + "\n"


def test_a_small_nucleus_is_greedy(folder, capsys):
    asked = [folder, "--prompt", "x", "--max-tokens", "10", "--json"]
    greedy = answered(capsys, generate, *asked, "--temperature", "0")
    nucleus = answered(capsys, generate, *asked, "--temperature", "1", "--top-p", "1e-6")
    assert greedy["tokens"] == nucleus["tokens"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--max-tokens", "0"],
        ["--max-tokens", "512"],
        ["--temperature", "-1"],
        ["--temperature", "nan"],
        ["--top-p", "0"],
        ["--top-p", "1.1"],
        ["--seed", "-1"],
    ],
)
def test_settings_out_of_range(folder, flags):
    with pytest.raises(ConfigError):
        generate.main([str(folder), "--prompt", "x", *flags])


def test_a_text_longer_than_the_context_is_scored_in_windows(folder, tmp_path, capsys):
    (tmp_path / "long.py").write_text(TEXT * 3)
    asked = [folder, "--text-file", tmp_path / "long.py", "--json"]
    found = answered(capsys, score, *asked)
    assert len(found["tokens"]) > 512 and len(found["logprobs"]) == len(found["tokens"]) - 1
    narrow = answered(capsys, score, *asked, "--window", "64")
    assert narrow["logprobs"][:63] == pytest.approx(found["logprobs"][:63], abs=1e-4)
    assert narrow["bits_per_byte"] != found["bits_per_byte"]
    for window in ("1", "513"):
        with pytest.raises(ConfigError, match="--window"):
            score.main([*map(str, asked), "--window", window])


def test_what_was_scored_while_files_changed_is_not_told(folder):
    def changed() -> None:
        raise StorageError("a file was changed", "one that stays", "open it again")

    with pytest.raises(StorageError):
        score.score(open_model(str(folder), "float32")._replace(unchanged=changed), TEXT, 64)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", None])
def test_texts_that_cannot_be_scored(folder, tmp_path, content):
    path = tmp_path / "odd.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError):
        score.main([str(folder), "--text-file", str(path)])


def test_export_changes_the_form_and_not_the_model(folder, tmp_path, text_file, capsys):
    before = answered(capsys, score, folder, "--text-file", text_file, "--json")
    out = tmp_path / "out"
    assert export.main([str(folder), str(out), "--dtype", "float32", "--max-shard-size", "100KB"]) == 0
    assert len(list(out.glob("model-*.safetensors"))) > 3
    capsys.readouterr()
    assert answered(capsys, score, out, "--text-file", text_file, "--json") == before
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


def test_import_keeps_every_byte_of_a_canonical_folder(folder, tmp_path):
    assert import_.main([str(folder), str(tmp_path / "in")]) == 0
    for path in folder.iterdir():
        assert (tmp_path / "in" / path.name).read_bytes() == path.read_bytes(), path.name


def test_export_leaves_nothing_behind_when_it_fails(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        (tmp_path / f".out.{export.os.getpid()}").mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf, "save", full)
    with pytest.raises(ResourceError, match="No space"):
        export.main([str(folder), str(tmp_path / "out")])
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_export_never_writes_over_something(folder, tmp_path):
    with pytest.raises(ConfigError, match="not empty"):
        export.main([str(folder), str(folder)])


@pytest.mark.parametrize("size", ["0", "5XB", "1e9", "GB", ""])
def test_shard_sizes_that_are_none(folder, tmp_path, size):
    with pytest.raises(ConfigError):
        export.main([str(folder), str(tmp_path / "out"), "--max-shard-size", size])


def test_a_run_means_its_newest_whole_checkpoint(folder, tmp_path, capsys):
    run = tmp_path / "runs" / "2026-01-01_x_abcd"
    for step in (10, 20):
        path = run / "checkpoints" / f"step-{step:06d}"
        path.mkdir(parents=True)
        for file in folder.iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        manifest.seal(path, step)
    (run / "config.toml").write_text("")
    assert model_folder(str(run)).name == "step-000020"
    weights = run / "checkpoints" / "step-000020" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_folder(str(run)).name == "step-000010"
    assert "passed over" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"model\.safetensors: flipped"):
        model_folder(str(weights.parent))


def test_names_that_mean_no_model(tmp_path):
    for name in (tmp_path, tmp_path / "absent", "no-such-run"):
        with pytest.raises(ModelError):
            model_folder(str(name))


@pytest.mark.parametrize("of_tokenizer, of_model", [(513, 512), (4096, 32768), (500, 2048)])
def test_vocabularies_that_do_not_match(of_tokenizer, of_model):
    with pytest.raises(ModelError, match="tokenizer"):
        check_vocabulary(of_tokenizer, of_model)


@pytest.mark.parametrize("of_tokenizer, of_model", [(512, 512), (128815, 129280), (151665, 152064)])
def test_vocabularies_that_do(of_tokenizer, of_model):
    check_vocabulary(of_tokenizer, of_model)


def test_a_model_too_large_is_refused_before_it_is_read():
    with pytest.raises(ResourceError, match="GiB"):
        check_memory(PRESETS["v3-671b"], "bfloat16")


def test_errors_end_in_one_message_and_a_code(folder, capsys):
    (folder / "config.json").write_text("{")
    assert run_verb("generate", [str(folder), "--prompt", "x"]) == 2
    err = capsys.readouterr().err
    assert "expected:" in err and "fix:" in err and "Traceback" not in err


def test_a_turn_ends_at_every_token_of_generation_config(folder, tokenizer):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_id, 300, 301]}))
    turns = turns_of(open_model(str(folder), "float32"))
    assert turns.stop_tokens >= {tokenizer.eos_id, 300, 301}
    (folder / "generation_config.json").unlink()
    assert end_ids(folder, 512) == ()
    for wrong in ("x", 512, -1, [1, None], True):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(ModelError, match="eos_token_id"):
            end_ids(folder, 512)
