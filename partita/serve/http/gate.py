"""Around every route: the key is asked for before a body is read, a body has an end, replies are counted."""

from __future__ import annotations

import hmac
from collections import Counter

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from partita.serve.http.errors import ApiError, reply

GUARDED = ("/v1/", "/tokenize", "/detokenize")  # health and metrics hold no text of anybody's
MAX_BODY_BYTES = 8 << 20
TOO_LONG = f"a body has at most {MAX_BODY_BYTES} bytes"


class Gate:
    """Refuses what is guarded without the key, where there is one, and counts replies by (route, status),
    "other" where no route was found."""

    def __init__(self, app: ASGIApp, key: str | None, counts: Counter[tuple[str, int]]) -> None:
        self.app, self.counts = app, counts
        self.key = key.encode() if key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self.counts[path, message["status"]] += 1
            await send(message)

        refusal = self._refusal(scope)
        if refusal is None:
            await self.app(scope, _limited(receive), counted)
        else:
            await reply(refusal)(scope, receive, counted)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self.key is not None and scope["path"].startswith(GUARDED):
            kind, _, key = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.key):
                text = "this server asks for a key, as `Authorization: Bearer KEY`, and has another"
                return ApiError(401, text, code="invalid_api_key")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > MAX_BODY_BYTES:
            return ApiError(413, f"the body has {int(length)} bytes: {TOO_LONG}")
        return None


def _limited(receive: Receive) -> Receive:
    """Of a body that does not say its length, too."""
    read = 0

    async def counted() -> Message:
        nonlocal read
        message = await receive()
        read += len(message.get("body", b""))
        if read > MAX_BODY_BYTES:
            raise HTTPException(413, TOO_LONG)
        return message

    return counted
