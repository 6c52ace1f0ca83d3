"""Requests of the API, typed and strict: a field we don't know is named, not dropped; a number out of range is refused.

    body → strict.parse (JSON with one meaning) → ChatRequest or CompletionRequest (pydantic, strict) → Ask (ours)
                                                  their fields' types: fields.py

Fields are OpenAI's and DeepSeek's (`thinking`, `reasoning_effort`, `prefix`, FIM's `suffix`), and three of ours:
`top_k`, `min_p`, `repetition_penalty`. Left out on purpose: images and audio (text models), chat templates and prompt
embeddings from clients, `best_of`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from shoal.engine import schema
from shoal.engine.request import Form, Sampling
from shoal.errors import RequestError
from shoal.server import strict
from shoal.server.fields import (
    MAX_CHOICES,
    Biases,
    Content,
    First,
    Inputs,
    Label,
    Metadata,
    Named,
    Prompts,
    Stops,
    drawable,
    fault,
)
from shoal.server.problem import Problem

MAX_MESSAGES = 10_000
MAX_TOOLS = 128
MAX_TOKENS = 2**24
MAX_LOGPROBS = 20
MAX_FIELDS = 64  # of one object; more are never looked at one by one
ID_BYTES = 2  # what a token id in a prompt counts as, next to text
NAME = r"^[a-zA-Z0-9_-]{1,64}$"
EFFORTS = {"none": 0, "minimal": 512, "low": 2048, "medium": 8192, "high": 32768}  # tokens of thinking

CHAT, REASONER = "deepseek-chat", "deepseek-reasoner"

T = TypeVar("T", bound=BaseModel)


class Strict(BaseModel):
    """Faults are counted: a body of a million of them is refused by its first."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def not_too_many_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise fault(f"an object of {len(value):,} fields; at most {MAX_FIELDS}")
        return value


class CalledFunction(Strict):
    name: str = Field(pattern=NAME)
    arguments: str


class ToolCall(Strict):
    id: str = Field(max_length=128)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = Field(None, max_length=64)
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], First()] | None = Field(None, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(None, max_length=128)
    prefix: bool | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def fits_its_role(self) -> "Message":
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise fault(f"a {self.role} message without content")
        if self.role == "user" and not self.content:
            raise fault("an empty user message")
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content or self.prefix):
            raise fault("tool_calls, reasoning_content and prefix belong to assistant messages")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise fault("tool_call_id belongs to tool messages, and each of them needs one")
        return self


class Function(Strict):
    name: str = Field(pattern=NAME)
    description: str | None = Field(None, max_length=16 * 1024)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: Function


class ChosenFunction(Strict):
    name: str = Field(pattern=NAME)


class ToolChoice(Strict):
    type: Literal["function"]
    function: ChosenFunction


class Thinking(Strict):
    type: Literal["enabled", "disabled"]
    budget_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)


class StreamOptions(Strict):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class NamedSchema(Strict):
    name: str = Field(pattern=NAME)
    description: str | None = Field(None, max_length=16 * 1024)
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    @model_validator(mode="after")
    def schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise fault('json_schema belongs to type "json_schema", and it needs one')
        return self


class Drawn(Strict):
    """What both kinds of completion share."""

    model: str = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    temperature: Annotated[float, Field(ge=0, le=2), BeforeValidator(drawable)] | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=2**20)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=2)
    logit_bias: Biases | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None
    store: Literal[False] | None = None  # from here on OpenAI's, for its own bookkeeping: answers don't depend on them
    metadata: Metadata | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_key: Label | None = None
    safety_identifier: Label | None = None

    @model_validator(mode="after")
    def options_of_a_stream(self) -> "Drawn":
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options without stream")
        return self

    def sampling(self, logprobs: int | None) -> Sampling:
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            repetition_penalty=self.repetition_penalty or 1.0,
            logit_bias=self.logit_bias or {},
            seed=None if self.seed is None else self.seed % 2**64,
            logprobs=logprobs,
        )


