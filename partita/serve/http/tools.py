"""Calls of functions in a model's text, as Hermes and Qwen write them:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

What stands between is held until it is whole; what is no call after all is text again.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

OPENS, CLOSES = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class Call:
    """One call, its arguments as JSON text."""

    name: str
    arguments: str

    def told(self, index: int) -> dict[str, Any]:
        """As OpenAI's replies hold it."""
        return {
            "index": index,
            "id": f"call_{uuid.uuid4().hex}",
            "type": "function",
            "function": {"name": self.name, "arguments": self.arguments},
        }


class Calls:
    """Parts an answer into text and calls while it comes."""

    def __init__(self) -> None:
        self._held = ""

    def feed(self, text: str) -> tuple[str, list[Call]]:
        """What is certain once `text` has come: text outside calls, and calls that are whole."""
        self._held += text
        said, found = "", []
        while True:
            before, opened, rest = self._held.partition(OPENS)
            if not opened:
                kept = _begun(self._held)
                cut = len(self._held) - kept
                said, self._held = said + self._held[:cut], self._held[cut:]
                break
            said, self._held = said + before, opened + rest
            inside, closed, after = rest.partition(CLOSES)
            if not closed:
                break
            call = _parsed(inside)
            said += "" if call else opened + inside + closed
            found += [call] if call else []
            self._held = after
        return said, found

    def rest(self) -> str:
        """What is still held at the end: text, since no call came of it."""
        held, self._held = self._held, ""
        return held


def _begun(text: str) -> int:
    """How many of the last characters may begin OPENS."""
    longest = min(len(text), len(OPENS) - 1)
    return next((n for n in range(longest, 0, -1) if OPENS.startswith(text[-n:])), 0)


def _parsed(inside: str) -> Call | None:
    try:
        stated = json.loads(inside)
    except (ValueError, RecursionError):
        return None
    name = stated.get("name") if isinstance(stated, dict) else None
    if not isinstance(name, str):
        return None
    return Call(name, json.dumps(stated.get("arguments", {}), ensure_ascii=False))
