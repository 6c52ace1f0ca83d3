"""A small tokenizer, tiny models, and things to say for the tests of this room."""

from dataclasses import replace
from functools import cache

from shoal.data.tokenizer import Tokenizer
from shoal.model.presets import PRESETS
from shoal.model.transformer import Transformer
from shoal.post.conversations import Conversation, worked

TINY = PRESETS["tiny"]
ROWS = tuple((f"{a} + {b} = ?", f"{a} and {b}\nmake {a + b}", str(a + b)) for a in range(2, 9) for b in range(3, 9))


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.train([" ".join(row) for row in ROWS], 320)


def model(seed: int = 0, init_std: float = 0.02) -> Transformer:
    return Transformer(replace(TINY, init_std=init_std)).init_weights(seed)


def talks() -> list[Conversation]:
    return [worked(*row) for row in ROWS]
