"""Schemas of clients: what they may point to, and that looking costs no more than their size."""

import pytest

from shoal.engine import schema
from shoal.errors import RequestError


def chain(n: int) -> dict:
    defs = {str(i): {"$ref": f"#/$defs/{i + 1}"} for i in range(n)} | {str(n): {"type": "string"}}
    return {"$defs": defs}


def test_a_chain_of_references_costs_its_length(monkeypatch):
    followed, resolve = [], schema.resolve
    monkeypatch.setattr(schema, "resolve", lambda ref, *given: followed.append(ref) or resolve(ref, *given))
    schema.check(chain(300), "x")
    assert len(followed) == 300


def test_a_circle_is_found_from_anywhere():
    circle = chain(50)
    circle["$defs"]["50"] = {"$ref": "#/$defs/10"}
    with pytest.raises(RequestError, match="leads back to itself"):
        schema.check(circle, "x")


@pytest.mark.parametrize("ref", ["other.json", "http://a.test/", "#anchor", "#/$defs/none", "#//", "#/$defs/0/x"])
def test_references_that_leave_the_schema_or_lead_nowhere(ref):
    with pytest.raises(RequestError, match="ref"):
        schema.check(chain(3) | {"$ref": ref}, "x")


def test_a_property_may_be_called_as_a_keyword_is():
    for name in ("$ref", "enum", "pattern", "$schema"):
        schema.check({"type": "object", "properties": {name: {"type": "string"}}}, "x")
