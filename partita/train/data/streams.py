"""A stream: one long row of token ids, its counted targets and documents, cut into sequences.

Sequence k of length L is tokens[k*L : k*L + L + 1]: inputs the first L, targets the last L; where tokens are
guessed from those around them (masked.py) it is L tokens, inputs and targets alike. A target is counted
unless its mask is 0, it is -100, or its document differs from its input's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from partita.base.errors import DataError, UsageError
from partita.train.data import megatron

TOKENS = "tokens:"
IDX = "idx"  # data.documents: those of a Megatron index
MAGIC = b"\x93NUMPY"  # how a .npy begins
IGNORED = -100
CHUNK = 1 << 22  # ids looked at at once


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences [b, S]: ids and targets int64, `valid` bool where a target is counted.

    Targets that are not counted are 0. `documents` int64 [b, S] holds each input's document, or
    None where there is one alone.
    """

    ids: Tensor
    targets: Tensor
    valid: Tensor
    documents: Tensor | None = None


@dataclass(frozen=True)
class Spans:
    """Each token's document, by where documents start: indexed as the array [n] it stands for."""

    starts: np.ndarray  # ascending
    length: int
    first: int = 0

    dtype = np.dtype(np.int64)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, places: np.ndarray | slice) -> np.ndarray:
        if isinstance(places, slice):
            places = np.arange(*places.indices(self.length))
        return np.searchsorted(self.starts, places + self.first, side="right")


@dataclass(frozen=True)
class Stream:
    """Ids [n] (any integer type, perhaps a file mapped to memory), mask and documents [n] or None; targets
    lie `ahead` tokens behind inputs, 1 or 0."""

    ids: np.ndarray
    mask: np.ndarray | None = None
    documents: np.ndarray | Spans | None = None
    ahead: int = 1

    def split(self, at: int) -> tuple[Stream, Stream]:
        """The first `at` tokens, and the others."""
        held = self.documents
        if isinstance(held, Spans):
            before: Any = Spans(held.starts, at, held.first)
            after: Any = Spans(held.starts, len(self.ids) - at, held.first + at)
        else:
            before, after = _cut(held, at)
        (a, b), (mask_a, mask_b) = _cut(self.ids, at), _cut(self.mask, at)
        first = replace(self, ids=a, mask=mask_a, documents=before)
        return first, replace(self, ids=b, mask=mask_b, documents=after)

    def num_sequences(self, length: int) -> int:
        """floor((n - ahead) / length)."""
        return max(0, len(self.ids) - self.ahead) // length

    def batch(self, sequences: Sequence[int], length: int) -> Batch:
        """The sequences of these numbers, in this order."""
        first = np.asarray(sequences, np.int64)[:, None] * length
        ahead = self.ahead
        window = first + np.arange(length + ahead)
        raw = self.ids[window].astype(np.int64)
        valid = raw[:, ahead:] != IGNORED
        if self.mask is not None:
            valid &= self.mask[window[:, ahead:]] != 0
        documents = None
        if self.documents is not None:
            held = self.documents[window].astype(np.int64)
            valid &= held[:, ahead:] == held[:, :length]
            documents = torch.from_numpy(np.ascontiguousarray(held[:, :length]))
        ids = np.where(raw[:, :length] == IGNORED, 0, raw[:, :length])
        targets = np.where(valid, raw[:, ahead:], 0)
        return Batch(
            torch.from_numpy(ids), torch.from_numpy(targets), torch.from_numpy(valid), documents
        )

    def check_ids(self, vocab: int, where: str) -> None:
        """DataError with the offset of the first id that is neither in [0, vocab) nor -100."""
        for start in range(0, len(self.ids), CHUNK):
            part = self.ids[start : start + CHUNK]
            bad = ((part < 0) & (part != IGNORED)) | (part >= vocab)
            if bad.any():
                offset = int(bad.argmax())
                raise DataError(
                    f"{where}: token {start + offset} is {part[offset]}, outside [0, {vocab}), the "
                    f"model's vocabulary ({IGNORED} marks a target not counted)",
                    file=where,
                )

    def digest(self) -> str:
        """Over the ids, the mask and the documents, each with its type and length."""
        state = xxhash.xxh3_128()
        for array in (self.ids, self.mask, self.documents):
            kind = "none" if array is None else f"{array.dtype.str} {len(array)}"
            state.update(f"{kind};".encode())
            for start in range(0, 0 if array is None else len(array), CHUNK):
                state.update(np.ascontiguousarray(array[start : start + CHUNK]).view(np.uint8))
        return state.hexdigest()

    def target_entropy(self, length: int) -> float:
        """Nats a token: the entropy of the counted targets' own frequencies.

        No model that ignores context does better on this stream, one fitted to it included.
        """
        counts = np.zeros(0, np.int64)
        for first in range(0, self.num_sequences(length), 256):
            last = min(first + 256, self.num_sequences(length))
            batch = self.batch(range(first, last), length)
            more = torch.bincount(batch.targets[batch.valid]).numpy()
            counts = np.pad(counts, (0, max(0, len(more) - len(counts))))
            counts[: len(more)] += more
        share = counts[counts > 0] / max(1, counts.sum())
        return float(-(share * np.log(share)).sum())


def _cut(array: Any, at: int) -> tuple[Any, Any]:
    return (None, None) if array is None else (array[:at], array[at:])


def open_tokens(
    source: str, mask: str | None, documents: str | None, key: str = "data.source"
) -> Stream:
    """The stream of 'tokens:FILE.npy', with the files of its mask and documents, mapped to memory.

    Raises UsageError for a missing file, DataError for one that is not a 1-D integer .npy or whose
    length differs from the tokens'.
    """
    ids = _array(source.removeprefix(TOKENS), key)
    return Stream(ids, _mask(ids, mask), _beside(ids, documents, "data.documents"))


def open_megatron(
    prefix: Path, mask: str | None, documents: str | None, key: str = "data.source"
) -> Stream:
    """The stream of Megatron's PREFIX.bin, with a mask as above; documents are a file of that kind, or
    'idx': those of PREFIX.idx."""
    held = megatron.read(prefix, key)
    if documents == IDX:
        spans: np.ndarray | Spans | None = Spans(held.starts, len(held.ids))
    else:
        spans = _beside(held.ids, documents, "data.documents")
    return Stream(held.ids, _mask(held.ids, mask), spans)


def _mask(ids: np.ndarray, path: str | None) -> np.ndarray | None:
    """Which targets count; some must."""
    mask = _beside(ids, path, "data.mask")
    if mask is not None and not mask.any():
        text = f"{path}: data.mask is 0 everywhere: no target counts"
        raise DataError(text, file=path, key="data.mask")
    return mask


def _beside(ids: np.ndarray, path: str | None, key: str) -> np.ndarray | None:
    """A file with an entry for each token."""
    array = _array(path, key) if path else None
    if array is not None and len(array) != len(ids):
        raise DataError(
            f"{path}: {key} has {len(array)} entries, the tokens {len(ids)}: one each",
            file=path,
            key=key,
        )
    return array


def _array(name: str, key: str) -> np.ndarray:
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"{key}: {name!r}: no such file; a .npy is needed", file=name, key=key)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        with path.open("rb") as file:
            why = error if file.read(len(MAGIC)) == MAGIC else "it does not begin as one"
        raise DataError(f"{path}: not a readable .npy: {why}", file=name, key=key) from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iub":
        held = (
            f"{array.dtype}{list(array.shape)}" if isinstance(array, np.ndarray) else "an archive"
        )
        raise DataError(
            f"{path}: holds {held}; a 1-D array of integers is needed", file=name, key=key
        )
    return array
