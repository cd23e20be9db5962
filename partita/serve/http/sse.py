"""Server-sent events: each chunk is one `data: JSON` and a blank line; `data: [DONE]` ends what is whole.

What fails on its way ends with an event that holds the error object, and without [DONE]: a client that
looks for it alone does not take half an answer for a whole one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from starlette.background import BackgroundTask
from starlette.responses import StreamingResponse

from partita.serve.http.errors import ApiError

DONE = b"data: [DONE]\n\n"
ALIVE = b": alive\n\n"  # a comment: proxies see that the connection lives
STREAMED: dict[int | str, dict[str, Any]] = {  # beside JSON, in the OpenAPI document
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}
HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


def event(value: Any) -> bytes:
    """One event of one JSON value."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def apart(choice: dict[str, Any], nothing: dict[str, Any], says: bool) -> list[dict[str, Any]]:
    """A choice of a chunk that `says` something, and how it ends in one of its own with `nothing` new: many
    clients read text until there is a finish_reason."""
    if choice["finish_reason"] is None or not says:
        return [choice]
    open_end = {"finish_reason": None, "stop_reason": None}
    return [choice | open_end, choice | nothing | {"logprobs": None}]


def respond(
    chunks: AsyncIterator[dict[str, Any] | None], end: Callable[[], Awaitable[None]]
) -> StreamingResponse:
    """The chunks as events; None says that there is nothing yet. `end` is called however it ends."""

    async def events() -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                yield ALIVE if chunk is None else event(chunk)
            yield DONE
        except ApiError as error:
            yield event(error.body())
        finally:
            await end()

    return StreamingResponse(
        events(), media_type="text/event-stream", headers=HEADERS, background=BackgroundTask(end)
    )
