"""An engine's streams as HTTP awaits them: deltas cross from its thread, a client that leaves ends them.

A web framework cancels a streaming reply whose client has gone, not a plain one: that would go on
computing for nobody, its pages held. Here both end at once, as does what `/v1/requests/{id}/cancel` names.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from partita.base.errors import UsageError
from partita.serve.engine import Engine
from partita.serve.http.errors import ApiError, all_of
from partita.serve.http.words import Words
from partita.serve.request import (
    Delta,
    EngineStoppedError,
    Output,
    OverloadedError,
    SamplingParams,
    joined,
)
from partita.serve.stream import Stream

ALIVE_S = 15.0  # a stream without news says so
FAILED, OVERLOADED = "engine_failed", "overloaded"
GONE = 499  # what nginx logs where the client went away; nobody reads it


@dataclass(frozen=True)
class Service:
    """What the routes share: the engine, the model's name and text, and what runs under which id."""

    engine: Engine
    name: str
    words: Words
    created: int
    live: dict[str, Replies] = field(default_factory=dict)

    @property
    def max_len(self) -> int:
        """Tokens that the model sees, a prompt and its answer together."""
        return self.engine.max_len

    def spell(self, token: int) -> bytes:
        """The bytes of a token."""
        return self.engine.vocabulary.bytes_of(token)

    def require_model(self, name: str | None) -> None:
        """Raises ApiError where another model is asked for."""
        if name not in (None, self.name):
            text = f"the model {name!r} is not served here; {self.name!r} is"
            raise ApiError(404, text, param="model", code="model_not_found")


class Replies:
    """What one HTTP request waits for: `n` choices of each prompt, numbered prompt by prompt."""

    def __init__(self, service: Service, kind: str, params: SamplingParams) -> None:
        self.key, self.created = f"{kind}-{uuid.uuid4().hex}", int(time.time())
        self._service, self._params = service, params
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
        self.streams: list[Stream] = []

    @classmethod
    async def begin(
        cls, service: Service, kind: str, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> Replies:
        """Hands all prompts in; the id begins with `kind`. Raises ApiError where the engine does not take
        one of them; none runs then."""
        made = cls(service, kind, params)
        try:  # beside the event loop: a grammar is compiled there
            await run_in_threadpool(made._submit, prompts)
        except UsageError as error:
            made.cancel()
            raise _refusal(error) from error
        except EngineStoppedError as error:
            made.cancel()
            raise ApiError(503, str(error), code=FAILED) from error
        service.live[made.key] = made
        return made

    def head(self, kind: str) -> dict[str, Any]:
        """What every chunk of a stream, and a plain reply, begins with."""
        return {
            "id": self.key,
            "object": kind,
            "created": self.created,
            "model": self._service.name,
        }

    def _submit(self, prompts: Sequence[Sequence[int]]) -> None:
        for number, prompt in enumerate(prompts):
            told = partial(self._told, number * self._params.n)
            self.streams.append(self._service.engine.submit(prompt, self._params, told))

    def _told(self, first: int, delta: Delta) -> None:
        """On the engine's thread."""
        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(self._news.put_nowait, (first + delta.index, delta))

    def cancel(self) -> None:
        """Ends what still runs; its choices end as "abort"."""
        for stream in self.streams:
            stream.cancel()

    async def end(self) -> None:
        """Cancels and forgets: nothing is left of it, however it went."""
        self.cancel()
        self._service.live.pop(self.key, None)

    async def deltas(self) -> AsyncIterator[tuple[int, Delta] | None]:
        """(choice, delta) as they come, until every choice has ended; None where nothing came for
        ALIVE_S. Raises ApiError where the engine fails."""
        left = len(self.streams) * self._params.n
        while left:
            try:
                async with asyncio.timeout(ALIVE_S):
                    number, delta = await self._news.get()
            except TimeoutError:
                yield None
                continue
            if delta.finish_reason == "error":
                lost = self._service.engine.stats().failed is not None
                text = delta.error or "the request failed"
                raise ApiError(503 if lost else 500, text, code=FAILED if lost else None)
            left -= delta.finish_reason is not None
            yield number, delta

    async def whole(self, request: Request) -> list[Output]:
        """All choices, in order. Ends them all and raises ApiError where the client leaves before."""
        collecting = asyncio.create_task(self._collect())
        leaving = asyncio.create_task(_left(request))
        try:
            await asyncio.wait((collecting, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise ApiError(GONE, "the client went away")
            return collecting.result()
        finally:
            for task in (collecting, leaving):
                task.cancel()
            await self.end()

    async def _collect(self) -> list[Output]:
        found: dict[int, list[Delta]] = defaultdict(list)
        async for news in self.deltas():
            if news is not None:
                found[news[0]].append(news[1])
        return [joined(found[number]) for number in sorted(found)]

    def usage(self) -> dict[str, Any]:
        """Tokens of all prompts and choices, as OpenAI counts them."""
        known = [stream.usage for stream in self.streams]
        prompt = sum(u.prompt_tokens for u in known)
        answer = sum(u.completion_tokens for u in known)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in known)},
        }


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refusal(error: UsageError) -> ApiError:
    if isinstance(error, OverloadedError):
        return ApiError(429, str(error), code=OVERLOADED)
    named = {"grammar": "response_format"}  # what the engine calls otherwise
    return all_of([(named.get(key, key), text) for key, text in error.all])
