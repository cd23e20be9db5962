"""What a request says, as token ids. Runs beside the event loop: long texts take their time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from partita.base.errors import DataError
from partita.serve.http.errors import ApiError
from partita.serve.http.schema import ChatRequest, Message
from partita.serve.http.words import Words
from partita.train.data.chat import ChatError, plain

SYSTEM = "system"
NEXT_TURN = "\nuser: "  # ends an answer where messages are plain lines


def prompt_ids(words: Words, prompts: Sequence[str] | Sequence[list[int]]) -> list[list[int]]:
    """Ids of each prompt, those that are ids as they are. Raises ApiError where a text has none."""
    return [_encoded(words, x, "prompt") if isinstance(x, str) else x for x in prompts]


def chat_ids(words: Words, body: ChatRequest) -> list[int]:
    """Ids of the messages under the template, which asks for the next. Raises ApiError where it refuses."""
    chat = words.tokenizer.chat
    if not chat.ends_records:
        words = replace(words, special=False)  # a template writes what begins a text itself
    if body.calls and not chat.takes_tools:
        raise ApiError(400, "tools: this model's chat template tells of none", param="tools")
    try:
        said = [_said(m) for m in body.messages]
        text = chat.render(said, True, *([_tools(body)] if body.calls else []))
    except ChatError as error:
        raise ApiError(400, f"messages: {error}", param="messages") from error
    return _encoded(words, text, "messages")


def chat_stops(words: Words) -> tuple[str, ...]:
    """What ends an answer beside the request's own stops."""
    return (NEXT_TURN,) if words.tokenizer.chat.render is plain else ()


def _said(message: Message) -> dict[str, Any]:
    """As templates read it: OpenAI's newer name of a system's turn is the older one, arguments of calls
    are values."""
    said: dict[str, Any] = {
        "role": SYSTEM if message.role == "developer" else message.role,
        "content": message.content or "",
    }
    if message.tool_calls:
        said["tool_calls"] = [
            {"id": c.id, "type": "function", "function": _call(c.function)}
            for c in message.tool_calls
        ]
    optional = {"name": message.name, "tool_call_id": message.tool_call_id}
    return said | {key: value for key, value in optional.items() if value is not None}


def _tools(body: ChatRequest) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_none=True) for tool in body.tools or ()]


def _call(function: Any) -> dict[str, Any]:
    try:
        arguments = json.loads(function.arguments)
    except (ValueError, RecursionError):
        arguments = function.arguments
    return {"name": function.name, "arguments": arguments}


def _encoded(words: Words, text: str, field: str) -> list[int]:
    try:
        return words.tokenizer.encode(text, words.special)
    except DataError as error:
        raise ApiError(400, f"{field}: {error}", param=field) from error
