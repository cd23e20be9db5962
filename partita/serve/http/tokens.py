"""POST /tokenize and /detokenize: a text as the ids that a prompt of it has, and back, in vLLM's form."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.concurrency import run_in_threadpool

from partita.serve.http.errors import ApiError
from partita.serve.http.prompts import prompt_ids
from partita.serve.http.replies import Service
from partita.serve.http.schema import DetokenizeRequest, TokenizeRequest


def router(service: Service) -> APIRouter:
    """Both routes over `service`."""
    made = APIRouter(tags=["tokens"])

    @made.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Ids of a text, what begins a prompt among them."""
        service.require_model(body.model)
        (ids,) = await run_in_threadpool(prompt_ids, service.words, [body.prompt])
        return {"count": len(ids), "max_model_len": service.max_len, "tokens": ids}

    @made.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, str]:
        """The text of ids."""
        service.require_model(body.model)
        size = service.engine.runner.vocab
        if wrong := [i for i in body.tokens if not 0 <= i < size]:
            text = f"tokens: id {wrong[0]} is none of the model's {size}"
            raise ApiError(400, text, param="tokens")
        text = await run_in_threadpool(service.words.tokenizer.decode, body.tokens)
        return {"prompt": text}

    return made
