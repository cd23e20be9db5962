"""Whether the process answers, and whether a token comes out of the model."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from fastapi.responses import JSONResponse

from partita.serve.http.errors import ApiError
from partita.serve.http.replies import OVERLOADED, Replies, Service
from partita.serve.request import SamplingParams
from partita.serve.stats import Stats

STALLED_S = 10.0  # a step of the model that takes longer is none


def router(service: Service, stalled_s: float = STALLED_S) -> APIRouter:
    """GET /health and /health/decode."""
    made = APIRouter(tags=["health"])

    @made.get("/health")
    async def health() -> JSONResponse:
        """The process answers, and its engine has not failed."""
        failed = service.engine.stats().failed
        state = {"status": "ok"} if failed is None else {"status": "failed", "reason": failed}
        return JSONResponse(state, 200 if failed is None else 503)

    @made.get("/health/decode")
    async def decode() -> JSONResponse:
        """A token comes out: of its own request where the engine is idle or keeps up, else the engine's
        steps go on. 503 where neither happens for `stalled_s`."""
        try:
            replies = await Replies.begin(service, "health", [[0]], SamplingParams(max_tokens=1))
        except ApiError as error:
            return _without(service, error, stalled_s)
        try:
            return await _first(service, replies, stalled_s)
        except ApiError as error:
            return JSONResponse({"status": "failed", "reason": error.message}, 503)
        finally:
            await replies.end()

    return made


async def _first(service: Service, replies: Replies, stalled_s: float) -> JSONResponse:
    steps = service.engine.stats().steps

    async def token() -> None:
        async for news in replies.deltas():
            if news is not None:
                return

    waiting = asyncio.create_task(token())
    done, _ = await asyncio.wait((waiting,), timeout=stalled_s)
    if done:
        waiting.result()
        return JSONResponse({"status": "ok"})
    waiting.cancel()
    return _busy(service.engine.stats(), service.engine.stats().steps > steps)


def _without(service: Service, error: ApiError, stalled_s: float) -> JSONResponse:
    """No request of its own was taken: too many wait, which is well while steps go on, or none runs."""
    stats = service.engine.stats()
    if error.code == OVERLOADED:
        return _busy(stats, stats.idle_s < stalled_s)
    return JSONResponse({"status": "failed", "reason": error.message}, 503)


def _busy(stats: Stats, moves: bool) -> JSONResponse:
    if moves:
        return JSONResponse({"status": "ok", "busy": True})
    text = f"no step of the model in {stats.idle_s:.1f} s, {stats.running} requests running"
    return JSONResponse({"status": "stalled", "reason": text}, 503)
