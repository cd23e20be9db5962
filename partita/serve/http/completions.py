"""POST /v1/completions: prompts as texts or token ids, continued."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from partita.serve.http import sse
from partita.serve.http.logprobs import Columns
from partita.serve.http.prompts import prompt_ids
from partita.serve.http.replies import Replies, Service
from partita.serve.http.sampling import of_completion
from partita.serve.http.schema import CompletionRequest
from partita.serve.request import Delta, Output


def router(service: Service) -> APIRouter:
    """The route over `service`."""
    made = APIRouter(tags=["OpenAI"])

    @made.post("/v1/completions", responses=sse.STREAMED)
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continues each prompt `n` times; a stream of chunks where asked for."""
        service.require_model(body.model)
        prompts = await run_in_threadpool(prompt_ids, service.words, body.prompt)
        replies = await Replies.begin(service, "cmpl", prompts, of_completion(body))
        answer = _Answer(service, body, replies, prompts)
        if body.stream:
            return sse.respond(answer.chunks(), replies.end)
        return JSONResponse(await answer.whole(request))

    return made


class _Answer:
    """How the choices of one request are told."""

    def __init__(
        self,
        service: Service,
        body: CompletionRequest,
        replies: Replies,
        prompts: Sequence[Sequence[int]],
    ) -> None:
        self.service, self.body, self.replies, self.prompts = service, body, replies, prompts
        self.head = replies.head("text_completion")
        self.columns = [Columns(service.spell) for _ in range(len(prompts) * body.choices)]

    async def whole(self, request: Request) -> dict[str, Any]:
        choices = []
        for number, output in enumerate(await self.replies.whole(request)):
            parts = [self._echo(number)] if self.body.echo else []
            choices.append(_joined([*parts, self._choice(number, output)]))
        return self.head | {"choices": choices, "usage": self.replies.usage()}

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """The prompt comes before its answer where it is echoed; usage last, where asked for."""
        echoed: set[int] = set()
        async for news in self.replies.deltas():
            if news is None:
                yield None
                continue
            number, delta = news
            if self.body.echo and number not in echoed:
                echoed.add(number)
                yield self.head | {"choices": [self._echo(number)]}
            told = self._choice(number, delta)
            for part in sse.apart(told, {"text": ""}, bool(delta.text or delta.token_ids)):
                yield self.head | {"choices": [part]}
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield self.head | {"choices": [], "usage": self.replies.usage()}

    def _choice(self, number: int, part: Delta | Output) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs is not None:
            logprobs = self.columns[number].of(part.logprobs or (), part.token_ids)
        return {
            "index": number,
            "text": part.text,
            "logprobs": logprobs,
            "finish_reason": part.finish_reason,
            "stop_reason": part.matched_stop,
        }

    def _echo(self, number: int) -> dict[str, Any]:
        """The prompt as the beginning of its answer."""
        place = number // self.body.choices
        ids, asked = self.prompts[place], self.body.prompt[place]
        logprobs = None
        if self.body.logprobs is not None:
            known = self.replies.streams[place].prompt_logprobs or (None,) * len(ids)
            logprobs = self.columns[number].of(known, ids)
        return {
            "index": number,
            "text": asked if isinstance(asked, str) else self.service.words.tokenizer.decode(ids),
            "logprobs": logprobs,
            "finish_reason": None,
            "stop_reason": None,
        }


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One choice of its beginning and what follows."""
    whole = dict(parts[-1])
    whole["text"] = "".join(p["text"] for p in parts)
    if whole["logprobs"] is not None:
        columns = [p["logprobs"] for p in parts]
        whole["logprobs"] = {key: [x for c in columns for x in c[key]] for key in columns[0]}
    return whole
