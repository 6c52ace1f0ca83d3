"""Folders in few bits that are malformed or hostile: a ModelError before memory is taken for weights.

What holds for every folder (headers, indices, links, pickles) test_hf_hostile.py shows for plain ones; here it is shown
that each form goes the same way, and what only folders in few bits can have wrong.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.errors import ModelError
from shoal.model import hf
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.precision import convert, weights

FORMS = {"fp8": ("fp8", None), "int8": ("int8", None), "int4": ("int4", 32)}
MODULE = "model.layers.1.self_attn.o_proj"
CODES = {"fp8": "weight", "int8": "weight_packed", "int4": "weight_packed"}
SCALES = {"fp8": "weight_scale_inv", "int8": "weight_scale", "int4": "weight_scale"}
INTEGERS = ["int8", "int4"]


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Every file of a folder of each form."""
    folder = tmp_path_factory.mktemp("good")
    hf.save(Transformer(replace(PRESETS["tiny"], n_layers=2)).init_weights(0), folder / "plain")
    found = {}
    for name, (form, group) in FORMS.items():
        convert.write(convert.Source(folder / "plain"), folder / name, form, group)
        found[name] = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
    return found


@pytest.fixture
def folder(good, form, tmp_path, monkeypatch) -> Path:
    def fail(*_):
        pytest.fail("memory was taken before the folder was known to be good")

    monkeypatch.setattr(hf, "allocate", fail)
    for name, content in good[form].items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def refused(folder: Path, match: str) -> None:
    for load in (weights.load, hf.load):
        with pytest.raises(ModelError, match=match) as e:
            load(folder, torch.float32)
        assert len(str(e.value)) < 2000


class File:
    """model.safetensors, taken apart to be changed."""

    def __init__(self, folder: Path):
        self.path = folder / "model.safetensors"
        data = self.path.read_bytes()
        n = int.from_bytes(data[:8], "little")
        self.header, self.body = json.loads(data[8 : 8 + n]), bytearray(data[8 + n :])

    def write(self) -> None:
        text = json.dumps(self.header).encode()
        self.path.write_bytes(len(text).to_bytes(8, "little") + text + self.body)


def configured(folder: Path, change) -> None:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [2**63, 25_000_001, 10**7])
def test_header_lengths(folder, length):
    file = folder / "model.safetensors"
    file.write_bytes(length.to_bytes(8, "little") + file.read_bytes()[8:])
    refused(folder, "header has")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("keep", [4, 1000, -1])
def test_truncated_files(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "header|bytes")


@pytest.mark.parametrize("form", FORMS)
def test_ranges_that_overlap_leave_gaps_or_overflow(folder, form):
    f = File(folder)
    entry = f.header[f"{MODULE}.{CODES[form]}"]
    first, last = entry["data_offsets"]
    wrong = [
        {"dtype": "U8", "shape": [last - first - 4], "data_offsets": [first, last - 4]},
        {"dtype": "U8", "shape": [last - first + 4], "data_offsets": [first, last + 4]},
        entry | {"shape": [2**62, 4]},
        entry | {"shape": [2**40, 2**40]},
        entry | {"data_offsets": [-4, last]},
        entry | {"data_offsets": [last, first]},
    ]
    for value in wrong:
        f.header[f"{MODULE}.{CODES[form]}"] = value
        f.write()
        refused(folder, "starts at byte|has shape")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [float("nan"), 0.0, -1.0, float("inf")])
def test_scales_that_are_no_scales(folder, form, value):
    f = File(folder)
    entry = f.header[f"{MODULE}.{SCALES[form]}"]
    dtype = torch.float32 if entry["dtype"] == "F32" else torch.bfloat16
    content = torch.tensor([value], dtype=dtype).view(torch.uint8).numpy().tobytes()
    at = entry["data_offsets"][1]
    f.body[at - len(content) : at] = content
    f.write()
    refused(folder, "not finite and above zero")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["codes", "scales"])
def test_codes_without_scales_and_scales_without_codes(folder, form, part):
    f = File(folder)
    name = f"{MODULE}.{CODES[form] if part == 'codes' else SCALES[form]}"
    f.header["model.extra"] = f.header.pop(name)
    f.write()
    refused(folder, "the files have no|no place for|and there is no|and no")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["I8", "U8"])
