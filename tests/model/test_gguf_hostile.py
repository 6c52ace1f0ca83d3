"""Whatever the bytes of a GGUF file, it is either good or a ModelError, before memory is taken."""

import os
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.errors import ModelError
from shoal.model import gguf_file
from shoal.model.config import GQAConfig, ModelConfig
from shoal.model.gguf import GGUF
from shoal.model.gguf_file import GGUFFile
from shoal.model.transformer import Transformer

U32, STRING, ARRAY = 4, 8, 9


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def text(s: str | bytes) -> bytes:
    data = s if isinstance(s, bytes) else s.encode()
    return u64(len(data)) + data


def setting(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + u32(kind) + value


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(shape)) + b"".join(map(u64, shape)) + u32(kind) + u64(offset)


def header(settings: list[bytes], tensors: list[bytes], counts: tuple[int, int] | None = None) -> bytes:
    n_tensors, n_settings = counts or (len(tensors), len(settings))
    data = b"GGUF" + u32(3) + u64(n_tensors) + u64(n_settings) + b"".join(settings) + b"".join(tensors)
    return data + bytes(-len(data) % 32)


GOOD = header(
    [
        setting("general.architecture", STRING, text("llama")),
        setting("a", 6, struct.pack("<f", 0.1)),
        setting("tokens", ARRAY, u32(STRING) + u64(2) + text("x") + text("yz")),
        setting("kinds", ARRAY, u32(5) + u64(2) + u32(1) + u32(3)),
        setting("flag", 7, b"\1"),
    ],
    [tensor("t", [4, 2]), tensor("q", [32, 1], 8, 32)],
) + bytes(range(66))


def opened(path: Path, data: bytes) -> GGUFFile:
    path.write_bytes(data)
    return GGUFFile(path)


def test_a_good_file(tmp_path):
    file = opened(tmp_path / "m.gguf", GOOD)
    assert file.metadata["tokens"] == ["x", "yz"] and list(file.metadata["kinds"]) == [1, 3]  # type: ignore[arg-type]
    assert file.metadata["a"] == 0.1 and file.metadata["flag"] is True
    assert file.entries["t"].shape == (2, 4) and file.rows("q", 0, 1).tolist() == [list(range(32, 66))]


