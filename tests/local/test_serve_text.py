"""Text as it comes: whole characters, nothing of a stop text, the same however tokens cut it."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.base.errors import UsageError
from partita.serve.grammar import Grammars
from partita.serve.request import Grammar, TokenLogprob
from partita.serve.text import Vocabulary, Writer
from partita.train.data.sources import open_text
from partita.train.data.token_bytes import byte_alphabet
from partita.train.data.tokenizer import Tokenizer, open_tokenizer

LESSON = "the cat sat on the mat, Ж€𝄞 naïve façade; " * 60 + '{"name": "cat", "legs": 4} ' * 40


@pytest.fixture(scope="module")
def bpe(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(LESSON)
    return open_tokenizer(
        "train:330", vocab=330, source=open_text(str(path), key="data.source", eval_fraction=0.2)
    )


def sentencepiece() -> Tokenizer:
    """Blanks as ▁, bytes as <0x0A>, as Llama 2's file has them."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "▁the", "cat"]
    inner = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True
        )
    )
    inner.add_special_tokens(["<s>", "</s>"])
    parts = tokenizers.decoders
    inner.decoder = parts.Sequence(
        [parts.Replace("▁", " "), parts.ByteFallback(), parts.Fuse(), parts.Strip(" ", 1, 0)]
    )
    return Tokenizer("sentencepiece", inner)


def written(writer: Writer, ids) -> list[str]:
    """The text of each step, and of the end."""
    found = []
    for i in ids:
        writer.push(i)
        if writer.matched is not None:
            break
        found.append(writer.take()[0])
    return [*found, writer.take(last=True)[0]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 329), max_size=30))
def test_all_of_it_is_what_the_tokenizer_decodes(bpe, ids):
    """Any ids, valid UTF-8 or not; what is left open at the end is left out."""
    for tokenizer in (bpe, Tokenizer("byte")):
        mine = [i for i in ids if i < tokenizer.size]
        whole = tokenizer.decode(mine)
        text = "".join(written(Writer(Vocabulary(tokenizer), skip_special=False), mine))
        assert text == whole or (whole.startswith(text) and whole[len(text) :] == "�")


@pytest.mark.parametrize("text", ["naïve Ж€𝄞!", "👩‍👩‍👧 e\u0301", "\ufffd stays"])
def test_no_half_character_is_told(bpe, text):
    for tokenizer in (bpe, Tokenizer("byte")):
        parts = written(Writer(Vocabulary(tokenizer)), tokenizer.encode(text))
        assert "".join(parts) == text
        assert all(text.count("\ufffd") >= part.count("\ufffd") for part in parts)


def test_pieces_of_sentencepiece_and_of_marks(bpe):
    other = sentencepiece()
    pieces = other.pieces()
    assert pieces[3 + 0xE2] == b"\xe2" and pieces[-2:] == [b" the", b"cat"]
    assert other.specials == {1, 2} and bpe.specials == {0}
    euro = [3 + b for b in "€".encode()]
    ids = [260, 261, *euro]
    assert "".join(written(Writer(Vocabulary(other)), ids)) == " thecat€"
    assert other.decode(ids) == "thecat€"  # at the beginning of a text the blank goes
    parts = written(Writer(Vocabulary(bpe)), [0, *bpe.encode("cat"), 0])
    assert "".join(parts) == "cat"
    shown = written(Writer(Vocabulary(bpe), skip_special=False), [0])
    assert shown[0] == "<|endoftext|>"
    assert Vocabulary(bpe).bytes_of(5000) == b""


def test_the_alphabet_of_bytes_is_the_librarys():
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    made = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in ("a b\n\t", "Ж€𝄞", "\x00\x7f\xa0\xad"):
        (word,) = ["".join(w for w, _ in made.pre_tokenize_str(text))]
        assert bytes(alphabet[c] for c in word) == text.encode()


@settings(max_examples=60, deadline=None)
@given(
    st.text("ab.", max_size=16),
    st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_a_stop_text_is_met_where_it_first_ends_and_nothing_of_it_is_told(text, stops):
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
    writer = Writer(Vocabulary(Tokenizer("byte")), stops)
    parts = written(writer, text.encode())
    if ends:
        _, at, stop = min(ends)
        assert "".join(parts) == text[:at] and writer.matched == stop
    else:
        assert "".join(parts) == text and writer.matched is None
    for count in range(len(parts) - 1):  # all is told but what may become a stop text
        told, seen = "".join(parts[: count + 1]), text[: count + 1]
        may = [n for s in stops for n in range(1, len(s)) if seen.endswith(s[:n])]
        assert told == seen[: len(seen) - max(may, default=0)]


def test_tokens_come_with_the_text_that_they_end():
    byte, entries = Tokenizer("byte"), {}
    writer = Writer(Vocabulary(byte), ["xyz"])
    told = []
    for i, value in enumerate("aéxyb".encode() + b"!xyz"):
        entries[i] = TokenLogprob(value, -float(i))
        writer.push(value, entries[i])
        told.append(writer.take())
    assert [text for text, _ in told] == ["a", "", "é", "", "", "xyb", "!", "", "", ""]
    assert [len(tokens) for _, tokens in told] == [1, 1, 1, 0, 0, 3, 1, 0, 0, 0]
    kept = [token for _, tokens in told for token in tokens]
    assert kept == [(e.token, e) for e in list(entries.values())[:7]]


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "legs": {"type": "integer"}},
    "required": ["name", "legs"],
    "additionalProperties": False,
}


def test_a_grammar_allows_what_follows_it_and_nothing_else(bpe):
    pytest.importorskip("llguidance")
    words = Vocabulary(bpe)
    grammars = Grammars(words, 340, bpe.end)  # ids that the tokenizer lacks are never allowed
    first = grammars.start(Grammar("json_schema", json.dumps(SCHEMA)))
    good = bpe.encode('{"name": "cat", "legs": 4}')
    state = first.fresh()
    for token in good:
        mask = state.mask()
        assert len(mask) == 340 and mask[token] and not mask[330:].any() and not mask[0]
        state.accept(token)
    assert state.mask()[0]  # now it may end
    state.accept(0)
    assert state.is_done
    other = first.fresh()
    wrong = bpe.encode("cat")[0]
    assert not other.mask()[wrong] and not other.is_done
    with pytest.raises(UsageError, match="cannot follow"):
        other.accept(wrong)
    with pytest.raises(UsageError, match="json_schema"):
        grammars.start(Grammar("json_schema", "{"))
