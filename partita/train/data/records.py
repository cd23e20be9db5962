"""Records of text: a line of a .jsonl, a row of a table, the messages of a chat; as passages.

{"text"}                    counted whole
{"prompt", "completion"}    the completion alone is counted
{"messages"}                a chat: [{"role", "content"}, ...]; the assistant's answers are counted
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from partita.base.errors import DataError
from partita.train.data.chat import Chat, ChatError

COLUMNS = ("text", "prompt", "completion", "messages")
WANTED = '"text", or "prompt" and "completion", or "messages"'


@dataclass(frozen=True, slots=True)
class Passage:
    """A stretch of text. `prompt` is read before it and carries no loss; `ends` closes a record."""

    text: str
    prompt: str = ""
    ends: bool = False


class Record(msgspec.Struct):
    """What a line of JSON may hold."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None
    messages: list[dict[str, Any]] | None = None


def passages_of(line: bytes, path: Path, where: str, chat: Chat) -> Iterator[Passage]:
    """The passages of one record; `where` ('line 3') and the file are told with what is wrong."""
    try:
        record = msgspec.json.decode(line, type=Record)
        if record.text is not None:
            yield Passage(record.text, ends=True)
        elif record.prompt is not None and record.completion is not None:
            yield Passage(record.completion, record.prompt, ends=True)
        elif record.messages is not None:
            yield from _chat(chat, record.messages)
        else:
            held = ", ".join(msgspec.json.decode(line, type=dict[str, Any])) or "nothing"
            text = f"{path}: {where} holds none of {WANTED}; it has {held[:200]}"
            raise DataError(text, file=str(path))
    except (msgspec.DecodeError, ChatError) as error:
        raise DataError(f"{path}: {where}: {error}{_advice(path, line)}", file=str(path)) from error


def _advice(path: Path, line: bytes) -> str:
    """Of a file that is JSON, but not one record a line."""
    start = line.strip()
    if start.startswith(b"[") or start == b"{":
        return "; one record a line is wanted, with no list around them"
    if path.suffix.lower() == ".json" and not start.startswith(b"{"):
        return "; a .json holds one record a line, plain text is named .txt"
    return ""


def _chat(chat: Chat, messages: list[dict[str, Any]]) -> Iterator[Passage]:
    turns = chat.turns(messages)
    for turn in turns:
        yield Passage(turn.answer, turn.prompt, ends=chat.ends_records and turn is turns[-1])
