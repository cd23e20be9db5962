"""The application: routes over one engine. Nothing of it is global: a process may hold several."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import APIRouter, FastAPI

import partita
from partita.serve.engine import Engine
from partita.serve.http import chat, completions, errors, health, metrics, tokens
from partita.serve.http.errors import ApiError
from partita.serve.http.gate import Gate
from partita.serve.http.replies import Service
from partita.serve.http.words import Words


def create_app(
    engine: Engine,
    name: str,
    words: Words,
    *,
    api_key: str | None = None,
    stalled_s: float = health.STALLED_S,
) -> FastAPI:
    """An ASGI application that answers for `engine` as the model `name`; it closes the engine when it ends.

    With `api_key`, /v1/ asks for it. A stall of `stalled_s` makes /health/decode answer 503.
    """
    service = Service(engine, name, words, int(time.time()))
    replies: Counter[tuple[str, int]] = Counter()

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(
        title=f"Partita: {name}",
        version=partita.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=life,
        responses=errors.EVERY,
    )
    errors.install(app)
    app.add_middleware(Gate, key=api_key, counts=replies)
    for made in (
        _models(service),
        completions.router(service),
        chat.router(service),
        tokens.router(service),
        health.router(service, stalled_s),
        metrics.router(service, replies),
    ):
        app.include_router(made)
    told = errors.document(app)
    app.openapi = lambda: told
    return app


def _models(service: Service) -> APIRouter:
    made = APIRouter(tags=["OpenAI"])
    model = {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "partita",
        "max_model_len": service.max_len,
    }

    @made.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The one model."""
        return {"object": "list", "data": [model]}

    @made.get("/v1/models/{name:path}")
    async def one(name: str) -> dict[str, Any]:
        """The model by its name."""
        service.require_model(name)
        return model

    @made.post("/v1/requests/{key}/cancel")
    async def cancel(key: str) -> dict[str, Any]:
        """Ends a request by the id of its reply; its choices end as "abort"."""
        found = service.live.get(key)
        if found is None:
            raise ApiError(404, f"no request {key!r} runs", param="id")
        found.cancel()
        return {"id": key, "object": "request", "cancelled": True}

    return made
