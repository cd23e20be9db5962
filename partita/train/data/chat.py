"""Chats as text: which part of it is the assistant's, under a tokenizer's own template or a plain one.

The answer to messages 0 .. i-1 is what the template writes for message i behind the prompt that a model
would be given for it:

    prompt = template(messages[:i], add_generation_prompt=True)
    answer = template(messages[:i + 1]) without prompt

Most templates only ever append, so that the turns of a chat make one text. Some write an earlier turn
otherwise once others follow (Qwen3 leaves its thinking out): there each answer stands behind its own
prompt, as it will when the model is asked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from partita.base.errors import DataError

CONFIG, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
ASSISTANT = "assistant"
Messages = Sequence[Mapping[str, Any]]
Render = Callable[..., str]  # (messages, asks), and tools where the template takes them


class ChatError(ValueError):
    """Messages that make no chat; the reader of the file adds where."""


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer, which is counted, and the text before it since the last one, which is not."""

    prompt: str
    answer: str


def plain(messages: Messages, asks: bool) -> str:
    """Without a template: 'user: Hello\\n', one line a message, 'assistant: ' asks for the next."""
    said = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
    return said + f"{ASSISTANT}: " * asks


@dataclass(frozen=True)
class Chat:
    """How messages become text. `digest` tells templates apart; `ends_records`: a chat is closed by the
    tokenizer's end of text, where no template says how it ends. `end`: what closes a record, as
    tokenizer_config.json names it. `takes_tools`: the template tells a model of functions it may call."""

    render: Render = field(default=plain, compare=False)
    digest: str = "plain"
    ends_records: bool = True
    end: str = field(default="", compare=False)
    takes_tools: bool = field(default=False, compare=False)

    def turns(self, messages: Messages) -> list[Turn]:
        """One for each answer, in order. Raises ChatError: a message without role and text, no answer,
        a template that refuses or that does not continue its own prompt."""
        said = [_checked(i, m) for i, m in enumerate(messages)]
        answers = [i for i, m in enumerate(said) if m["role"] == ASSISTANT]
        if not answers:
            raise ChatError(f"its {len(said)} messages hold no answer: none has role {ASSISTANT!r}")
        turns = [self._turn(said, i) for i in answers]
        before = [t.prompt + t.answer for t in turns[:-1]]
        if not all(t.prompt.startswith(x) for x, t in zip(before, turns[1:], strict=True)):
            return turns
        new = [t.prompt.removeprefix(x) for x, t in zip(before, turns[1:], strict=True)]
        return [turns[0], *(Turn(x, t.answer) for x, t in zip(new, turns[1:], strict=True))]

    def _turn(self, messages: Messages, number: int) -> Turn:
        prompt = self.render(messages[:number], True)
        whole = self.render(messages[: number + 1], False)
        if not whole.startswith(prompt):
            raise ChatError(
                f"message {number}: the template does not continue its own prompt, which ends "
                f"{prompt[-40:]!r}"
            )
        return Turn(prompt, whole.removeprefix(prompt))


def _checked(number: int, message: Mapping[str, Any]) -> Mapping[str, Any]:
    """The message with its content as one string."""
    role, content = message.get("role"), message.get("content")
    if isinstance(content, list) and all(isinstance(x, dict) for x in content):
        parts = [x.get("text") for x in content if x.get("type") == "text"]
        content = "".join(map(str, parts)) if len(parts) == len(content) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise ChatError(f"message {number} needs a role and a content of text")
    return {**message, "content": content}


def chat_beside(tokenizer: Path) -> Chat:
    """The template that lies beside a tokenizer.json, or the plain one. Raises DataError for a bad one."""
    config, own = tokenizer.with_name(CONFIG), tokenizer.with_name(TEMPLATE_FILE)
    stated = _config(config)
    template, file = stated.get("chat_template"), config
    if isinstance(template, list):
        named = {x.get("name"): x.get("template") for x in template if isinstance(x, dict)}
        template = named.get("default")
    if own.is_file():
        template, file = own.read_text(encoding="utf-8"), own
    words = {
        k: v["content"] if isinstance(v, dict) else v
        for k, v in stated.items()
        if k.endswith("_token") and isinstance(v.get("content") if isinstance(v, dict) else v, str)
    }
    end = words.get("eos_token", "")
    if template is None:
        return Chat(end=end)
    if not isinstance(template, str):
        raise DataError(f"{file}: chat_template is no text", file=str(file), key="data.tokenizer")
    takes_tools = re.search(r"\btools\b", template) is not None
    render = _compiled(template, words, file)
    return Chat(render, _digest(template, words), False, end, takes_tools)


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path}: not JSON: {error}", file=str(path), key="data.tokenizer"
        ) from error
    return found if isinstance(found, dict) else {}


def _digest(template: str, words: Mapping[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps([template, words], sort_keys=True).encode())


def _compiled(template: str, words: Mapping[str, str], file: Path) -> Render:
    """The template as transformers compiles it, in a sandbox; `strftime_now` is left undefined, so that
    a text does not depend on the day it is read."""
    from jinja2 import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = refuse
    try:
        made = environment.from_string(_without_generation(template))
    except TemplateError as error:
        raise DataError(
            f"{file}: its chat template does not compile: {error}",
            file=str(file),
            key="data.tokenizer",
        ) from error

    given = {"documents": None, **words}  # defined, as transformers has it

    def render(messages: Messages, asks: bool, tools: Messages = ()) -> str:
        known = {**given, "tools": list(tools) or None}
        try:
            return made.render(**known, messages=messages, add_generation_prompt=asks)
        except Exception as error:  # a template may do anything that its sandbox lets it
            raise ChatError(f"the chat template refuses it: {error}") from error

    return render


def _without_generation(template: str) -> str:
    """{% generation %} marks answers for transformers and writes nothing."""
    opened = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", opened)