class ChatRequest(Drawn):
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    messages: Annotated[list[Message], First()] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], First()] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high"] | None = None

    @model_validator(mode="after")
    def fields_that_need_each_other(self) -> "ChatRequest":
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise fault("two tools of one name")
        if isinstance(self.tool_choice, ToolChoice) and self.tool_choice.function.name not in names:
            raise fault("tool_choice names a function that tools doesn't have")
        if self.tool_choice == "required" and not names:
            raise fault("tool_choice required without tools")
        if self.parallel_tool_calls is False and names and self.tool_choice in (None, "auto"):
            raise fault('parallel_tool_calls false needs a tool_choice of "required", "none" or a function')
        if self.top_logprobs is not None and not self.logprobs:
            raise fault("top_logprobs without logprobs")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise fault("max_tokens and max_completion_tokens differ")
        if any(message.prefix for message in self.messages[:-1]):
            raise fault("prefix belongs to the last message")
        if self.messages[-1].role == "assistant" and not self.messages[-1].prefix:
            raise fault("the last message is the assistant's; to continue it, set its prefix to true")
        return self


class CompletionRequest(Drawn):
    prompt: Prompts
    suffix: str | None = None
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool | None = None

    @model_validator(mode="after")
    def what_an_echo_goes_with(self) -> "CompletionRequest":
        if self.echo and (self.logprobs is None or self.stream or self.suffix is not None or (self.n or 1) > 1):
            raise fault("echo goes with logprobs, and without stream, suffix and n")
        return self


class EmbeddingRequest(Strict):
    model: str = Field(min_length=1, max_length=256)
    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None  # a model's vectors have one length
    user: Label | None = None


class BatchRequest(Strict):
    input_file_id: Named
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"] = "24h"
    metadata: Metadata | None = None


@dataclass(frozen=True)
class Ask:
    """A checked request in our own words. `prompts` are texts or token ids, empty where there are `messages`."""

    chat: bool
    model: str
    form: Form
    sampling: Sampling
    max_tokens: int | None
    user: str | None
    messages: tuple[Mapping[str, Any], ...] = ()
    prompts: tuple[str | list[int], ...] = ()
    suffix: str | None = None
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    embed: Literal["float", "base64"] | None = None  # how vectors are written, where they are all that is wanted

    @property
    def field(self) -> str:
        """Where its text came from."""
        return "messages" if self.chat else "input" if self.embed else "prompt"

    @property
    def text_bytes(self) -> int:
        """At most this much text has to be tokenised, or as many ids looked at."""
        parts = [p for p in self.prompts if isinstance(p, str)] + [self.suffix or ""]
        said = [text for m in self.messages for text in (m.get("content"), m.get("reasoning_content")) if text]
        called = [c["function"]["arguments"] for m in self.messages for c in m.get("tool_calls") or ()]
        ids = ID_BYTES * sum(len(p) for p in self.prompts if not isinstance(p, str))
        return ids + sum(len(text.encode()) for text in (*parts, *said, *called))


def read_chat(body: bytes) -> Ask:
    """Raises Problem 400 that names the field at fault."""
    asked = read(ChatRequest, body)
    tools = tuple(tool.model_dump(exclude_none=True) for tool in asked.tools or ())
    wanted = asked.response_format
    try:
        for i, tool in enumerate(tools):
            schema.check(tool["function"].get("parameters", {}), f"tools[{i}].function.parameters")
        if wanted is not None and wanted.json_schema is not None:
            schema.check(wanted.json_schema.schema_, "response_format.json_schema.schema")
    except RequestError as e:
        raise Problem.of(e) from None
    last, choice = asked.messages[-1], asked.tool_choice
    form = Form(
        **thinks(asked),
        stop=tuple(asked.stop or ()),
        tools=() if choice == "none" else tools,
        tool_choice=choice.model_dump() if isinstance(choice, ToolChoice) else choice or "auto",
        parallel_calls=asked.parallel_tool_calls is not False,
        json=wanted is not None and wanted.type != "text",
        schema=wanted.json_schema.schema_ if wanted is not None and wanted.json_schema is not None else None,
        continues=last.content or "" if last.prefix else "",
    )
    return Ask(
        chat=True,
        model=asked.model,
        messages=tuple(message.model_dump(exclude_none=True) for message in asked.messages),
        form=form,
        sampling=asked.sampling((asked.top_logprobs or 0) if asked.logprobs else None),
        n=asked.n or 1,
        max_tokens=asked.max_completion_tokens or asked.max_tokens,
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        user=asked.user,
    )


