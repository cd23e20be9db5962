"""The server on a real port, a real model behind it, asked by OpenAI's client."""

import codecs
import json
import socket
import threading
import time
from contextlib import closing

import httpx
import openai
import pytest
import torch
import uvicorn
from tiny_folder import MAX_LEN, tiny_folder

from partita.serve.engine import Engine
from partita.serve.http.app import create_app
from partita.serve.http.server import address_of, bound
from partita.serve.http.words import Words, words_of
from partita.serve.runner import Ready, open_runner
from partita.train.data.tokenizer import Tokenizer

CANARY = {"prompt": "the cat", "max_tokens": 8, "temperature": 0}
HI = [{"role": "user", "content": "hi"}]


class Server:
    """uvicorn in a thread."""

    def __init__(self, app) -> None:
        self.listener = bound("127.0.0.1", 0)
        self.url = address_of(self.listener)
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on"))
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.listener],))
        self.listener.listen()
        self.thread.start()
        self.raw = httpx.Client(base_url=self.url, timeout=30)
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="k", max_retries=0, timeout=30
        )

    def close(self) -> None:
        self.raw.close()
        self.client.close()
        self.uvicorn.should_exit = True
        self.thread.join()
        self.listener.close()

    def number(self, name: str) -> float:
        lines = self.raw.get("/metrics").text.splitlines()
        found = (float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))
        return next(found, 0.0)

    def waits(self, until) -> None:
        end = time.monotonic() + 30
        while not until():
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.01)

    def settles(self) -> None:
        """Waits until nothing runs; every page is free then."""
        names = ("partita_requests_running", "partita_requests_waiting")
        self.waits(lambda: not any(map(self.number, names)))
        assert self.number("partita_pages_free") == self.number("partita_pages")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


class Paced:
    """A runner that waits once `left` steps are done, so that what they are part of is still under way."""

    def __init__(self, inner) -> None:
        self.inner, self.left, self.changed = inner, None, threading.Condition()
        self.vocab, self.max_len = inner.vocab, inner.max_len
        self.pages, self.page_size, self.depth = inner.pages, inner.page_size, inner.depth

    def allow(self, steps) -> None:
        with self.changed:
            self.left = steps
            self.changed.notify_all()

    def start(self, pieces):
        with self.changed:
            self.changed.wait_for(lambda: self.left is None or self.left > 0)
            self.left = None if self.left is None else self.left - 1
        return self.inner.start(pieces)

    def close(self) -> None:
        self.inner.close()


@pytest.fixture(scope="module")
def runner(folder):
    with closing(Paced(open_runner(folder, pages=64))) as made:
        yield made


@pytest.fixture(scope="module")
def served(folder, runner):
    words = words_of(folder)
    sizes = {"max_batch_tokens": 64, "max_sequences": 8, "max_waiting": 40}
    engine = Engine(runner, words.tokenizer, **sizes)
    with closing(Server(create_app(engine, "tiny", words))) as server:
        yield server


@pytest.fixture
def paced(runner):
    """Three steps may be done, and no more until the test allows them."""
    runner.allow(3)
    yield runner
    runner.allow(None)


@pytest.fixture(scope="module")
def client(served):
    return served.client


def text_of(chunks) -> str:
    return "".join(c.choices[0].text for c in chunks if c.choices)


