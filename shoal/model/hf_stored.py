"""The pieces of a model as a folder keeps them: plain, or in few bits with scales beside them.

    plain             X.weight, floating point
    official FP8      X.weight E4M3 [N, K]               X.weight_scale_inv [⌈N / 128⌉, ⌈K / 128⌉]
    pack-quantized    X.weight_packed int32 [N, K / 8]   X.weight_scale [N, K / group]   X.weight_shape [N, K]
                      (4 bits; K / 4 words of 8)

All of it is held against the model before memory is taken: names, shapes, dtypes, and every scale finite and above
zero. The bytes of both quantised forms are those of `ops.quant.Quantised`, so a matrix can be used where it lies: in
the mapped file. Words of integers are little-endian, and so are the machines we run on.
"""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from shoal.errors import ModelError
from shoal.model.hf_files import AGAIN, TensorFolder
from shoal.model.hf_names import Piece
from shoal.model.hf_quantisation import BlockScaled, Quantisation, Scheme, unknown
from shoal.ops.quant import FP8, Form, Quantised

SCALE_INV, PACKED, SCALE, SHAPE = "_scale_inv", "_packed", "_scale", "_shape"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SCALES = (*FLOATS[1:], torch.float8_e8m0fnu)
INTEGERS: dict[int, Form] = {4: "int4", 8: "int8"}
WORD_BITS = 32
ROWS = 1024  # of a matrix that are dequantised at once


