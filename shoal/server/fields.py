"""Types of the fields of requests: what clients may write in several ways has one form from here on.

Faults are found one at a time and counted before they are looked at, so a million of them cost what one does.
"""

from functools import partial
from typing import Annotated, Any

from pydantic import BeforeValidator, FailFast, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from shoal.engine.request import MOST_STOP_CHARS, MOST_STOPS
from shoal.server import strict

MAX_CHOICES = 16
MAX_INPUTS = 256  # texts of one request to embed
MAX_BIASES = 1000
MAX_METADATA = 16


def fault(message: str) -> PydanticCustomError:
    return PydanticCustomError("shoal", "{message}", {"message": message})


class First(FailFast):
    """Of a list's faults only the first is looked for. (pydantic's own can't stand in a union on Python 3.11.)"""

    __hash__ = object.__hash__  # pyright: ignore[reportAssignmentType]


def joined(content: Any) -> Any:
    """A list of text parts as one text. Whatever else could stand in it is refused by name, and never opened."""
    if not isinstance(content, list):
        return content
    pieces = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            named = strict.shown(kind, 32) if isinstance(kind, str) else "no type"
            raise fault(f'a content part of {named}; only parts of type "text" can be read')
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise fault('a text part is {"type": "text", "text": …}')
        pieces.append(part["text"])
    return "".join(pieces)


def few(metadata: Any) -> Any:
    if isinstance(metadata, dict) and len(metadata) > MAX_METADATA:
        raise fault(f"{len(metadata):,} entries; at most {MAX_METADATA}")
    return metadata


def drawable(temperature: Any) -> Any:
    """0 is greedy; what lies just above it is nothing else, but overflows (engine/sampler.py has the same bound)."""
    if isinstance(temperature, int | float) and 0 < temperature < 1e-3:
        raise fault("0, or 0.001 to 2")
    return temperature


def listed(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def biases(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if len(value) > MAX_BIASES:
        raise fault(f"{len(value):,} entries; at most {MAX_BIASES:,}")
    if not all(key.isascii() and key.isdecimal() and len(key) < 10 for key in value):
        raise fault("keys are token ids")
    return {int(key): bias for key, bias in value.items()}


def prompts(value: Any, most: int = MAX_CHOICES) -> Any:
    """Text, token ids, or a list of either → a list of prompts."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        value = [value]
    if isinstance(value, list) and len(value) > most:
        raise fault(f"{len(value):,} prompts; at most {most}")
    return value


TEXT_OR_PARTS: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "object"}}]}
Content = Annotated[str, BeforeValidator(joined), WithJsonSchema(TEXT_OR_PARTS)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
StopText = Annotated[str, Field(min_length=1, max_length=MOST_STOP_CHARS)]
Stops = Annotated[list[StopText], Field(max_length=MOST_STOPS), First(), BeforeValidator(listed)]
Bias = Annotated[float, Field(ge=-100, le=100)]
Biases = Annotated[
    dict[int, Bias],
    BeforeValidator(biases),
    WithJsonSchema({"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}}),
]
TokenIds = Annotated[list[TokenId], First()]
Texts = Annotated[list[str | TokenIds], Field(min_length=1), First()]
Prompts = Annotated[Texts, BeforeValidator(prompts)]
TEXTS_OR_IDS: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "minItems": 1},
        {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
        {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}}, "minItems": 1},
    ]
}
Inputs = Annotated[Texts, BeforeValidator(partial(prompts, most=MAX_INPUTS)), WithJsonSchema(TEXTS_OR_IDS)]
Named = Annotated[str, Field(max_length=64, pattern=r"^[^\x00]*$")]  # what a database can be asked for
Metadata = Annotated[dict[str, str], BeforeValidator(few)]
Label = Annotated[str, Field(max_length=256)]
