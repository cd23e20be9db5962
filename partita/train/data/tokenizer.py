"""Tokenizers: bytes, a tokenizer.json, or one trained on the source, all through one small class.

byte            ids are bytes; a record ends with a newline
train:N         byte-level BPE of N ids, trained on the training part, cached by digest
a path          a tokenizer.json of the tokenizers library, with the chat template beside it
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import tokenizers
import xxhash

from partita.base.errors import DataError, UsageError
from partita.train.data.chat import Chat, chat_beside
from partita.train.data.sources import TextSource
from partita.train.data.token_bytes import pieces_of

END = "<|endoftext|>"
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")
BYTES = 256
SMALLEST = BYTES + 1  # every byte, and the end of a record
OLDER = ("tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")  # what folders held before
TRAINED_ON = 1 << 24  # characters: what a vocabulary is learned from, at most
KEY = "data.tokenizer"


class Tokenizer:
    """Text to ids and back. `digest` tells tokenizers apart; `end` is what closes a record.

    Without a library tokenizer inside, ids are bytes. `chat` writes messages as text.
    """

    def __init__(
        self, name: str, inner: tokenizers.Tokenizer | None = None, chat: Chat | None = None
    ) -> None:
        self.name, self.chat = name, chat or Chat()
        self._inner = inner
        self.end: tuple[int, ...] = (10,)
        self.size = BYTES
        self.digest = "byte"
        if inner is not None:
            inner.no_truncation()  # what a file says of batches is not of its text
            inner.no_padding()
            words = [w for w in (*ENDS, self.chat.end) if inner.token_to_id(w) is not None][:1]
            self.end = tuple(inner.token_to_id(word) for word in words)
            self.size = 1 + max(inner.get_vocab(with_added_tokens=True).values(), default=-1)
            stated = "".join(word for word in words if word not in ENDS)  # not by the file itself
            self.digest = xxhash.xxh3_128_hexdigest((inner.to_str() + stated).encode())

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`; nothing is added before or after, but where `special` what its file says."""
        return self.arrays([text], special)[0].tolist()

    def arrays(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
        """Ids of each text, as arrays. Raises DataError where the tokenizer has none for some text."""
        if self._inner is None:
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]
        try:
            found = self._inner.encode_batch_fast(texts, add_special_tokens=special)
        except Exception as error:  # the library raises bare Exception
            text = f"{KEY} = {self.name!r} cannot read the text: {error}"
            raise DataError(text, file=self.name, key=KEY) from error
        return [np.asarray(e.ids, np.uint32) for e in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; bytes that are no character, and ids beyond the vocabulary, read �."""
        if self._inner is None:
            return b"".join(bytes([i]) if 0 <= i < BYTES else "�".encode() for i in ids).decode(
                errors="replace"
            )
        return self._inner.decode([i for i in ids if i < self.size], skip_special_tokens=False)

    @property
    def specials(self) -> frozenset[int]:
        """Ids that are marks, no text."""
        known = {} if self._inner is None else self._inner.get_added_tokens_decoder()
        return frozenset(i for i, word in known.items() if word.special)

    def id_of(self, words: Sequence[str]) -> int | None:
        """The id of the first of these words that it has as one token."""
        ids = () if self._inner is None else map(self._inner.token_to_id, words)
        return next((i for i in ids if i is not None), None)

    def pieces(self) -> list[bytes]:
        """What each id stands for, in UTF-8; of an id that has no token, nothing."""
        if self._inner is None:
            return [bytes([i]) for i in range(BYTES)]
        return pieces_of(self._inner)

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json; UsageError for bytes, which need none."""
        if self._inner is None:
            raise UsageError("the byte tokenizer has no tokenizer.json", key=KEY)
        self._inner.save(str(path))

    def fingerprint(self) -> dict[str, object]:
        """What a resumed run must share."""
        found: dict[str, object] = {"name": self.name, "size": self.size, "digest": self.digest}
        return found | ({} if self.chat == Chat() else {"chat": self.chat.digest})


def open_tokenizer(
    name: str, *, vocab: int, source: TextSource | None = None, cache: Path | None = None
) -> Tokenizer:
    """The tokenizer a job names; `vocab` is the model's, which must hold every id.

    `source` is what train:N learns from, `cache` the folder where it is kept. Raises UsageError for
    a word or path that is none and one bigger than the model's vocabulary, DataError for a bad file.
    """
    if name == "byte":
        tokenizer = Tokenizer(name)
    elif name.startswith("train:"):
        tokenizer = Tokenizer(name, _trained(name, vocab, source, cache))
    else:
        path = _file(name)
        tokenizer = Tokenizer(name, _from_file(path), chat_beside(path))
    _check_size(name, tokenizer.size, vocab)
    return tokenizer


def _check_size(name: str, size: int, vocab: int) -> None:
    if size > vocab:
        raise UsageError(
            f"{KEY} = {name!r} has {size} ids, the model's vocabulary {vocab}: "
            f"set model.vocab to {size} or more, or take a smaller tokenizer",
            key=KEY,
        )


def _file(name: str) -> Path:
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.is_file() and any((path.parent / n).is_file() for n in OLDER):
            again = "AutoTokenizer.from_pretrained(F).save_pretrained(F)"
            text = f"{KEY} = {name!r}: it has no tokenizer.json; transformers writes one: {again}"
            raise UsageError(text, file=name, key=KEY)
    if not path.is_file():
        raise UsageError(
            f"{KEY} = {name!r}: no such file; accepted: byte, train:N, a path to a tokenizer.json",
            file=name,
            key=KEY,
        )
    return path


def _from_file(path: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise DataError(
            f"{path}: not a tokenizer.json: {error}", file=str(path), key=KEY
        ) from error


def _trained(
    name: str, vocab: int, source: TextSource | None, cache: Path | None
) -> tokenizers.Tokenizer:
    size = name.removeprefix("train:")
    if not size.isascii() or not size.isdigit() or int(size) < SMALLEST:
        raise UsageError(
            f"{KEY} = {name!r}: N is a number of at least {SMALLEST} (every byte, and the end of a "
            "record)",
            key=KEY,
        )
    if source is None:
        raise UsageError(f"{KEY} = {name!r} needs a text source to learn from", key=KEY)
    _check_size(name, int(size), vocab)
    if cache is None:
        return _train(int(size), source)
    what = f"{source.digest} {source.eval_fraction} {size} {tokenizers.__version__} {TRAINED_ON}"
    path = cache / "tokenizers" / f"{xxhash.xxh3_128_hexdigest(what.encode())}.json"
    with suppress(Exception):  # absent, or damaged: the library raises bare Exception
        return tokenizers.Tokenizer.from_file(str(path))
    made = _train(int(size), source)
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        write_whole(path, made.to_str().encode())
    return made


def _train(size: int, source: TextSource) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_lessons(source), trainer)
    return tokenizer


def _lessons(source: TextSource) -> Iterator[str]:
    left = TRAINED_ON
    for passage in source.passages("train"):
        for text in (passage.prompt, passage.text):
            yield text[:left]
            left -= len(text)
            if left <= 0:
                return


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