def test_scales_of_another_dtype_or_shape(folder, form, dtype):
    f = File(folder)
    entry = f.header[f"{MODULE}.{SCALES[form]}"]
    n = entry["data_offsets"][1] - entry["data_offsets"][0]
    f.header[f"{MODULE}.{SCALES[form]}"] = entry | {"dtype": dtype, "shape": [n]}
    f.write()
    refused(folder, "weight_scale")
    f.header[f"{MODULE}.{SCALES[form]}"] = entry | {
        "dtype": dtype,
        "shape": [*entry["shape"][:-1], n // entry["shape"][0]],
    }
    f.write()
    refused(folder, "weight_scale")


@pytest.mark.parametrize("form", INTEGERS)
def test_words_of_another_width_or_type(folder, form):
    f = File(folder)
    name = f"{MODULE}.weight_packed"
    entry = f.header[name]
    N, words = entry["shape"]
    for value in (entry | {"dtype": "F32"}, entry | {"shape": [N // 2, words * 2]}, entry | {"shape": [N * words]}):
        f.header[name] = value
        f.write()
        refused(folder, "weight_packed is")


@pytest.mark.parametrize("form", INTEGERS)
@pytest.mark.parametrize("shape", [[64, 65], [0, 0], [2**40, 2**40], [-64, 64]])
def test_a_shape_that_disagrees(folder, shape):
    f = File(folder)
    at, end = f.header[f"{MODULE}.weight_shape"]["data_offsets"]
    f.body[at:end] = torch.tensor(shape).numpy().tobytes()
    f.write()
    refused(folder, "weight_shape says")


@pytest.mark.parametrize("form", ["int4"])
def test_groups_that_the_config_does_not_describe(folder):
    f = File(folder)
    entry = f.header[f"{MODULE}.weight_scale"]
    n = entry["shape"][0] * entry["shape"][1]
    f.header[f"{MODULE}.weight_scale"] = entry | {"shape": [64, n // 64 // 2], "data_offsets": entry["data_offsets"]}
    f.header[f"{MODULE}.weight_scale"]["dtype"] = "F32"  # half as many, of as many bytes
    f.write()
    refused(folder, "weight_scale has shape")
    ragged = f.header | {f"{MODULE}.weight_scale": entry | {"shape": [128, 1]}}
    f.header = ragged
    f.write()
    refused(folder, "weight_scale has shape")


@pytest.mark.parametrize("form", ["fp8"])
def test_blocks_of_another_size(folder):
    configured(folder, lambda raw: raw["quantization_config"].update(weight_block_size=[32, 32]))
    refused(folder, "weight_scale_inv is")


@pytest.mark.parametrize("form", FORMS)
def test_bits_without_a_config_or_with_anothers(folder, form, good):
    configured(folder, lambda raw: raw.pop("quantization_config"))
    refused(folder, "quantization_config")
    other = json.loads(good["int8" if form == "fp8" else "fp8"]["config.json"])["quantization_config"]
    configured(folder, lambda raw: raw.update(quantization_config=other))
    refused(folder, "scale|quantization_config")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key, value", [("vocab_size", 511), ("num_hidden_layers", 3), ("moe_intermediate_size", 64)])
def test_a_config_that_disagrees_with_its_tensors(folder, key, value):
    configured(folder, lambda raw: raw.update({key: value}))
    refused(folder, "shape|no |place")


OTHER = {"strategy": "group", "group_size": 16}
SETTINGS = {
    "another method": lambda q: q.update(quant_method="gptq"),
    "another format": lambda q: q.update(format="int-quantized"),
    "not compressed": lambda q: q.update(quantization_status="frozen"),
    "a cache in few bits": lambda q: q.update(kv_cache_scheme={"num_bits": 8}),
    "sparsity": lambda q: q.update(sparsity_config={"format": "sparse-24-bitmask"}),
    "rotations": lambda q: q.update(transform_config={"config_groups": {}, "x": 1}),
    "no groups": lambda q: q.update(config_groups={}),
    "a list of groups": lambda q: q.update(config_groups=[1]),
    "no weights": lambda q: group(q).pop("weights"),
    "activations": lambda q: group(q).update(input_activations={"num_bits": 8}),
    "zero points": lambda q: group(q)["weights"].update(symmetric=False),
    "floats": lambda q: group(q)["weights"].update(type="float"),
    "three bits": lambda q: group(q)["weights"].update(num_bits=3),
    "a truth for bits": lambda q: group(q)["weights"].update(num_bits=True),
    "columns out of order": lambda q: group(q)["weights"].update(actorder="group"),
    "no strategy": lambda q: group(q)["weights"].pop("strategy"),
    "groups of nothing": lambda q: group(q)["weights"].update(strategy="group", group_size=0),
    "another group": lambda q: [
        g["weights"].update(strategy="group", group_size=16) for g in q["config_groups"].values()
    ],
}


def group(q: dict) -> dict:
    return list(q["config_groups"].values())[-1]


@pytest.mark.parametrize("form", INTEGERS)
@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_would_change_the_arithmetic(folder, what):
    configured(folder, lambda raw: SETTINGS[what](raw["quantization_config"]))
    refused(folder, ".")


@pytest.mark.parametrize("form", FORMS)
def test_copies_that_are_no_copies(folder, form, monkeypatch):
    monkeypatch.undo()
    f = File(folder)
    name = "model.layers.2.shared_head.head." + ("weight" if form == "fp8" else "weight_packed")
    at = f.header[name]["data_offsets"][0]
    f.body[at] ^= 1
    f.write()
    refused(folder, "shared_head.head.weight differs")
