"""What a request may hold. Types are strict, an unknown field is refused, all problems are told at once.

What numbers a sampling parameter may have is the engine's to say (`partita/serve/request.py`). A field of
OpenAI's that this server cannot honour is refused unless it asks for nothing; fields that change no answer
(user, metadata, ...) are read and let be. Fields of vLLM beside OpenAI's: top_k, min_p, repetition_penalty,
stop_token_ids, ignore_eos.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    model_validator,
)

MAX_CHOICES = 1024  # prompts times n of one request
INT64 = 1 << 63


def _nothing(value: Any) -> Any:
    """Of a field that is known and not supported: only what asks for nothing."""
    if value not in (None, False, [], {}, ""):
        raise ValueError("this server does not support it: leave it out")
    return value


def _prompts(value: Any) -> list[str] | list[list[int]]:
    """A prompt in any of its four forms, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(x, str) for x in value):
            return value
        if _are_ids(value):
            return [value]
        if all(isinstance(x, list) and x and _are_ids(x) for x in value):
            return value
    raise ValueError(
        "a text, a list of texts, a list of token ids or a list of such lists, and none of them empty"
    )


def _are_ids(value: list[Any]) -> bool:
    return all(type(x) is int and 0 <= x < INT64 for x in value)


def _stops(value: Any) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not (isinstance(texts, list) and all(isinstance(x, str) for x in texts)):
        raise ValueError("a text or a list of texts")
    return tuple(texts)


def _content(value: Any) -> str | None:
    """The text of a message's content: a string, or the texts of its parts, joined."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("a text or a list of parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"a part of type {kind!r}: this server reads parts of type 'text'")
        texts.append(part["text"])
    return "".join(texts)


def _bias(value: dict[str, float]) -> dict[str, float]:
    wrong = [k for k in value if not (k.isascii() and k.isdigit())]
    if wrong:
        raise ValueError(f"{wrong[0][:20]!r} is no token id")
    return value


def _types(*kinds: str) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [json.loads(kind) for kind in kinds]})


TEXT, NULL = '{"type": "string"}', '{"type": "null"}'
IDS = '{"type": "array", "items": {"type": "integer"}, "minItems": 1}'
Unsupported = Annotated[Any, AfterValidator(_nothing)]
Ignored = Annotated[Any, Field(description="Changes no answer.")]
Prompts = Annotated[
    Any,
    AfterValidator(_prompts),
    _types(
        TEXT,
        '{"type": "array", "items": {"type": "string"}, "minItems": 1}',
        IDS,
        f'{{"type": "array", "items": {IDS}, "minItems": 1}}',
    ),
]
Stops = Annotated[
    Any,
    AfterValidator(_stops),
    _types(TEXT, f'{{"type": "array", "items": {TEXT}}}', NULL),
]
Content = Annotated[str | None, BeforeValidator(_content)]
AtLeastOne = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """No conversions, no unknown fields, no numbers that are none."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Function(Strict):
    """A function that a model may call."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """One tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionCall(Strict):
    """What an earlier answer called, its arguments as JSON text."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call in an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: Ignored = None
    annotations: Ignored = None
    audio: Unsupported = None
    function_call: Unsupported = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("a message needs a content of text")
        return self


class JsonSchema(Strict):
    """A schema that an answer must satisfy."""

    name: str
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class ResponseFormat(Strict):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with type 'json_schema', and only with it")
        return self


class StreamOptions(Strict):
    """What a stream tells beside its text."""

    include_usage: bool = False
    continuous_usage_stats: Literal[False] | None = None
    include_obfuscation: Literal[False] | None = None


class Texts(Strict):
    """A body whose texts are Unicode."""

    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            text = "a text holds half a character (a lone surrogate, \\ud800 to \\udfff)"
            raise ValueError(text) from None
        except RecursionError:
            raise ValueError("the body is nested too deeply") from None
        return value


class TokenizeRequest(Texts):
    """POST /tokenize."""

    prompt: str


class DetokenizeRequest(Texts):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0)]]


class Request(Texts):
    """What both routes of answers take."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: AtLeastOne | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Stops = ()
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Annotated[dict[str, float], AfterValidator(_bias)] | None = None
    response_format: ResponseFormat | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None

    @model_validator(mode="after")
    def _streams(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream = true")
        return self

    @property
    def choices(self) -> int:
        """Answers to each prompt."""
        return self.n or 1


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = 16
    echo: bool | None = False
    logprobs: int | None = None
    best_of: int | None = None
    suffix: Unsupported = None

    @model_validator(mode="after")
    def _agrees(self) -> CompletionRequest:
        if self.best_of not in (None, self.choices):
            raise ValueError(f"best_of: this server returns all it makes: n ({self.choices})")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: at least 1; 0 goes with echo = true")
        if len(self.prompt) * self.choices > MAX_CHOICES:
            text = f"{len(self.prompt)} prompts of n = {self.choices}"
            raise ValueError(f"prompt: {text}: at most {MAX_CHOICES} answers a request")
        return self


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: AtLeastOne | None = None
    max_completion_tokens: AtLeastOne | None = None
    logprobs: bool | None = False
    top_logprobs: int | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: Ignored = None
    reasoning_effort: Unsupported = None
    verbosity: Unsupported = None
    modalities: Annotated[list[Literal["text"]], Field(min_length=1)] | None = None
    audio: Unsupported = None
    prediction: Unsupported = None
    web_search_options: Unsupported = None
    functions: Unsupported = None
    function_call: Unsupported = None

    @model_validator(mode="after")
    def _agrees(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs = true")
        return self

    @property
    def calls(self) -> bool:
        """Whether the answer may call functions."""
        return bool(self.tools) and self.tool_choice != "none"
