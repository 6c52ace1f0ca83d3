"""A model's language as a server uses it, from requests to answers."""

import pytest

from shoal.data.tokenizer import ANSWER, ASSISTANT, THINK, THINK_END, Tokenizer
from shoal.engine.request import Form, Step, Token
from shoal.engine.turns import MOST_TOOLS_BYTES, Turns
from shoal.errors import RequestError
from tests.engine.outputs import TOKENIZER, VOCAB, calls, run, said

R1 = "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m.content }}{% endfor %}{{ '<｜Assistant｜><think>\n' }}"
ADD = {"type": "function", "function": {"name": "add", "strict": True, "description": None, "parameters": {}}}
ASKED = {"role": "user", "content": "1 + 1?"}


@pytest.fixture(scope="module")
def turns():
    found = Turns(TOKENIZER, VOCAB)
    yield found
    found.close()


def ids(*pieces: str) -> list[int]:
    return TOKENIZER.encode_pieces(pieces)


def test_a_prompt_and_its_output_agree_on_thinking(turns):
    for form, end, state in (
        (Form(thinking=True), ids(ASSISTANT, THINK), "thinking"),
        (Form(), ids(ASSISTANT, THINK, THINK_END, ANSWER), "answering"),
        (Form(thinking=True, continues="so"), ids(THINK, THINK_END, ANSWER, "so"), "answering"),
    ):
        last = [{"role": "assistant", "content": form.continues, "prefix": True}] if form.continues else []
        tokens = turns.render([ASKED, *last], form)
        assert tokens[-len(end) :] == end and turns.output(form, chat=True).state == state


def test_a_prefix_that_says_nothing_yet_leaves_off_where_it_is_rendered(turns):
    form, last = Form(thinking=True), {"role": "assistant", "content": "", "prefix": True}
    for message, end, state in (
        (last, ids(THINK, THINK_END, ANSWER), "answering"),
        (last | {"reasoning_content": "so"}, ids(THINK, "so"), "thinking"),
    ):
        tokens = turns.render([ASKED, message], form)
        assert tokens[-len(end) :] == end and turns.output(form, True, tokens).state == state
    asked = turns.render([ASKED], form)
    assert turns.output(form, True, asked).state == "thinking"
    assert turns.marks.thinking_after([*asked, TOKENIZER.eos_id, *ids("x")]) is None  # an earlier turn's marks


def test_a_model_that_always_thinks_is_stopped_at_once_where_nobody_asked_it_to():
    turns = Turns(Tokenizer(TOKENIZER.text, chat_template=R1), VOCAB)
    try:
        out = turns.output(Form(), chat=True)
        assert (out.state, out.forced()) == ("thinking", TOKENIZER.special_id(THINK_END))
        out = turns.output(Form(thinking=True, thinking_budget=3), chat=True)
        assert (out.state, out.forced()) == ("thinking", None)
    finally:
        turns.close()


def test_plain_completions_have_no_structure(turns):
    out = turns.output(Form(stop=("!",)), chat=False)
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    tokens = [TOKENIZER.special_id(THINK), *TOKENIZER.encode(text + "! no more")]
    assert said(run(out, tokens)) == "<think>" + text and out.finish(Step((), "stop")) == "stop"
    assert turns.document("a") == [TOKENIZER.bos_id, *TOKENIZER.encode("a")]
    assert turns.infill("a", "b") == turns.chat.completion("a", "b")


def test_calls_are_looked_for_only_where_there_are_functions(turns):
    text = TOKENIZER.encode('<tool_call>{"name": "add", "arguments": {}}</tool_call>')
    assert calls(run(turns.output(Form(tools=(ADD,)), chat=True), text)) == [("add", "{}")]
    assert calls(run(turns.output(Form(), chat=True), text)) == []


def test_results_reach_the_model_in_the_order_of_their_calls(turns):
    called = [{"id": i, "type": "function", "function": {"name": "add", "arguments": "{}"}} for i in ("a", "b")]
    results = [{"role": "tool", "tool_call_id": i, "content": f"result of {i}"} for i in ("a", "b")]
    talk = [{"role": "developer", "content": "s"}, ASKED, {"role": "assistant", "content": None, "tool_calls": called}]
    form = Form(tools=(ADD,))
    one = turns.render([*talk, *results], form)
    assert one == turns.render([*talk, *results[::-1]], form)
    assert TOKENIZER.decode(one).index("result of a") < TOKENIZER.decode(one).index("result of b")
    for wrong in (results[:1], [results[0], results[0]], [*results, results[0]], []):
        with pytest.raises(RequestError) as e:
            turns.render([*talk, *wrong], form)
        assert e.value.param == "messages"


def test_functions_are_described_without_what_is_ours_alone(turns):
    text = TOKENIZER.decode(turns.render([ASKED], Form(tools=(ADD,))))
    assert '{"name": "add", "parameters": {}}' in text
    huge = {"type": "function", "function": {"name": "f", "description": "x" * MOST_TOOLS_BYTES}}
    with pytest.raises(RequestError) as e:
        turns.render([ASKED], Form(tools=(huge,)))
    assert e.value.param == "tools"


def test_what_an_answer_cannot_follow_is_refused_when_the_prompt_is_rendered(turns):
    for form, param in (
        (Form(json=True, schema={"$ref": "#"}), "response_format"),
        (Form(tools=(ADD,), tool_choice={"type": "function", "function": {"name": "sub"}}), "tool_choice"),
        (Form(stop=("",)), "stop"),
    ):
        with pytest.raises(RequestError) as e:
            turns.render([ASKED], form)
        assert e.value.param == param


def test_json_and_demanded_calls_have_a_grammar(turns):
    assert turns.output(Form(json=True), chat=True).mask() is not None
    assert turns.output(Form(json=True, schema={"type": "null"}), chat=True).grammar.forced() is not None
    assert turns.output(Form(tools=(ADD,), tool_choice="required"), chat=True).forced() is not None
    assert turns.output(Form(tools=(ADD,)), chat=True).mask() is None


def test_ids_of_calls_never_repeat(turns):
    text = TOKENIZER.encode('<tool_call>{"name": "add", "arguments": {}}</tool_call>' * 2)
    found = [d.call_id for _ in range(3) for d in run(turns.output(Form(tools=(ADD,)), True), text) if d.call_id]
    assert len(set(found)) == 6


def test_pieces_spell_the_text(turns):
    text = "é漢 <｜User｜>"
    assert b"".join(turns.piece(t) for t in TOKENIZER.encode(text)) == text.encode()
    assert turns.piece(VOCAB - 1) == b"" and turns.stop_tokens >= {TOKENIZER.eos_id}
    assert turns.output(Form(), True).feed(Step((Token(1),), "cancelled")) == []
