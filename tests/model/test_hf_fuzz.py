"""Whatever the bytes, a folder is either good or a ModelError: no other exception ever reaches the user."""

import json
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.parity import ARCHITECTURES, random_config
from shoal.errors import ModelError
from shoal.model.config import ModelConfig
from shoal.model.hf_config import read_config, to_hf_config
from shoal.model.hf_files import TensorFolder, parse_json
from shoal.model.hf_quantisation import read_quantisation, write_fp8
from shoal.model.transformer import Transformer

ODD_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["yarn", "llama3", "default", "fp8", "silu", 0, 1, 2, 10**9]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ROPE_KEYS = ["type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "mscale", "truncate"]


@settings(max_examples=100)
@given(st.data(), st.sampled_from(ARCHITECTURES))
def test_any_setting_may_be_anything(data, architecture):
    raw = to_hf_config(random_config(architecture, 0))
    for key in data.draw(st.lists(st.sampled_from([*raw, "rope_parameters", "layer_types", "quantization_config"]))):
        raw[key] = data.draw(ODD_VALUES)
    if data.draw(st.booleans()):
        raw["rope_parameters"] = data.draw(st.dictionaries(st.sampled_from(ROPE_KEYS), ODD_VALUES))
    try:
        read_quantisation(raw)
        config = read_config(raw)
    except ModelError:
        return
    assert isinstance(config, ModelConfig)
    if config.n_layers < 10:
        import torch

        with torch.device("meta"):
            Transformer(config)


@settings(max_examples=100)
@given(st.data(), st.sampled_from(["fp8", "compressed-tensors"]))
def test_any_setting_of_few_bits_may_be_anything(data, method):
    scheme = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    group = {"targets": ["Linear"], "weights": scheme}
    packed = {"format": "pack-quantized", "config_groups": {"group_0": group}}
    q = {"quant_method": method} | (write_fp8() if method == "fp8" else packed)
    for place in (scheme, group, q):
        for key in data.draw(st.lists(st.sampled_from([*place, "actorder", "ignore", "scale_fmt"]), max_size=2)):
            place[key] = data.draw(ODD_VALUES)
    with suppress(ModelError):
        assert read_quantisation({"quantization_config": q}) is not None


@settings(max_examples=100)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_may_stand_for_json(data):
    with suppress(ModelError):
        assert isinstance(parse_json(data, "x"), dict)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    import torch

    from shoal.model.hf_files import Planned, write_safetensors

    folder = tmp_path_factory.mktemp("fuzz")
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(0)}
    planned = [Planned(n, t.dtype, tuple(t.shape), lambda t=t: t) for n, t in tensors.items()]
    write_safetensors(folder / "model.safetensors", planned)
    return folder, (folder / "model.safetensors").read_bytes()


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_of_a_file_may_flip_vanish_or_appear(small, data):
    folder, good = small
    at = data.draw(st.integers(0, len(good) - 1))
    cut = data.draw(st.integers(0, 3))
    new = data.draw(st.binary(max_size=4))
    (folder / "model.safetensors").write_bytes(good[:at] + new + good[at + cut :])
    try:
        files = TensorFolder(folder)
        for name, entry in files.entries.items():
            assert files.read(name).shape == entry.shape
    except ModelError as e:
        assert len(str(e)) < 2000


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(entry=st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x"]), ODD_VALUES), data=st.data())
def test_any_entry_may_stand_in_a_header(small, entry, data):
    folder, _ = small
    entry |= {"dtype": data.draw(st.sampled_from(["F32", "U8", "F4"]))} if data.draw(st.booleans()) else {}
    text = json.dumps({"a": entry}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    try:
        TensorFolder(folder)
    except ModelError as e:
        assert len(str(e)) < 2000
