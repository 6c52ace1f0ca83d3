"""Blocks of numbers as GGUF files hold them → Tensor | Quantised.

What our two integer forms can hold stays in few bits, number for number; the rest is computed out in fp32.

| type | a block is | its numbers | here |
|---|---|---|---|
| f32, f16, bf16 | | as they are | Tensor over the mapped file |
| q8_0 | scale d, 32 int8 | d·q | int8, groups of 32, equal |
| q5_0 | d, 32 of 5 bits | d·(q − 16) | int8, groups of 32, equal |
| q4_0 | d, 32 of 4 bits | d·(q − 8) | int4, groups of 32, equal |
| q4_1 | d, m, 32 of 4 bits | d·q + m | int4 with `least`, groups of 32, equal |
| q4_K | d, m, 8 × (6-bit s, t), 256 of 4 bits | d·s·q − m·t | int4 with `least`, groups of 32; d·s and m·t in fp16 |
| q5_1, q5_K, q6_K | | | fp32 Tensor, equal; `in_few_bits` rounds it to int8, groups of 32 |

q4_K's scale is a product of 11 and 6 significant bits, which fp16 rounds: by 2⁻¹¹ of itself at most, so a number of the
block is off by at most 15·2⁻¹¹ of a step, 0.7% of one, plus as much of `least`. GGUF keeps number i of 32 in the low
half of byte i and number i + 16 in the high half of it (q4_K: i of the next 32), ours are neighbours: bytes are
re-paired. Scales that are not finite are refused.

q5_K and q6_K, which files called Q4_K_M are full of, fit none of our forms: their groups are of 16, or have a least
number beside 5 bits. As int8 a number moves by half of 1/127 of the largest of its 32, an eighth of a step of q6_K.

The layouts are ggml's (ggml-common.h); tests hold them against the `gguf` package.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from shoal.errors import ModelError
from shoal.model.gguf_file import AGAIN, Kind
from shoal.ops.quant import Form, Quantised, quantise

GROUP = 32
PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def decoded(rows: Tensor, kind: Kind, name: str) -> Tensor | Quantised:
    """uint8 [N, bytes of a row] → a matrix [N, K]. `name` is for the ModelError where a scale is not finite."""
    if kind.name in PLAIN:
        return rows.view(PLAIN[kind.name])
    found = DECODERS[kind.name](rows.unflatten(-1, (-1, kind.nbytes)))
    scales = [found] if isinstance(found, Tensor) else [found.scales, *([] if found.least is None else [found.least])]
    if not all(bool(x.isfinite().all()) for x in scales):
        raise ModelError(f"{name} has a scale that is not finite", "finite scales", AGAIN)
    return found


def in_few_bits(matrix: Tensor | Quantised) -> Quantised:
    return matrix if isinstance(matrix, Quantised) else quantise(matrix, "int8", GROUP, torch.float16)


def half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at this byte of each block [N, B]."""
    return blocks[..., at : at + 2].contiguous().view(torch.float16).squeeze(-1)


def nibbles(q: Tensor) -> Tensor:
    """[.., n] bytes → the low halves, then the high halves [.., 2n]."""
    return torch.cat((q & 15, q >> 4), -1)


def paired(q: Tensor) -> Tensor:
    """`nibbles`, two neighbours a byte: the low halves in [.., n / 2] bytes, then the high halves."""
    two = q.view(torch.int16)
    low, high = two & 15 | two >> 4 & 240, two >> 4 & 15 | two >> 8 & 240
    return torch.cat((low.to(torch.uint8), high.to(torch.uint8)), -1)


def fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """32 bits from this byte on, each moved to bit 4: [N, B, 32]."""
    bits = blocks[..., at : at + 4, None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.flatten(-2) << 4


def integers(form: Form, codes: Tensor, scales: Tensor, least: Tensor | None = None) -> Quantised:
    """Of codes and scales by block: [N, B, bytes] and [N, B] or [N, B, groups]."""
    return Quantised(form, codes.flatten(1), scales.flatten(1), (1, GROUP), None if least is None else least.flatten(1))


def joined(parts: Sequence[Quantised]) -> Quantised:
    """Rows below rows."""
    first, codes, scales = parts[0], torch.cat([p.codes for p in parts]), torch.cat([p.scales for p in parts])
    least = None if first.least is None else torch.cat([p.least for p in parts if p.least is not None])
    return Quantised(first.form, codes, scales, first.block, least)


def q8_0(b: Tensor) -> Quantised:
    return integers("int8", b[..., 2:] ^ 128, half(b, 0))


def q5_0(b: Tensor) -> Quantised:
    return integers("int8", (nibbles(b[..., 6:]) | fifth_bits(b, 2)) + 112, half(b, 0))


def q4_0(b: Tensor) -> Quantised:
    return integers("int4", paired(b[..., 2:]), half(b, 0))


def q4_1(b: Tensor) -> Quantised:
    return integers("int4", paired(b[..., 4:]), half(b, 0), half(b, 2))


def q5_1(b: Tensor) -> Tensor:
    codes = nibbles(b[..., 8:]) | fifth_bits(b, 4)
    return (half(b, 0).float()[..., None] * codes + half(b, 2).float()[..., None]).flatten(1)


def steps(b: Tensor) -> tuple[Tensor, Tensor]:
    """The scales d·s and m·t of the eight groups of a q4_K or q5_K block, fp32 [N, B, 8].

    Of 12 bytes the first four hold s of groups 0 to 3 in their low six bits, the next four t of them, and the last four
    the low halves of s and t of groups 4 to 7, whose upper two bits lie in the top bits of the others.
    """
    low, high, mixed = b[..., 4:16].split(4, -1)
    s = torch.cat((low & 63, mixed & 15 | low >> 2 & 48), -1)
    t = torch.cat((high & 63, mixed >> 4 | high >> 2 & 48), -1)
    return half(b, 0).float()[..., None] * s, half(b, 2).float()[..., None] * t


def q4_K(b: Tensor) -> Quantised:
    scales, least = steps(b)
    codes = paired(b[..., 16:].unflatten(-1, (4, GROUP)))
    return integers("int4", codes.flatten(2), scales.half(), -least.half())


def q5_K(b: Tensor) -> Tensor:
    scales, least = steps(b)
    low = nibbles(b[..., 48:].unflatten(-1, (4, GROUP))).unflatten(-1, (2, GROUP)).flatten(2, 3)
    fifth = b[..., None, 16:48] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1
    return (scales[..., None] * (low | fifth << 4) - least[..., None]).flatten(1)


def q6_K(b: Tensor) -> Tensor:
    """Two halves of 128 numbers, each with 64 bytes of low and 32 bytes of high bits; 8-bit scales of 16 numbers."""
    low = nibbles(b[..., :128].unflatten(-1, (2, 64)))
    high = b[..., 128:192].unflatten(-1, (2, 1, 32)) >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3
    codes = (low | high.flatten(-2) << 4).flatten(2).unflatten(-1, (16, 16)).float() - 32
    scales = half(b, 208).float()[..., None] * b[..., 192:208].view(torch.int8)
    return (scales[..., None] * codes).flatten(1)


DECODERS = {f.__name__: f for f in (q8_0, q5_0, q4_0, q4_1, q5_1, q4_K, q5_K, q6_K)}
GROUP_BYTES = dict.fromkeys(DECODERS, 34) | {"q4_0": 18, "q4_1": 20, "q4_K": 20}  # in our forms
