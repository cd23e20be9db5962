"""The bytes behind each id of a tokenizer of the tokenizers library: what its decoder makes of one."""

from __future__ import annotations

import json
import re

import tokenizers

BLANK = "\u2581"  # SentencePiece's blank
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def pieces_of(tokenizer: tokenizers.Tokenizer) -> list[bytes]:
    """UTF-8 of each id; b"" of ids without a token.

    Byte-level vocabularies write a byte as a character of their alphabet; SentencePiece's a blank as ▁ and
    a byte as <0x0A>. Other decoders are asked for each token alone. A blank that a decoder drops at the
    beginning of a text stays: what a model writes stands behind something.
    """
    words = {i: word for word, i in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = {i: word.content for i, word in tokenizer.get_added_tokens_decoder().items()}
    kinds = _kinds(json.loads(tokenizer.to_str()).get("decoder"))
    alphabet = byte_alphabet()
    found = []
    for i in range(1 + max(words, default=-1)):
        word = words.get(i, "")
        if i in added:
            found.append(added[i].encode())
        elif "ByteLevel" in kinds:
            found.append(bytes(alphabet[c] for c in word if c in alphabet))
        elif kinds & {"Metaspace", "ByteFallback", "Replace"}:
            byte = BYTE.fullmatch(word)
            found.append(bytes.fromhex(byte[1]) if byte else word.replace(BLANK, " ").encode())
        else:
            found.append(tokenizer.decode([i], skip_special_tokens=False).encode())
    return found


def byte_alphabet() -> dict[str, int]:
    """Character -> byte of byte-level vocabularies: printable ones are themselves, the others follow each
    other in order."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    own = {c: ord(c) for c in alphabet if ord(c) < 256}
    others = [b for b in range(256) if b not in own.values()]
    return own | dict(zip([c for c in alphabet if c not in own], others, strict=True))


def _kinds(decoder: dict | None) -> set[str]:
    """Types of a decoder and of those it is made of."""
    if decoder is None:
        return set()
    return {decoder["type"]}.union(*map(_kinds, decoder.get("decoders", [])))