def test_a_folder_is_a_model(client, served):
    assert [m.id for m in client.models.list().data] == ["tiny"]
    assert client.models.retrieve("tiny").max_model_len == MAX_LEN
    assert client.completions.create(model="tiny", **CANARY).choices[0].finish_reason == "length"
    with pytest.raises(openai.NotFoundError) as error:
        client.completions.create(model="gpt-9", prompt="a")
    assert (error.value.code, error.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize("prompt", ["the cat", "é 日本 🎉", "a"])
def test_a_stream_says_what_a_plain_reply_says(client, prompt):
    asked = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0}
    plain = client.completions.create(**asked)
    chunks = list(
        client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    assert text_of(chunks) == plain.choices[0].text != ""
    assert len({(c.id, c.model, c.created) for c in chunks}) == 1
    *told, last = chunks
    ends = [c.choices[0].finish_reason for c in told]
    assert ends == [None] * (len(told) - 1) + ["length"] and told[-1].choices[0].text == ""
    assert last.choices == [] and last.usage.completion_tokens == 40
    assert last.usage.prompt_tokens == plain.usage.prompt_tokens
    assert {c.usage for c in told} == {None}


def test_a_chat_streams_who_speaks_once(client):
    asked = {"model": "tiny", "messages": HI, "max_tokens": 12, "temperature": 0}
    plain = client.chat.completions.create(**asked).choices[0].message
    chunks = list(client.chat.completions.create(**asked, stream=True))
    deltas = [c.choices[0].delta for c in chunks]
    assert [d.role for d in deltas] == ["assistant"] + [None] * (len(deltas) - 1)
    assert "".join(d.content or "" for d in deltas) == plain.content
    assert deltas[-1].content is None and chunks[-1].choices[0].finish_reason == "length"
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    other = {**asked, "messages": [{"role": "user", "content": parts}]}
    assert client.chat.completions.create(**other).choices[0].message == plain


def test_a_text_is_cut_at_a_stop_and_none_of_it_leaks(client):
    asked = {"model": "tiny", "prompt": "the cat", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[6:9]
    cut = whole[: whole.index(stop)]
    choice = client.completions.create(**asked, stop=stop).choices[0]
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (cut, "stop", stop)
    chunks = list(client.completions.create(**asked, stop=[stop, "never"], stream=True))
    assert text_of(chunks) == cut and chunks[-1].choices[0].finish_reason == "stop"


def test_many_prompts_in_every_form(client):
    ids = client.completions.create(model="tiny", **CANARY, logprobs=0)
    one = ids.choices[0].text
    several = client.completions.create(
        model="tiny", **{**CANARY, "prompt": ["the cat", "a dog", "the cat"]}
    )
    texts = [c.text for c in several.choices]
    assert [c.index for c in several.choices] == [0, 1, 2]
    assert texts[0] == texts[2] == one != texts[1]
    token_ids = [[5, 6, 7], [8]]
    lists = client.completions.create(model="tiny", **{**CANARY, "prompt": token_ids})
    single = client.completions.create(model="tiny", **{**CANARY, "prompt": token_ids[0]})
    assert len(lists.choices) == 2 and lists.choices[0].text == single.choices[0].text
    chunks = client.completions.create(
        model="tiny", prompt=["the cat", "a dog"], max_tokens=5, n=2, stream=True, seed=3
    )
    ends = [(c.choices[0].index, c.choices[0].finish_reason) for c in chunks]
    assert sorted(i for i, end in ends if end) == [0, 1, 2, 3]


def test_seeds_and_choices(client):
    asked = {
        "model": "tiny",
        "prompt": "a",
        "max_tokens": 12,
        "n": 3,
        "temperature": 1.5,
        "seed": 7,
    }
    first, again = (client.completions.create(**asked).choices for _ in range(2))
    assert [c.text for c in first] == [c.text for c in again]
    assert len({c.text for c in first}) == 3


def test_a_text_and_its_ids(served):
    told = served.raw.post("/tokenize", json={"prompt": "the cat é"}).json()
    assert told["count"] == len(told["tokens"]) > 0 and told["max_model_len"] == MAX_LEN
    back = served.raw.post("/detokenize", json={"tokens": told["tokens"]})
    assert back.json() == {"prompt": "the cat é"}
    used = served.raw.post("/v1/completions", json=CANARY).json()["usage"]["prompt_tokens"]
    assert used == served.raw.post("/tokenize", json={"prompt": CANARY["prompt"]}).json()["count"]
    wrong = served.raw.post("/detokenize", json={"tokens": [1, 1 << 40]})
    assert wrong.status_code == 400 and "none of the model's" in wrong.json()["error"]["message"]


def test_logprobs_of_completions(client):
    asked = {"model": "tiny", "prompt": "the cat", "max_tokens": 6, "temperature": 0}
    choice = client.completions.create(**asked, logprobs=2).choices[0]
    found = choice.logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 6
    for chosen, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert chosen == max(top.values()) < 0 and len(top) == 2
    chosen = client.completions.create(**asked, logprobs=0).choices[0].logprobs
    assert chosen.token_logprobs == found.token_logprobs
    echo = client.completions.create(**{**asked, "max_tokens": 0}, echo=True, logprobs=1).choices[0]
    assert echo.text == "the cat" == "".join(echo.logprobs.tokens)
    assert echo.logprobs.token_logprobs[0] is None
    assert all(p < 0 for p in echo.logprobs.token_logprobs[1:])
    both = client.completions.create(**asked, echo=True, logprobs=2).choices[0]
    assert both.text == "the cat" + choice.text
    assert both.logprobs.token_logprobs[-6:] == pytest.approx(found.token_logprobs, abs=1e-5)


def test_logprobs_of_chats_join_to_the_content(client):
    found = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=20, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    joined = b"".join(bytes(t.bytes) for t in found.logprobs.content)
    half_ends = codecs.getincrementaldecoder("utf-8")("replace")  # no text, where the limit cuts it
    assert half_ends.decode(joined) == found.message.content
    assert all(len(t.top_logprobs) == 2 for t in found.logprobs.content)
    chunks = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=20, temperature=0, logprobs=True, stream=True
    )
    told = [c.choices[0] for c in chunks if c.choices[0].finish_reason is None][1:]
    assert "".join(c.delta.content or "" for c in told) == found.message.content
    ids = [t.bytes for c in told for t in c.logprobs.content]
    assert ids == [t.bytes for t in found.logprobs.content]


def test_an_answer_satisfies_its_schema(client):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99, "minimum": 0}},
        "required": ["a"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    said = client.chat.completions.create(
        model="tiny", messages=HI, max_tokens=100, response_format=wanted, seed=1
    )
    assert 0 <= json.loads(said.choices[0].message.content)["a"] <= 99
    assert said.choices[0].finish_reason == "stop"


RIGHT = {"prompt": "a", "max_tokens": 2}
NO_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
HOSTILE = [
    ("completions", b"{", "no JSON"),
    ("completions", b"[]", "must be a JSON object"),
    ("completions", b"null", "must be a JSON object"),
    ("completions", b"\xff\xfe{", "read as JSON"),
    ("completions", b"[" * 3000, "read as JSON"),
    ("completions", b'{"prompt": "\\ud83d"}', "lone surrogate"),
    ("chat/completions", {"messages": "x"}, "messages: "),
    ("chat/completions", {"messages": []}, "messages: "),
    ("chat/completions", {"messages": [{"role": "user"}]}, "needs a content"),
    ("chat/completions", {"messages": HI, "tool_choice": "required"}, "tool_choice"),
    ("completions", {**RIGHT, "max_tokens": -1}, "max_tokens"),
    ("completions", {**RIGHT, "max_tokens": MAX_LEN}, "at most 255"),
    ("completions", {"prompt": "a " * 9000}, f"the model sees {MAX_LEN}"),
    ("completions", {"prompt": []}, "prompt"),
    ("completions", {"prompt": [[1], []]}, "prompt"),
    ("completions", {"prompt": [1 << 40]}, "none of the model's"),
    ("completions", {**RIGHT, "logprobs": 21}, "0 to 20"),
    ("completions", {**RIGHT, "logprobs": 21, "stream": True}, "0 to 20"),
    ("completions", {**RIGHT, "stream_options": {"include_usage": True}}, "stream = true"),
    ("completions", {**RIGHT, "suffix": "b"}, "suffix: this server does not support it"),
    ("completions", {**RIGHT, "logit_bias": {"x": 1}}, "no token id"),
    ("completions", {**RIGHT, "temprature": 1}, "temprature: this server knows no such field"),
    ("completions", b'{"prompt": "a", "temperature": NaN}', "finite number"),
    ("completions", {**RIGHT, "response_format": {"type": "json_schema"}}, "json_schema"),
    ("completions", {**RIGHT, "response_format": NO_SCHEMA}, "response_format: "),
]


def test_what_cannot_be_is_refused_and_harms_nobody_else(served):
    """Every refusal is an error object; behind each one a canary's reply is what it was."""
    before = served.raw.post("/v1/completions", json=CANARY).json()["choices"]
    for path, body, told in HOSTILE:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        kind = {"Content-Type": "application/json"}
        reply = served.raw.post(f"/v1/{path}", content=content, headers=kind)
        error = reply.json()["error"]
        assert reply.status_code == 400, (body, reply.text)
        assert error["type"] == "invalid_request_error" and told in error["message"], (body, error)
        assert served.raw.post("/v1/completions", json=CANARY).json()["choices"] == before
    served.settles()


def test_all_problems_are_told_at_once(served):
    body = {"prompt": 1, "temperature": "hot", "stream": "yes", "foo": 1}
    message = served.raw.post("/v1/completions", json=body).json()["error"]["message"]
    assert message.startswith("4 problems: ")
    assert all(key in message for key in body)
    body = {"prompt": "a", "temperature": -1, "top_p": 3}
    message = served.raw.post("/v1/completions", json=body).json()["error"]["message"]
    assert message.startswith("2 problems: ") and "top_p" in message


def test_other_refusals(served):
    assert served.raw.get("/nothing").json()["error"]["message"].startswith("GET /nothing")
    other = served.raw.get("/v1/completions")
    assert (other.status_code, other.headers["Allow"]) == (405, "POST")
    form = served.raw.post(
        "/v1/completions", content='{"prompt": "a"}'
    )  # another site's page can send it
    assert form.status_code == 400 and "application/json" in form.json()["error"]["message"]
    long = served.raw.post("/v1/completions", content=iter([b"a" * (1 << 20)] * 9))
    assert long.status_code == 413 and "error" in long.json()
    many = served.raw.post("/v1/completions", json={**RIGHT, "n": 41})  # of 40 that may wait
    assert many.status_code == 429 and many.headers["Retry-After"] == "1"
    assert many.json()["error"]["code"] == "overloaded"


LONG = {"prompt": "the cat", "max_tokens": 240, "ignore_eos": True}


def aborted(served) -> float:
    return served.number('partita_finished_total{reason="abort"}')


def test_who_leaves_a_stream_frees_what_he_held(served, paced):
    before = aborted(served)
    with served.raw.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
        lines = stream.iter_lines()  # an iterator that is let go of closes the connection
        next(lines)
        assert served.number("partita_pages_free") < served.number("partita_pages")
    served.waits(lambda: not served.number("partita_http_open"))
    paced.allow(None)
    served.settles()
    assert aborted(served) == before + 1


def test_who_leaves_a_plain_reply_frees_what_he_held(served, paced):
    before = aborted(served)
    body = json.dumps({**LONG, "n": 3})
    head = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with closing(socket.create_connection(served.listener.getsockname())) as connection:
        connection.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}{body}".encode())
        served.waits(lambda: served.number("partita_http_open"))
    served.waits(lambda: not served.number("partita_http_open"))
    paced.allow(None)
    served.settles()
    assert aborted(served) == before + 3