ONE = [tensor("t", [8])]
HOSTILE = {
    "nothing": (b"", "is empty"),
    "a few bytes": (b"GG", "begins with"),
    "magic alone": (b"GGUF", "a number of 4 bytes"),
    "another format": (b"PK\3\4" + bytes(100), "begins with"),
    "version 1": (b"GGUF" + u32(1) + bytes(100), "version 1"),
    "big-endian": (b"GGUF" + b"\0\0\0\3" + bytes(100), "version 50,331,648"),
    "tensors without end": (header([], [], (2**63, 0)), "tensors"),
    "settings without end": (header([], [], (0, 2**64 - 1)), "settings"),
    "more tensors than there are": (header([], ONE, (3, 0)), "at byte|name of 0"),
    "string past the end": (header([text("a") + u32(STRING) + u64(2**62)], []), "a string of"),
    "name past the end": (header([u64(2**64 - 1)], []), "a string of"),
    "empty name": (header([setting("", U32, u32(1))], []), "name of 0"),
    "long name": (header([setting("a" * 257, U32, u32(1))], []), "name of 257"),
    "odd type": (header([setting("a", 13, u32(1))], []), "type 13"),
    "odd truth": (header([setting("a", 7, b"\2")], []), "neither 0 nor 1"),
    "no UTF-8": (header([setting("a", STRING, text(b"\xff\xfe"))], []), "not UTF-8"),
    "name twice": (header([setting("a", U32, u32(1))] * 2, []), "stands twice"),
    "array without end": (header([setting("a", ARRAY, u32(12) + u64(2**61))], []), "an array of"),
    "array that wraps": (header([setting("a", ARRAY, u32(12) + u64(2**64 - 1))], []), "an array of"),
    "strings without end": (header([setting("a", ARRAY, u32(STRING) + u64(2**50))], []), "strings"),
    "array of arrays": (header([setting("a", ARRAY, (u32(ARRAY) + u64(1)) * 1000)], []), "array of type 9"),
    "alignment 0": (header([setting("general.alignment", U32, u32(0))], []), "alignment 0"),
    "alignment 24": (header([setting("general.alignment", U32, u32(24))], []), "alignment 24"),
    "alignment of text": (header([setting("general.alignment", STRING, text("32"))], []), "alignment 32"),
    "no dimensions": (header([], [tensor("t", [])]), "0 dimensions"),
    "many dimensions": (header([], [tensor("t", [1] * 5)]), "5 dimensions"),
    "dimension 0": (header([], [tensor("t", [0])]), "has shape"),
    "product that wraps": (header([], [tensor("t", [2**32, 2**32])]) + bytes(64), "ends at"),
    "huge": (header([], [tensor("t", [2**62])]) + bytes(64), "ends at"),
    "cut": (header([], ONE) + bytes(31), "ends at"),
    "unknown type": (header([], [tensor("t", [8], 99)]), "type 99"),
    "type we don't read": (header([], [tensor("t", [256], 10)]), "type q2_K"),
    "half a block": (header([], [tensor("t", [48], 8)]), "whole blocks of 32 q8_0"),
    "offset not at a multiple": (header([], [tensor("t", [8], 0, 8)]) + bytes(64), "starts at byte"),
    "offset past the end": (header([], [tensor("t", [8], 0, 2**63)]) + bytes(64), "starts at byte"),
    "overlap": (header([], [tensor("t", [16]), tensor("u", [8], 0, 32)]) + bytes(96), "starts at byte"),
    "the same bytes twice": (header([], [tensor("t", [8]), tensor("u", [8])]) + bytes(64), "starts at byte"),
    "gap": (header([], [tensor("t", [8]), tensor("u", [8], 0, 64)]) + bytes(96), "starts at byte"),
    "tensor twice": (header([], ONE * 2) + bytes(64), "stands twice"),
    "one of three": (header([setting("split.count", 2, b"\3\0")], ONE) + bytes(32), "one of 3 files"),
    "tensors of a split": (header([setting("split.tensors.count", 5, u32(9))], ONE) + bytes(32), "has 1 tensors"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_bytes_are_refused(tmp_path, what):
    data, match = HOSTILE[what]
    with pytest.raises(ModelError, match=match) as e:
        opened(tmp_path / "m.gguf", data)
    assert len(str(e.value)) < 2000


@pytest.mark.parametrize("kind", [0, 8, 12])
def test_a_large_file_of_nothing_takes_no_memory(tmp_path, kind):
    """10 GB that are sparse: the bytes are there, and read as zeros."""
    with open(tmp_path / "m.gguf", "wb") as f:
        f.write(header([setting("a", ARRAY, u32(kind) + u64(10**9))], []))
        f.truncate(10**10)
    tracemalloc.start()
    with pytest.raises(ModelError):
        GGUFFile(tmp_path / "m.gguf")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_many_strings_are_counted_before_they_are_made(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_file, "MOST_STRINGS", 100)
    arrays = [setting(name, ARRAY, u32(STRING) + u64(50)) + bytes(400) for name in "abc"]
    opened(tmp_path / "m.gguf", header(arrays[:2], []))
    with pytest.raises(ModelError, match="over 100 strings in its arrays"):
        opened(tmp_path / "m.gguf", header(arrays, []))


def test_no_pipe_no_folder_no_link_out(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    (tmp_path / "folder.gguf").mkdir()
    (tmp_path / "link.gguf").symlink_to("/etc/passwd")
    for name, match in (("pipe", "not a regular"), ("folder", "not a regular"), ("link", "link"), ("none", "No such")):
        with pytest.raises(ModelError, match=match):
            GGUFFile(tmp_path / f"{name}.gguf")


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_may_flip_vanish_or_appear(tmp_path, data):
    at, cut = data.draw(st.integers(0, len(GOOD) - 1)), data.draw(st.integers(0, 8))
    new = data.draw(st.binary(max_size=8))
    try:
        file = opened(tmp_path / "m.gguf", GOOD[:at] + new + GOOD[at + cut :])
        for name, e in file.entries.items():
            file.rows(name, 0, e.nbytes // e.row_bytes)
    except ModelError as e:
        assert len(str(e)) < 2000


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    pytest.importorskip("gguf")
    from tests.model import gguf_models

    config = ModelConfig(32, 32, 1, 32, GQAConfig(2, 1, 16))
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    kind = gguf_models.Type.Q8_0
    gguf_models.write(Transformer(config).init_weights(0), path, lambda name: kind)
    return path, path.read_bytes()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_byte_of_a_model_may_change(small, data):
    """Up to the tensors; of those, scales may become infinite."""
    path, good = small
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(changed)
    with suppress(ModelError):
        file = GGUF(path)
        for piece in file.pieces.values():
            found = torch.empty(piece.shape)
            file.copy(piece, found)
            assert not file.in_few_bits(piece) or found.isfinite().all()


def test_a_scale_that_is_not_finite_is_refused(small):
    path, good = small
    path.write_bytes(good)
    e = GGUFFile(path).entries["blk.0.ffn_up.weight"]
    path.write_bytes(good[: e.start] + torch.tensor([torch.inf]).half().numpy().tobytes() + good[e.start + 2 :])
    file = GGUF(path)
    piece = file.pieces["model.layers.0.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"ffn_up.weight has a scale that is not finite"):
        file.copy(piece, torch.empty(piece.shape))
