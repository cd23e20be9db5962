"""Log-probabilities in OpenAI's two forms: of completions (parallel lists), of chats (an object a token).

A token is a run of bytes, and may end within a character: its text is then "bytes:\\xe2\\x80", and chats
tell its bytes as numbers beside it, which join to those of the answer.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from partita.serve.request import TokenLogprob

Spell = Callable[[int], bytes]


def text_of(spelled: bytes) -> str:
    """A token's text, or its bytes by name."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def of_chat(entries: Sequence[TokenLogprob], spell: Spell) -> dict[str, Any]:
    """One object a token, the likeliest others within it."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        spelled = spell(token)
        return {"token": text_of(spelled), "logprob": logprob, "bytes": list(spelled)}

    return {
        "content": [
            one(e.token, e.logprob) | {"top_logprobs": [one(t, p) for t, p in e.top]}
            for e in entries
        ]
    }


class Columns:
    """Of one choice of a completion: lists that go on from chunk to chunk; offsets count characters."""

    def __init__(self, spell: Spell) -> None:
        self._spell = spell
        self._told = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def of(self, entries: Sequence[TokenLogprob | None], ids: Sequence[int]) -> dict[str, Any]:
        """The next tokens; an entry of None is a token that nothing stood before."""
        made: dict[str, Any] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for token, entry in zip(ids, entries, strict=True):
            spelled = self._spell(token)
            made["tokens"].append(text_of(spelled))
            made["text_offset"].append(self._offset)
            self._offset += len(self._told.decode(spelled))
            made["token_logprobs"].append(None if entry is None else entry.logprob)
            made["top_logprobs"].append(None if entry is None else self._top(entry))
        return made

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        rows = (*entry.top, (entry.token, entry.logprob))
        return {text_of(self._spell(token)): logprob for token, logprob in reversed(rows)}
