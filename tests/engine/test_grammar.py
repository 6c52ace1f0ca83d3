"""Whatever is drawn under a grammar's mask parses and fits its schema; hard and hostile schemas are refused in time."""

import json
import random
import time

import psutil
import pytest
import torch

from shoal.data.chat import DEEPSEEK_CALLS, JSON_CALLS, LLAMA_CALLS
from shoal.engine import grammar
from shoal.engine.grammar import Grammar, Grammars
from shoal.engine.request import Step
from shoal.errors import RequestError
from tests.engine.outputs import MARKS, SPELLINGS, TOKENIZER, VOCAB, calls, output, run, said

CLOSING = [t for t in range(len(SPELLINGS)) if SPELLINGS[t] in (b'"', b"}", b"]", b"0", b"1", b",", b":")]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", 'dog "x"', "é漢"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "minItems": 1, "maxItems": 3},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#"}]},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": PERSON}},
    {"type": "function", "function": {"name": "now"}},
]


@pytest.fixture(scope="module")
def grammars():
    found = Grammars(TOKENIZER, VOCAB, MARKS.ends)
    yield found
    found.close()


def fits(value, schema: dict) -> bool:
    """The few keywords of PERSON, checked by hand."""
    return (
        isinstance(value, dict)
        and set(schema["required"]) <= value.keys() <= schema["properties"].keys()
        and isinstance(value["name"], str) and len(value["name"]) <= 12
        and type(value["age"]) is int and 0 <= value["age"] <= 150
        and value["kind"] in schema["properties"]["kind"]["enum"]
        and 1 <= len(value["tags"]) <= 3 and all(isinstance(t, str) and len(t) <= 3 for t in value["tags"])
        and (value.get("next") is None or fits(value["next"], schema))
    )  # fmt: skip


def chosen(out, rng: random.Random, most: int = 4000):
    """Tokens drawn at random, those that close something more often, until the output ends by itself."""
    for _ in range(most):
        token = out.forced()
        if token is None:
            mask = out.mask()
            assert mask is None or (mask.shape == (VOCAB,) and mask.dtype == torch.bool and mask.any())
            allowed = range(VOCAB) if mask is None else mask.nonzero().flatten().tolist()
            closing = [t for t in allowed if t in CLOSING or t in MARKS.ends or t == MARKS.answer_end]
            token = rng.choice(closing if closing and rng.random() < 0.5 else allowed)
        yield token
        if out.state == "over":
            return
    pytest.fail("never ended")


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize("seed", range(6))
def test_random_tokens_under_the_mask_make_what_the_schema_says(grammars, thinking, seed):
    out = output(thinking=thinking, budget=5, grammar=grammars.json_schema(PERSON))
    deltas = run(out, chosen(out, random.Random(seed)), group=(3, 1))
    assert fits(json.loads(said(deltas)), PERSON), said(deltas)
    assert out.finish(Step((), "stop")) == "stop"


@pytest.mark.parametrize("seed", range(6))
def test_any_object_parses(grammars, seed):
    out = output(thinking=False, grammar=grammars.json_object())
    text = said(run(out, chosen(out, random.Random(seed))))
    assert isinstance(json.loads(text), dict) and text.encode().decode() == text


@pytest.mark.parametrize("form", [JSON_CALLS, DEEPSEEK_CALLS, LLAMA_CALLS])
def test_calls_can_be_demanded(grammars, form):
    marks = MARKS.__class__(MARKS.ends, calls=form)
    for seed in range(4):
        out = output(marks=marks, thinking=False, grammar=grammars.calls(form, TOOLS))
        deltas = run(out, chosen(out, random.Random(seed)))
        found = calls(deltas)
        assert found and not said(deltas).strip() and out.finish(Step((), "stop")) == "tool_calls"
        for name, arguments in found:
            assert (
                fits(json.loads(arguments), PERSON) if name == "add" else name == "now" and json.loads(arguments) != 0
            )
        out = output(marks=marks, thinking=False, grammar=grammars.calls(form, TOOLS, "now"))
        assert [name for name, _ in calls(run(out, chosen(out, random.Random(seed))))] == ["now"]
        out = output(marks=marks, thinking=False, grammar=grammars.calls(form, TOOLS, parallel=False))
        assert len(calls(run(out, chosen(out, random.Random(seed))))) == 1


def test_a_turn_can_only_end_where_the_text_may(grammars):
    grammar = grammars.json_schema({"type": "integer"})
    ends = list(MARKS.ends)
    assert not grammar.mask()[ends].any() and not grammar.mask()[TOKENIZER.vocab_size :].any()
    grammar.accept(TOKENIZER.encode("7")[0])
    assert grammar.mask()[ends].all() and not grammar.complete
    out = output(thinking=True, grammar=grammars.json_object())
    mask = out.mask()
    assert mask is not None and not mask[ends].any() and mask.sum() == VOCAB - len(ends)


