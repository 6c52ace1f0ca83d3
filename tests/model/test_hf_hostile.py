"""Every malformed or hostile folder ends in a ModelError before memory is taken for weights."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from bench.parity import write_fp8
from shoal.errors import ModelError
from shoal.model import hf
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer


@pytest.fixture(autouse=True)
def nothing_allocated(monkeypatch):
    def fail(*_):
        pytest.fail("memory was taken before the folder was known to be good")

    monkeypatch.setattr(hf, "allocate", fail)


@pytest.fixture
def folder(tmp_path) -> Path:
    hf.save(Transformer(PRESETS["tiny"]).init_weights(0), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path) -> Path:
    hf.save(Transformer(PRESETS["tiny"]).init_weights(0), tmp_path / "model", max_shard_bytes=200_000)
    return tmp_path / "model"


def refused(folder: Path, match: str) -> None:
    with pytest.raises(ModelError, match=match) as e:
        hf.load(folder, torch.float32)
    assert len(str(e.value)) < 2000


def split(path: Path) -> tuple[dict, bytes]:
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def join(path: Path, header: dict | bytes, body: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)


# Headers: file cases 44 and 45.


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 25_000_001, 10**7])
def test_header_lengths_beyond_the_format_or_the_file(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    refused(folder, "header has")


def test_a_header_too_large_to_be_honest_is_not_read(folder):
    with open(folder / "model.safetensors", "wb") as f:
        f.write((26_000_000).to_bytes(8, "little"))
        f.truncate(200_000_000)  # sparse: the bytes are there, and read as zeros
    refused(folder, "header has 26,000,000 bytes")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1, -1000])
def test_truncated_files(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "header|bytes")


def test_bytes_after_the_last_tensor(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"\0")
    refused(folder, "tensors end at")


NORM = "model.norm.weight"  # fp32 of 64
HEADERS = {
    "overflowing shape": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 256]},
    "product that wraps to the right size": {"dtype": "F32", "shape": [2**32, 2**32, 64], "data_offsets": [0, 256]},
    "huge dimension": {"dtype": "F32", "shape": [2**80], "data_offsets": [0, 256]},
    "many dimensions": {"dtype": "F32", "shape": [1] * 10_000, "data_offsets": [0, 4]},
    "negative dimension": {"dtype": "F32", "shape": [-64], "data_offsets": [0, 256]},
    "fractional dimension": {"dtype": "F32", "shape": [64.0], "data_offsets": [0, 256]},
    "truth as dimension": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
    "negative offset": {"dtype": "F32", "shape": [64], "data_offsets": [-256, 0]},
    "offsets backwards": {"dtype": "F32", "shape": [64], "data_offsets": [256, 0]},
    "offsets past the end": {"dtype": "F32", "shape": [64], "data_offsets": [2**40, 2**40 + 256]},
    "three offsets": {"dtype": "F32", "shape": [64], "data_offsets": [0, 128, 256]},
    "no offsets": {"dtype": "F32", "shape": [64]},
    "unknown dtype": {"dtype": "F7", "shape": [64], "data_offsets": [0, 256]},
    "dtype of a list": {"dtype": ["F32"], "shape": [64], "data_offsets": [0, 256]},
    "not an object": [1, 2, 3],
}


@pytest.mark.parametrize("what", HEADERS)
def test_header_entries(folder, what):
    header, body = split(folder / "model.safetensors")
    join(folder / "model.safetensors", header | {NORM: HEADERS[what]}, body)
    refused(folder, f"{NORM}|starts at byte")


def test_overlapping_and_gapped_ranges(folder):
    header, body = split(folder / "model.safetensors")
    (first, a), (_, b), *_ = sorted(
        ((n, v) for n, v in header.items() if "data_offsets" in v), key=lambda x: x[1]["data_offsets"]
    )
    a_end = a["data_offsets"][1]
    overlap = {"dtype": "U8", "shape": [a_end + 4], "data_offsets": [0, a_end + 4]}
    join(folder / "model.safetensors", header | {first: overlap}, body)
    refused(folder, "starts at byte")
    gap = {"dtype": "U8", "shape": [a_end - 4], "data_offsets": [0, a_end - 4]}
    join(folder / "model.safetensors", header | {first: gap}, body)
    refused(folder, "starts at byte")
    assert b["data_offsets"][0] == a_end


def test_duplicate_names(folder):
    header, body = split(folder / "model.safetensors")
    entry = json.dumps(header[NORM]).encode()
    text = json.dumps(header).encode()[:-1] + b', "' + NORM.encode() + b'": ' + entry + b"}"
    join(folder / "model.safetensors", text, body)
    refused(folder, "a key stands twice")


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"\xff\xfe", b'{"a": NaN}', b"[" * 50_000, b'{"a": ' + b"9" * 10_000]
)
def test_headers_that_are_no_json_object(folder, text):
    join(folder / "model.safetensors", text, b"")
    refused(folder, "header|JSON")


# The folder: cases 46 and 47.


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "/tmp/x.safetensors", "a/../x.safetensors", "x.bin", ".safetensors", 7],
)
def test_an_index_that_leads_elsewhere(sharded, name):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    index["weight_map"][NORM] = name
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, "index.json names")


@pytest.mark.parametrize("change", ["swap", "drop", "invent"])
def test_an_index_that_disagrees_with_its_files(sharded, change):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    names = index["weight_map"]
    if change == "swap":
        names[NORM] = next(f for f in names.values() if f != names[NORM])
    elif change == "drop":
        del names[NORM]
    else:
        names["model.layers.99.mlp.up_proj.weight"] = names[NORM]
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(sharded, "index.json puts")


def test_a_tensor_in_two_shards(sharded):
    one, two = sorted(sharded.glob("model-*.safetensors"))[:2]
    two.write_bytes(one.read_bytes())
    refused(sharded, "in two files")


def test_a_missing_shard(sharded):
    min(sharded.glob("model-*.safetensors")).unlink()
    refused(sharded, "cannot open")


def test_both_one_file_and_an_index(sharded):
    (sharded / "model.safetensors").write_bytes(min(sharded.glob("model-*.safetensors")).read_bytes())
    refused(sharded, "has both")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_links_out_of_the_folder(folder, name):
    outside = folder.parent / "outside"
    (folder / name).rename(outside)
    (folder / name).symlink_to(outside)
    refused(folder, "is a link to")


def test_links_into_a_cache_of_the_hub_are_followed(tmp_path, monkeypatch):
    monkeypatch.undo()
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    hf.save(Transformer(PRESETS["tiny"]).init_weights(0), snapshot)
    blobs.mkdir()
    for file in list(snapshot.iterdir()):
        file.rename(blobs / file.name)
        file.symlink_to(Path("../../blobs") / file.name)
    assert hf.load(snapshot, torch.float32).config == PRESETS["tiny"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders_in_place_of_files(folder, name, make):
    (folder / name).unlink()
    make(folder / name)
    refused(folder, "regular file|cannot open")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "consolidated.00.pth", "x.ckpt"])
def test_pickles_are_not_opened(folder, name, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "exploded",))

    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Bomb()))
    refused(folder, "a pickle")
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_under_the_name_of_a_safetensors_file(folder):
    (folder / "model.safetensors").write_bytes(pickle.dumps({"a": list(range(100))}))
    refused(folder, "header")


def test_folders_that_are_not_there(tmp_path):
    refused(tmp_path / "absent", "not a folder")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "no model.safetensors")


# Configurations: cases 48 and 51.


@pytest.mark.parametrize(
    "key, value",
    [
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 1000),
        ("num_hidden_layers", 2.0),
        ("num_hidden_layers", None),
        ("hidden_size", -64),
        ("hidden_size", 10**30),
        ("vocab_size", "512"),
        ("rms_norm_eps", float("nan")),
        ("rms_norm_eps", float("inf")),
        ("rms_norm_eps", -1e-6),
        ("rope_theta", 0),
        ("n_routed_experts", 10**9),
        ("n_routed_experts", 9),
        ("num_experts_per_tok", 7),
        ("topk_group", 5),
        ("qk_rope_head_dim", 7),
        ("hidden_act", "gelu"),
        ("layer_types", ["sliding_attention", "full_attention", "full_attention"]),
        ("attention_bias", True),
        ("scoring_func", "softmax"),
        ("moe_layer_freq", 2),
        ("tie_word_embeddings", 1),
        ("rope_scaling", {"type": "longrope", "factor": 2}),
        ("rope_scaling", {"type": "yarn"}),
        ("rope_scaling", [1]),
        ("quantization_config", {"quant_method": "gptq"}),
        ("quantization_config", 8),
        ("model_type", "gpt2"),
        ("model_type", ["deepseek_v3"]),
        ("model_type", None),
    ],
)
def test_settings_out_of_range_or_unknown(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    refused(folder, ".")


def test_numbers_that_overflow_while_parsing(folder):
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e400'))
    refused(folder, "rms_norm_eps = inf")


def test_code_from_the_folder_is_never_run(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    code = {"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config | code))
    refused(folder, "auto_map")


@pytest.mark.parametrize(
    "key, value, match",
    [
        ("num_hidden_layers", 4, "no |shape|place"),
        ("num_hidden_layers", 2, "no |shape|place"),
        ("vocab_size", 511, "shape"),
        ("hidden_size", 128, "shape"),
        ("n_routed_experts", 12, "shape|no "),
        ("n_shared_experts", 2, "shape"),
        ("first_k_dense_replace", 0, "no "),
        ("q_lora_rank", None, "no "),
        ("num_nextn_predict_layers", 0, "no place for"),
        ("tie_word_embeddings", True, None),
    ],
)
def test_a_config_that_disagrees_with_its_tensors(folder, key, value, match, monkeypatch):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value}))
    if match is None:  # only the values tell: the head is there, and differs from the embedding
        monkeypatch.undo()
        match = "differs from the model's own"
    refused(folder, match)


@pytest.mark.parametrize("name", [NORM, "model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.3.eh_proj.weight"])
def test_missing_extra_and_whole_number_tensors(folder, name):
    header, body = split(folder / "model.safetensors")
    join(folder / "model.safetensors", {name + "x" if n == name else n: v for n, v in header.items()}, body)
    refused(folder, f"no {name}")
    integers = {**header, name: {**header[name], "dtype": "I32"}}
    join(folder / "model.safetensors", integers, body)
    refused(folder, "dtype")
    extra = {**header, "model.extra": {"dtype": "F32", "shape": [0], "data_offsets": [len(body), len(body)]}}
    join(folder / "model.safetensors", extra, body)
    refused(folder, "no place for: model.extra")


@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
def test_scales_that_are_no_scales(folder, tmp_path, value):
    write_fp8(folder, tmp_path / "fp8", block=16, seed=0)
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    header, body = split(tmp_path / "fp8" / "model.safetensors")
    at = header[name]["data_offsets"][0]
    body = body[:at] + torch.tensor(value).numpy().tobytes() + body[at + 4 :]
    join(tmp_path / "fp8" / "model.safetensors", header, body)
    refused(tmp_path / "fp8", "not finite and above zero")


def test_fp8_without_scales_or_with_blocks_of_another_size(folder, tmp_path):
    write_fp8(folder, tmp_path / "fp8", block=16, seed=0)
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [128, 128]
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "fp8", "weight_scale_inv is")
    del config["quantization_config"]
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    refused(tmp_path / "fp8", "is FP8")
