"""Parts of the server that need none: calls in a text, words of a folder, prompts."""

import json

import pytest
import tokenizers
from tiny_folder import tiny_folder

from partita.serve.http.errors import ApiError
from partita.serve.http.prompts import NEXT_TURN, chat_ids, chat_stops
from partita.serve.http.schema import ChatRequest
from partita.serve.http.tools import Calls
from partita.serve.http.words import Words, words_of
from partita.train.data.tokenizer import Tokenizer

ANSWER = (
    'Let me see <b>.\n<tool_call>\n{"name": "f", "arguments": {"x": "é<tool"}}\n</tool_call>'
    "<tool_call>no call</tool_call> and <tool_call>{"
)


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_calls_are_found_however_a_text_comes(step):
    calls = Calls()
    parts = [calls.feed(ANSWER[i : i + step]) for i in range(0, len(ANSWER), step)]
    text = "".join(said for said, _ in parts) + calls.rest()
    found = [call for _, several in parts for call in several]
    assert text == "Let me see <b>.\n<tool_call>no call</tool_call> and <tool_call>{"
    assert [(c.name, json.loads(c.arguments)) for c in found] == [("f", {"x": "é<tool"})]
    told = found[0].told(0)
    assert told["id"].startswith("call_") and told["function"]["name"] == "f"


def test_a_folder_says_what_ends_an_answer_and_begins_a_prompt(tmp_path):
    folder = tiny_folder(tmp_path / "tiny")
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 0, 9999]}')
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    inner.save(str(folder / "tokenizer.json"))
    words = words_of(folder)
    assert (words.name, words.ends) == ("tiny", (7, 0))
    assert words.tokenizer.encode("a", words.special) == [0, *words.tokenizer.encode("a")]


def test_tools_go_through_the_template_or_are_refused(tmp_path):
    words = words_of(tiny_folder(tmp_path / "tiny"))
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    hi = [{"role": "developer", "content": "hi"}]
    body = ChatRequest.model_validate({"messages": hi, "tools": [tool]})
    expected = f"<tool>{json.dumps(tool)}</tool>\n<system>hi\n<assistant>"
    assert words.tokenizer.decode(chat_ids(words, body)) == expected
    plain = Words("x", Tokenizer("byte"), False, ())
    with pytest.raises(ApiError, match="chat template"):
        chat_ids(plain, body)
    none = ChatRequest.model_validate({"messages": hi, "tools": [tool], "tool_choice": "none"})
    assert bytes(chat_ids(plain, none)) == b"system: hi\nassistant: "
    assert (chat_stops(plain), chat_stops(words)) == ((NEXT_TURN,), ())