class Stored:
    """The tensors of a folder, as pieces of a model. `check` each piece before any other question about it."""

    def __init__(self, files: TensorFolder, quantisation: Quantisation | None):
        self.files, self.quantisation = files, quantisation

    def __contains__(self, piece: Piece) -> bool:
        return piece.name in self.files.entries or piece.name + PACKED in self.files.entries

    def place(self, piece: Piece) -> tuple[str, int]:
        """Where it lies: a file, and a byte of it."""
        entry = self.files.entries.get(piece.name) or self.files.entries[piece.name + PACKED]
        return entry.file, entry.start

    def in_few_bits(self, piece: Piece) -> bool:
        entry = self.files.entries.get(piece.name)
        return entry is None or entry.dtype == FP8

    def n_bytes(self, piece: Piece) -> int:
        """On the disk."""
        entries = self.files.entries
        parts = (piece.name + part for part in ("", SCALE_INV, PACKED, SCALE))
        return sum(entries[name].end - entries[name].start for name in parts if name in entries)

    def check(self, piece: Piece) -> Iterable[str]:
        """The names of the tensors that make up the piece. Raises ModelError where they don't."""
        entry = self.files.entries.get(piece.name)
        if piece.name + PACKED in self.files.entries:
            return self._check_packed(piece)
        if entry is None:
            raise disagrees(f"the files have no {piece.name}", f"one of shape {list(piece.shape)}")
        if entry.shape != piece.shape:
            raise disagrees(f"{piece.name} has shape {list(entry.shape)}", f"{list(piece.shape)}")
        if entry.dtype == FP8:
            return self._check_fp8(piece)
        if entry.dtype not in FLOATS:
            raise disagrees(f"{piece.name} has dtype {entry.dtype}", "floating point, or FP8 E4M3 with block scales")
        return (piece.name,)

    def _check_fp8(self, piece: Piece) -> Iterable[str]:
        name = piece.name + SCALE_INV
        if not isinstance(self.quantisation, BlockScaled) or name not in self.files.entries:
            what = f"no {name}" if self.quantisation else "no quantization_config in config.json"
            raise disagrees(f"{piece.name} is FP8, and there is {what}", "a scale for every block")
        blocks = tuple(-(-n // b) for n, b in zip(piece.shape, self.quantisation.block, strict=False))
        self._check_scales(name, blocks if len(piece.shape) == 2 else None)
        return piece.name, name

    def _check_packed(self, piece: Piece) -> Iterable[str]:
        names = packed, scale, shape = [piece.name + part for part in (PACKED, SCALE, SHAPE)]
        if absent := [name for name in names if name not in self.files.entries]:
            raise disagrees(f"the files have {packed} and no {absent[0]}", "both")
        if self.quantisation is None or isinstance(self.quantisation, BlockScaled):
            raise disagrees(f"the files have {packed}", "a quantization_config of compressed-tensors")
        if len(piece.shape) != 2:
            raise disagrees(f"the files have {packed}", f"{piece.name}: only matrices are packed")
        words, (N, K) = self.files.entries[packed], piece.shape
        bits = [b for b in INTEGERS if words.shape == (N, K * b // WORD_BITS) and K * b % WORD_BITS == 0]
        if not bits or words.dtype != torch.int32:
            raise disagrees(
                f"{packed} is {words.dtype} of shape {list(words.shape)}", f"words of 4 or 8 bits of {N}x{K}"
            )
        said = self.files.entries[shape]
        if said.shape != (2,) or said.dtype not in (torch.int64, torch.int32):
            raise disagrees(f"{shape} is {said.dtype} of shape {list(said.shape)}", "two whole numbers")
        if self.files.read(shape).tolist() != [N, K]:
            raise disagrees(f"{shape} says {self.files.read(shape).tolist()}", f"[{N}, {K}]")
        self._check_groups(scale, Scheme(bits[0], None), N, K)
        return names

    def _check_groups(self, name: str, scheme: Scheme, N: int, K: int) -> None:
        """A row's scales: as many as one of the schemes of these bits makes of it."""
        assert self.quantisation is not None and not isinstance(self.quantisation, BlockScaled)
        groups = [s.group or K for s in self.quantisation.schemes if s.bits == scheme.bits]
        shape = self.files.entries[name].shape
        if shape not in [(N, K // group) for group in groups if K % group == 0]:
            raise unknown(f"{name} has shape {list(shape)} for {scheme.bits} bits of {N} x {K}")
        self._check_scales(name, shape)

    def _check_scales(self, name: str, shape: tuple[int, ...] | None) -> None:
        entry = self.files.entries[name]
        if entry.shape != shape or entry.dtype not in SCALES:
            expected = f"floats of shape {list(shape)}" if shape else "none: only matrices are quantised"
            raise disagrees(f"{name} is {entry.dtype} of shape {list(entry.shape)}", expected)
        values = self.files.read(name).float()
        if not bool((values.isfinite() & (values > 0)).all()):
            raise ModelError(f"{name} holds a scale that is not finite and above zero", "positive scales", AGAIN)

    def quantised(self, piece: Piece, mapped: bool = True) -> Quantised:
        """The matrix in few bits: in the mapped files, or in memory."""
        get = self.files.mapped if mapped else self.files.read
        if piece.name in self.files.entries:
            assert isinstance(self.quantisation, BlockScaled)
            return Quantised("fp8", get(piece.name), get(piece.name + SCALE_INV).float(), self.quantisation.block)
        packed, scales = piece.name + PACKED, get(piece.name + SCALE)
        codes = self.files.mapped(packed, raw=True) if mapped else self.files.read(packed).view(torch.uint8)
        K = piece.shape[1]
        return Quantised(INTEGERS[8 * codes.shape[1] // K], codes, scales, (1, K // scales.shape[1]))

    def copy(self, piece: Piece, place: Tensor) -> None:
        """place = the piece: dequantised where it is in few bits, read straight into it where it is stored as used."""
        entry = self.files.entries.get(piece.name)
        if self.in_few_bits(piece):
            dequantise(self.quantised(piece, mapped=False), place)
        elif entry and entry.dtype == place.dtype and place.is_contiguous() and place.device.type == "cpu":
            self.files.read_into(piece.name, place.view(-1).view(torch.uint8).numpy().data)
        else:
            place.copy_(self.files.read(piece.name))

    def equal(self, piece: Piece, other: Tensor | None) -> bool:
        """Whether a copy is what it copies: a tensor, or the head, where that is in few bits itself."""
        if other is not None:
            mine = torch.empty(piece.shape, dtype=other.dtype)
            self.copy(piece, mine)
            return torch.equal(mine, other.cpu())
        head = replace(piece, name="lm_head.weight")
        if not self.in_few_bits(piece):
            return False
        mine, theirs = self.quantised(piece), self.quantised(head)
        return torch.equal(mine.codes, theirs.codes) and torch.equal(mine.scales, theirs.scales)


def dequantise(matrix: Quantised, place: Tensor) -> None:
    """Some rows of blocks at a time, so that no fp32 copy of the matrix stands in memory."""
    each = matrix.block[0]
    step = each * max(1, ROWS // each)
    for row in range(0, len(place), step):
        rows, blocks = slice(row, row + step), slice(row // each, -(-(row + step) // each))
        part = Quantised(matrix.form, matrix.codes[rows], matrix.scales[blocks], matrix.block)
        place[rows].copy_(part.dequantise())


def disagrees(got: str, expected: str) -> ModelError:
    return ModelError(got, f"{expected}: config and tensors must agree", "use the config.json these tensors came with")