def test_what_is_certain_is_forced_and_nothing_else(grammars):
    grammar, text = grammars.json_schema({"const": "always the same"}), b""
    while not grammar.complete:
        token = grammar.forced()
        assert grammar.forced() == token
        if token is None:
            token = int(grammar.mask().nonzero()[0])
        assert grammar.mask()[token]
        text += SPELLINGS[token]
        grammar.accept(token)
    assert json.loads(text) == "always the same"
    assert grammars.json_schema({"type": "boolean"}).forced() is None


def test_two_of_one_schema_are_independent_and_compile_once(grammars):
    one, two = grammars.json_schema(PERSON), grammars.json_schema(PERSON)
    one.accept(TOKENIZER.encode("{")[0])
    assert one.mask().ne(two.mask()).any() and isinstance(one, Grammar)
    before = list(grammars.compiled.values())
    grammars.json_schema(dict(reversed(PERSON.items())))
    assert grammars.json_schema(PERSON) and len(grammars.compiled) == len(before) + 1
    assert before[-1] in grammars.compiled.values()


def deep(levels: int) -> dict:
    schema: dict = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(((a{1,99}){1,99}){1,99}){1,99}b(?=c)"},
        {"type": "string", "pattern": "("},
        {"type": "object", "patternProperties": {f"^(a|b)*c{{{i}}}$": {} for i in range(300)}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        {"$ref": "#"},
        {"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]},
        {"anyOf": [{"$ref": "#"}, {"type": "array", "items": {"$ref": "#"}, "minItems": 1}]},
        {"$ref": "http://169.254.169.254/latest/meta-data"},
        {"$ref": "file:///etc/passwd"},
        {"$ref": "other.json#/a"},
        {"$ref": "#/$defs/none"},
        {"$ref": 3},
        {"enum": [f"x{i}" for i in range(100_000)]},
        {"type": "telepathy"},
        {"not": {}},
        {"enum": []},
        deep(150),
        deep(300),
        deep(5000),
        [],
        "x",
        None,
        True,
        {"minimum": float("nan")},
        {"maxLength": object()},
    ],
)
def test_schemas_that_cannot_be_followed_are_refused_in_time(grammars, schema):
    grammars.json_object()
    process, start = psutil.Process(), time.monotonic()
    before = process.memory_info().rss
    with pytest.raises(RequestError) as e:
        grammars.json_schema(schema)
    assert time.monotonic() - start < 30  # two seconds, and what a busy machine adds
    assert process.memory_info().rss - before < 64 * 2**20
    assert e.value.param == "response_format" and len(e.value.got) < 500
    grammars.json_schema(PERSON)


@pytest.mark.slow  # starts two children
def test_37_a_compile_that_never_ends_is_killed(tmp_path, monkeypatch):
    hanging = "from grammar_child import answer as compiled\n\ndef answer(question):\n"
    hanging += "    while 'hang' in question['lark']: pass\n    return compiled(question)\n"
    (tmp_path / "hanging.py").write_text(f"import sys\nsys.path.append({str(grammar.SCRIPT.parent)!r})\n{hanging}")
    monkeypatch.setattr(grammar, "SCRIPT", tmp_path / "hanging.py")
    monkeypatch.setattr(grammar, "SECONDS", 0.3)
    grammars = Grammars(TOKENIZER, VOCAB, MARKS.ends)
    grammars.json_schema(PERSON)
    first = grammars.child.process
    assert first is not None and first.poll() is None
    with pytest.raises(RequestError, match="no end in 0.3 s") as e:
        grammars.json_schema({"enum": ["hang"]})
    assert e.value.param == "response_format" and first.poll() is not None
    grammars.json_schema({"enum": ["on"]})
    grammars.close()


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "string", "pattern": "^(a?){1000}a{1000}$"},
        {"type": "string", "pattern": "^(.*a.{20}|.*b.{20})*c$"},
        {"type": "string", "minLength": 10**6},
        {"type": "array", "items": {"type": "integer"}, "minItems": 10**6},
    ],
)
def test_hard_schemas_that_compile_cost_little_a_token(grammars, schema):
    try:
        grammar = grammars.json_schema(schema)
        for _ in range(60):
            start = time.process_time()
            allowed = grammar.mask().nonzero().flatten()
            assert time.process_time() - start < 0.5
            grammar.accept(int(allowed[len(allowed) // 2]))
            if grammar.complete:
                break
    except RequestError as e:
        assert e.code == "invalid_schema"


def test_a_choice_of_no_function_is_refused(grammars):
    with pytest.raises(RequestError, match="tool_choice"):
        grammars.calls(JSON_CALLS, TOOLS, "gone")