def test_a_request_is_cancelled_by_its_id(served, client, paced):
    chunks = client.completions.create(model="tiny", prompt="a", max_tokens=240, stream=True)
    key = next(chunks).id
    assert served.raw.post(f"/v1/requests/{key}/cancel").json()["cancelled"]
    paced.allow(None)
    assert [c.choices[0].finish_reason for c in chunks][-1] == "abort"
    served.waits(lambda: not served.number("partita_http_open"))
    assert served.raw.post(f"/v1/requests/{key}/cancel").status_code == 404
    served.settles()


def test_the_document_says_what_replies_are(served):
    """Refusals of every kind, streams, and text that is no JSON; what a fuzzer would hold replies to."""
    paths = served.raw.get("/openapi.json").json()["paths"]
    assert len(paths) == 10
    for path, operations in paths.items():
        for operation in operations.values():
            assert {"200", "400", "401", "404", "429", "503"} < operation["responses"].keys()
            assert "422" not in operation["responses"], path
    kinds = {
        path: paths[path]["post" if "v1" in path else "get"]
        for path in ("/v1/completions", "/metrics")
    }
    found = [operation["responses"]["200"]["content"].keys() for operation in kinds.values()]
    assert found == [{"application/json", "text/event-stream"}, {"text/plain"}]