def read_completion(body: bytes) -> Ask:
    """Raises Problem 400 that names the field at fault."""
    asked = read(CompletionRequest, body)
    if any(len(prompt) == 0 for prompt in asked.prompt) and asked.suffix is None:
        raise Problem(400, "an empty prompt", "prompt", "empty")
    if asked.suffix is not None and any(not isinstance(prompt, str) for prompt in asked.prompt):
        raise Problem(400, "a suffix goes with a prompt of text", "suffix", "invalid_value")
    if len(asked.prompt) * (asked.n or 1) > MAX_CHOICES:
        raise Problem(400, f"prompts times n: at most {MAX_CHOICES} together", "n", "invalid_value")
    return Ask(
        chat=False,
        model=asked.model,
        prompts=tuple(asked.prompt),
        suffix=asked.suffix,
        form=Form(stop=tuple(asked.stop or ())),
        sampling=asked.sampling(asked.logprobs),
        n=asked.n or 1,
        max_tokens=asked.max_tokens,
        stream=bool(asked.stream),
        include_usage=bool(asked.stream_options and asked.stream_options.include_usage),
        user=asked.user,
        echo=bool(asked.echo),
    )


def read_embedding(body: bytes) -> Ask:
    """Raises Problem 400 that names the field at fault."""
    asked = read(EmbeddingRequest, body)
    if any(len(text) == 0 for text in asked.input):
        raise Problem(400, "an empty input", "input", "empty")
    return Ask(
        chat=False,
        model=asked.model,
        prompts=tuple(asked.input),
        form=Form(),
        sampling=Sampling(temperature=0),
        max_tokens=0,
        user=asked.user,
        embed=asked.encoding_format or "float",
    )


def thinks(asked: ChatRequest) -> dict[str, Any]:
    """`thinking` wins over `reasoning_effort`, which wins over what the model's name says."""
    budget = None if asked.reasoning_effort is None else EFFORTS[asked.reasoning_effort]
    thinking = asked.model != CHAT if budget is None else budget > 0
    if asked.thinking is not None:
        thinking = asked.thinking.type == "enabled"
        budget = asked.thinking.budget_tokens or budget
    return {"thinking": thinking, "thinking_budget": (budget or None) if thinking else None}


def read(kind: type[T], body: bytes) -> T:
    value = strict.parse(body)
    try:
        return kind.model_validate(value)
    except ValidationError as e:
        raise named(e) from None


def named(e: ValidationError) -> Problem:
    """The first fault, with the path of its field; of a choice of types, where the one that came furthest failed.

    Input is never repeated beyond the names of fields.
    """
    faults = e.errors(include_url=False, include_input=False)
    place = faults[0]["loc"][:-1]
    first = max((f for f in faults if f["loc"][: len(place)] == place), key=lambda f: len(f["loc"]))
    param = path(first["loc"])
    if first["type"] == "extra_forbidden":
        return Problem(400, f"unknown field {strict.shown(param)}", param, "unknown_field")
    if first["type"] == "missing":
        return Problem(400, f"the field {param} is missing", param, "missing_field")
    says = first["msg"][:300]
    return Problem(400, f"{param}: {says}" if param else says, param or None, "invalid_value")


def path(loc: tuple[int | str, ...]) -> str:
    """`messages[0].content`; the names of types that pydantic puts between are left out."""
    found = ""
    for part in loc:
        if isinstance(part, int):
            found += f"[{part}]"
        elif part and "[" not in part and part not in ("str", "int", "ToolChoice", "literal"):
            found += f".{part[:64]}" if found else part[:64]
    return found
