"""POST /v1/chat/completions: messages under the model's chat template, answered."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from partita.serve.http import sse
from partita.serve.http.logprobs import of_chat as logprobs_of
from partita.serve.http.prompts import chat_ids, chat_stops
from partita.serve.http.replies import Replies, Service
from partita.serve.http.sampling import of_chat
from partita.serve.http.schema import ChatRequest
from partita.serve.http.tools import Calls
from partita.serve.request import Delta, Output


def router(service: Service) -> APIRouter:
    """The route over `service`."""
    made = APIRouter(tags=["OpenAI"])

    @made.post("/v1/chat/completions", responses=sse.STREAMED)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answers the messages `n` times; a stream of chunks where asked for."""
        service.require_model(body.model)
        ids = await run_in_threadpool(chat_ids, service.words, body)
        params = of_chat(body, service.max_len - len(ids), chat_stops(service.words))
        replies = await Replies.begin(service, "chatcmpl", [ids], params)
        answer = _Answer(service, body, replies)
        if body.stream:
            return sse.respond(answer.chunks(), replies.end)
        return JSONResponse(await answer.whole(request))

    return made


class _Answer:
    """How the choices of one chat are told."""

    def __init__(self, service: Service, body: ChatRequest, replies: Replies) -> None:
        self.service, self.body, self.replies = service, body, replies
        self.choices = [_Choice(n, body.calls) for n in range(body.choices)]

    async def whole(self, request: Request) -> dict[str, Any]:
        outputs = await self.replies.whole(request)
        choices = [
            {
                "index": choice.number,
                "message": {"role": "assistant", "content": None, **choice.said(output)},
                **self._about(choice, output),
            }
            for choice, output in zip(self.choices, outputs, strict=True)
        ]
        usage = {"usage": self.replies.usage()}
        return self.replies.head("chat.completion") | {"choices": choices} | usage

    async def chunks(self) -> AsyncIterator[dict[str, Any] | None]:
        """A choice's first chunk says who speaks, its last how it ended; usage is behind them, if wanted."""
        head = self.replies.head("chat.completion.chunk")
        begun: set[int] = set()
        async for news in self.replies.deltas():
            if news is None:
                yield None
                continue
            number, delta = news
            if number not in begun:
                begun.add(number)
                yield head | {"choices": [_first(number)]}
            choice = self.choices[number]
            told = {"index": number, "delta": choice.said(delta), **self._about(choice, delta)}
            for part in sse.apart(told, {"delta": {}}, bool(told["delta"] or delta.token_ids)):
                yield head | {"choices": [part]}
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            yield head | {"choices": [], "usage": self.replies.usage()}

    def _about(self, choice: _Choice, part: Delta | Output) -> dict[str, Any]:
        logprobs = None
        if self.body.logprobs:
            logprobs = logprobs_of(part.logprobs or (), self.service.spell)
        called = part.finish_reason == "stop" and choice.called
        return {
            "logprobs": logprobs,
            "finish_reason": "tool_calls" if called else part.finish_reason,
            "stop_reason": part.matched_stop,
        }


class _Choice:
    """One answer while it comes: its text, and the calls in it where tools are given."""

    def __init__(self, number: int, calls: bool) -> None:
        self.number, self.called = number, 0
        self._calls = Calls() if calls else None

    def said(self, part: Delta | Output) -> dict[str, Any]:
        """What `part` adds, as a message or its delta holds it."""
        if self._calls is None:
            return {"content": part.text} if part.text or isinstance(part, Output) else {}
        text, found = self._calls.feed(part.text)
        text += self._calls.rest() if part.finish_reason is not None else ""
        told = [call.told(self.called + i) for i, call in enumerate(found)]
        self.called += len(found)
        text = "" if self.called and not text.strip() else text
        return ({"content": text} if text else {}) | ({"tool_calls": told} if told else {})


def _first(number: int) -> dict[str, Any]:
    said = {"role": "assistant", "content": ""}
    return {"index": number, "delta": said, "logprobs": None, "finish_reason": None}