def test_health_and_metrics(served):
    assert served.raw.get("/health").json() == {"status": "ok"}
    before = served.number("partita_generated_tokens_total")
    assert served.raw.get("/health/decode").json() == {"status": "ok"}
    assert served.number("partita_generated_tokens_total") == before + 1
    assert served.raw.post("/v1/completions", json={}).status_code == 400
    text = served.raw.get("/metrics").text
    for name in ("num_requests_running", "kv_cache_usage_perc", "generation_tokens_total"):
        assert f'vllm:{name}{{model_name="tiny"}}' in text
    assert 'partita_http_replies_total{path="/v1/completions",status="400"}' in text


class Faulty:
    """A runner that always says "a", until it is broken."""

    def __init__(self) -> None:
        self.vocab, self.max_len, self.pages, self.page_size, self.depth = 256, 64, 16, 4, 1
        self.broken = ""

    def start(self, pieces):
        if self.broken:
            raise RuntimeError(self.broken)
        rows = torch.tensor([97] * sum(p.want for p in pieces))
        return Ready(torch.nn.functional.one_hot(rows, 256) * 1.0)

    def close(self) -> None:
        """Nothing is held."""


def test_a_lost_model_never_ends_a_stream_as_if_it_were_whole():
    faulty = Faulty()
    runner = Paced(faulty)
    tokenizer = Tokenizer("byte")
    engine = Engine(runner, tokenizer, max_batch_tokens=16, max_sequences=2)
    words = Words("x", tokenizer, False, ())
    with closing(Server(create_app(engine, "x", words, api_key="open", stalled_s=0.2))) as server:
        assert server.raw.get("/v1/models").status_code == 401
        assert server.raw.post("/tokenize", json={"prompt": "a"}).status_code == 401
        assert server.raw.get("/health").status_code == 200
        server.raw.headers["Authorization"] = "Bearer open"
        assert server.raw.get("/v1/models").status_code == 200
        runner.allow(0)
        assert server.raw.get("/health/decode").json()["status"] == "stalled"
        runner.allow(None)
        server.waits(lambda: server.raw.get("/health/decode").status_code == 200)
        server.settles()
        runner.allow(3)
        body = {"prompt": "a", "max_tokens": 60, "stream": True}
        with server.raw.stream("POST", "/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            next(lines)
            faulty.broken = "rank 1 was lost"
            runner.allow(None)
            events = [line for line in lines if line]
        assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_failed"
        assert "data: [DONE]" not in events
        assert server.raw.get("/health").status_code == 503
        assert server.raw.get("/health/decode").status_code == 503
        assert server.raw.post("/v1/completions", json=RIGHT).status_code == 503
