"""A request's fields as the engine's SamplingParams."""

from __future__ import annotations

import json
from dataclasses import replace
from types import MappingProxyType

from partita.serve.http.schema import ChatRequest, CompletionRequest, Request, ResponseFormat
from partita.serve.request import Grammar, SamplingParams

SAME = (
    "temperature", "top_p", "min_p", "seed", "stop", "ignore_eos", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "n",
)  # fmt: skip


def of_completion(request: CompletionRequest) -> SamplingParams:
    """Of a completion; with `echo` the prompt's log-probabilities are asked for as the answer's are."""
    count = request.logprobs
    made = replace(
        _shared(request), logprobs=count, prompt_logprobs=count if request.echo else None
    )
    return made if request.max_tokens is None else replace(made, max_tokens=request.max_tokens)


def of_chat(request: ChatRequest, room: int, stops: tuple[str, ...] = ()) -> SamplingParams:
    """Of a chat, which `stops` end too; without a limit an answer may fill the `room` tokens that the prompt
    leaves it."""
    given = [x for x in (request.max_tokens, request.max_completion_tokens) if x is not None]
    count = (request.top_logprobs or 0) if request.logprobs else None
    made = _shared(request)
    limit = min(given, default=max(room, 1))
    return replace(made, max_tokens=limit, logprobs=count, stop=(*made.stop, *stops))


def _shared(request: Request) -> SamplingParams:
    given = {key: getattr(request, key) for key in SAME if getattr(request, key) is not None}
    bias = {int(key): value for key, value in (request.logit_bias or {}).items()}
    return SamplingParams(
        **given,
        top_k=0 if request.top_k in (None, -1) else request.top_k,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        logit_bias=MappingProxyType(bias),
        grammar=_grammar(request.response_format),
    )


def _grammar(wanted: ResponseFormat | None) -> Grammar | None:
    if wanted is None or wanted.type == "text":
        return None
    schema = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
    return Grammar("json_schema", json.dumps(schema))
