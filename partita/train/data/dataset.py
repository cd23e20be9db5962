"""What every rank trains on: a pure function of (job, step, sample), whatever the plan.

Sample i of step s (from 0) is position q = s * B + i of the run. Which sequence that is:

    tokens:FILE.npy    k = q mod num_sequences: no shuffling, any program can repeat it
    text, Megatron's   epoch e, place r = divmod(q, num_sequences); k = permutation_e(r)

The permutation is computed, not stored, from (seed, epoch): no rank, microbatch or plan enters it.
A sequence whose tokens are guessed from those around them is masked by q and the seed (masked.py).
Text is tokenized once and cached; every rank maps the same file to memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import filelock
import numpy as np
import xxhash

from partita.base.errors import DataError, UsageError
from partita.train.data.images import Images, is_images, open_images
from partita.train.data.masked import Masking
from partita.train.data.megatron import prefix_of
from partita.train.data.sources import Part, TextSource, open_text
from partita.train.data.streams import TOKENS, Batch, Stream, open_megatron, open_tokens
from partita.train.data.tokenizer import Tokenizer, open_tokenizer, write_whole

if TYPE_CHECKING:
    from partita.spec.image import ImageSpec
    from partita.spec.job import DataSpec, TrainSpec

PASSAGES = 8  # tokenized at once: 8 MB of text
LOCK_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Dataset:
    """The job's data, opened and checked. `tokenizer` is None for tokens: sources."""

    train: Stream | Images
    held_out: Stream | Images | None
    tokenizer: Tokenizer | None
    seq_len: int
    global_batch_size: int
    seed: int
    shuffled: bool
    identity: dict[str, object]
    masking: Masking | None = None

    @property
    def num_sequences(self) -> int:
        """Sequences that are trained on."""
        return self.train.num_sequences(self.seq_len)

    @property
    def num_eval_sequences(self) -> int:
        """Sequences held out."""
        return self.held_out.num_sequences(self.seq_len) if self.held_out else 0

    def sample(self, step: int, index: int) -> int:
        """The number of the sequence that is sample `index` of step `step` (both from 0)."""
        epoch, place = divmod(step * self.global_batch_size + index, self.num_sequences)
        if not self.shuffled:
            return place
        return permuted(place, self.num_sequences, f"{self.seed} {epoch}")

    def microbatch(self, step: int, samples: Sequence[int], pictures: bool = True) -> Batch:
        """These samples of a step's global batch, in this order; without `pictures` labels alone."""
        at = [self.sample(step, i) for i in samples]
        if isinstance(self.train, Images) and not pictures:
            return self.train.labelled(at)
        whole = self.train.batch(at, self.seq_len)
        if self.masking is None:
            return whole
        return self.masking(whole, [step * self.global_batch_size + i for i in samples])

    def eval_batches(
        self, size: int, *, limit: int | None = None, part: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """The held-out sequences in order, `size` a batch (the last may be smaller).

        `limit` bounds the sequences; of n data-parallel ranks, rank r passes part = (r, n) and takes
        rows r, r + n, ... of each batch (perhaps none).
        """
        if self.held_out is None:
            return
        rank, world = part
        count = min(self.num_eval_sequences, limit if limit is not None else 2**63)
        for first in range(0, count, size):
            mine = range(first + rank, min(first + size, count), world)
            whole = self.held_out.batch(mine, self.seq_len)
            yield whole if self.masking is None else self.masking(whole, mine, "held out")

    def unigram_entropy(self) -> float:
        """Nats a token, of the held-out targets' own frequencies (the training ones, if none are
        held out): what the best model without context reaches, fitted to the very text it is
        judged by. Lower, hence a harder mark, than the cross-entropy of the training frequencies.
        """
        judged = self.held_out if self.num_eval_sequences else self.train
        return (judged or self.train).target_entropy(self.seq_len)

    def fingerprint(self) -> dict[str, object]:
        """What a resumed run must share, apart from the tokenizer; plain values."""
        return dict(self.identity)


def open_dataset(
    data: DataSpec, train: TrainSpec, *, vocab: int, seed: int, cache: Path | None = None,
    image: ImageSpec | None = None,
) -> Dataset:  # fmt: skip
    """Opens, checks and (for text, once) tokenizes a job's data.

    `vocab` and `image` are the model's; `cache` the folder for trained tokenizers and tokenized text,
    shared by the ranks of a host (None: each works for itself). Raises UsageError for what does not exist,
    DataError with file and offset for bad content, text shorter than one sequence, ids out of range
    and a tokenizer bigger than the vocabulary.
    """
    if image is not None or is_images(data.source):
        return _open_images(data, train, vocab, seed, image)
    with _told_of("data.source"):
        opened = _opened(data, vocab, cache)
        tokenizer = opened.tokenizer
        masking = Masking.of(data, tokenizer, vocab, seed)
        ahead = 1 if masking is None else 0
        stream, held_out = _aligned(opened.train, ahead), _aligned(opened.held_out, ahead)
        assert stream is not None
        _check(stream, vocab, train.seq_len, "data.source", data.source)
        if held_out is not None:
            held_out.check_ids(vocab, data.source)
    if data.eval_source:
        with _told_of("data.eval_source"):
            held_out = _aligned(_eval_stream(data.eval_source, tokenizer, cache), ahead)
            assert held_out is not None
            _check(held_out, vocab, train.seq_len, "data.eval_source", data.eval_source)
    identity: dict[str, object] = {
        "seq_len": train.seq_len,
        "global_batch_size": train.global_batch_size,
        "seed": seed,
    }
    return Dataset(
        stream,
        held_out,
        tokenizer,
        train.seq_len,
        train.global_batch_size,
        seed,
        shuffled=opened.shuffled,
        identity=identity | opened.identity | ({} if masking is None else masking.identity),
        masking=masking,
    )


def _aligned(stream: Stream | None, ahead: int) -> Stream | None:
    """The stream with targets that lie so many tokens behind inputs."""
    return None if stream is None else replace(stream, ahead=ahead)


@contextmanager
def _told_of(key: str) -> Iterator[None]:
    """Bad content that no other key names is that of `key`."""
    try:
        yield
    except DataError as error:
        error.key = key if error.key in (None, "data.source") else error.key
        raise


def _check(stream: Stream, vocab: int, length: int, key: str, source: str) -> None:
    """DataError where ids are out of range, no sequence is filled, or no target is counted."""
    file = source.removeprefix(TOKENS)
    stream.check_ids(vocab, file)
    text, use = "", " to train on" if key == "data.source" else ""
    if stream.num_sequences(length) == 0:
        needed = (
            f"train.seq_len + 1 = {length + 1}" if stream.ahead else f"train.seq_len = {length}"
        )
        text = f"{len(stream.ids)} tokens{use}; one sequence needs {needed}"
    elif stream.mask is not None and not stream.mask.any():
        text = "no target that is counted: completions or answers of all its records are empty"
    if text:
        raise DataError(f"{key} = {source!r} has {text}", file=file, key=key)


def _open_images(
    data: DataSpec, train: TrainSpec, vocab: int, seed: int, image: ImageSpec | None
) -> Dataset:
    """The job's images; tokens go to no image model, images to no other."""
    if (
        image is None
        or not is_images(data.source)
        or data.mask
        or data.documents
        or data.eval_source
        or data.mlm_probability
    ):
        text = (
            "family alexnet reads digits or images:FILE.npz, without mask, documents, mlm_probability and "
            f"eval_source; other families read text or tokens; data.source is {data.source!r}"
        )
        raise UsageError(text, key="data.source")
    fraction = data.eval_fraction or 0.0
    first, held_out, digest = open_images(data.source, image, vocab, fraction)
    shared = {"seq_len": 1, "global_batch_size": train.global_batch_size, "seed": seed}
    identity = {**shared, "digest": digest, "eval_fraction": fraction}
    return Dataset(
        first, held_out, None, 1, train.global_batch_size, seed, shuffled=True, identity=identity
    )


@dataclass(frozen=True)
class _Opened:
    """A source's streams, and what a resumed run must share of it."""

    train: Stream
    held_out: Stream | None
    tokenizer: Tokenizer | None
    shuffled: bool
    identity: dict[str, object]


def _opened(data: DataSpec, vocab: int, cache: Path | None) -> _Opened:
    """Tokens as they stand; Megatron's and text shuffled, their last part held out."""
    fraction = 0.0 if data.eval_source else data.eval_fraction or 0.0
    if data.source.startswith(TOKENS):
        stream = open_tokens(data.source, data.mask, data.documents)
        return _Opened(stream, None, None, False, {"digest": stream.digest()})
    prefix = prefix_of(data.source)
    if prefix is not None:
        whole = open_megatron(prefix, data.mask, data.documents)
        identity: dict[str, object] = {"digest": whole.digest(), "eval_fraction": fraction}
        stream, rest = whole.split(len(whole.ids) - int(len(whole.ids) * fraction))
        return _Opened(stream, rest if fraction else None, None, True, identity)
    if data.mask or data.documents:
        raise UsageError(
            f"data.mask and data.documents go with {TOKENS}FILE.npy and Megatron's .bin/.idx, not "
            f"{data.source!r}",
            key="data.mask" if data.mask else "data.documents",
        )
    text = open_text(data.source, key="data.source", eval_fraction=fraction)
    tokenizer = open_tokenizer(data.tokenizer, vocab=vocab, source=text, cache=cache)
    stream = tokenize(text, tokenizer, "train", cache)
    held_out = tokenize(text, tokenizer, "eval", cache) if fraction else None
    identity = {"digest": text.digest, "eval_fraction": fraction}
    return _Opened(stream, held_out, tokenizer, True, identity)


def _eval_stream(source: str, tokenizer: Tokenizer | None, cache: Path | None) -> Stream:
    key = "data.eval_source"
    if source.startswith(TOKENS):
        return open_tokens(source, None, None, key)
    prefix = prefix_of(source)
    if prefix is not None:
        return open_megatron(prefix, None, None, key)
    if tokenizer is None:
        raise UsageError(
            f"data.eval_source = {source!r} is text and data.source is tokens: no tokenizer reads "
            f"it; give {TOKENS}FILE.npy or a Megatron prefix",
            key=key,
        )
    return tokenize(open_text(source, key=key), tokenizer, "train", cache)


def permuted(place: int, size: int, key: str) -> int:
    """Where `place` of 0 .. size - 1 goes under the permutation named `key`.

    Four Feistel rounds over the next even power of two, walked until the place is inside.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        a, b = place >> half, place & low
        for turn in range(4):
            a, b = b, a ^ (xxhash.xxh3_64_intdigest(f"{key} {turn} {b}".encode()) & low)
        place = a << half | b
        if place < size:
            return place


def tokenize(
    source: TextSource, tokenizer: Tokenizer, part: Part, cache: Path | None = None
) -> Stream:
    """The tokens of one part of a text source; of the ranks that share `cache` one does the work."""
    if cache is None:
        return Stream(*_tokenized(source, tokenizer, part))
    what = f"{source.digest} {source.eval_fraction} {tokenizer.digest} {tokenizer.chat.digest} {part} 4"
    name = xxhash.xxh3_128_hexdigest(what.encode())
    folder = cache / "tokens"
    paths = folder / f"{name}.ids.npy", folder / f"{name}.mask.npy"
    if (found := _cached(paths)) is not None:
        return found
    with suppress(OSError):  # a cache that cannot be written costs time, nothing else
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f"{name}.lock", timeout=LOCK_TIMEOUT_S):
            if (found := _cached(paths)) is not None:
                return found
            made = _tokenized(source, tokenizer, part)
            for path, array in zip(reversed(paths), reversed(made), strict=True):
                buffer = BytesIO()
                np.save(buffer, np.zeros(0, bool) if array is None else array)
                write_whole(path, buffer.getvalue())
            return Stream(*made)
    return Stream(*_tokenized(source, tokenizer, part))


def _cached(paths: tuple[Path, Path]) -> Stream | None:
    """The stream of the cached files; None where one is absent or damaged."""
    try:
        ids, mask = (np.load(path, mmap_mode="r", allow_pickle=False) for path in paths)
    except (OSError, ValueError, EOFError):
        return None
    return Stream(ids, mask if len(mask) else None)


def _tokenized(
    source: TextSource, tokenizer: Tokenizer, part: Part
) -> tuple[np.ndarray, np.ndarray | None]:
    """(ids, mask): in the narrowest type; mask None where every token is counted."""
    dtype = np.uint16 if tokenizer.size <= 1 << 16 else np.uint32
    end = np.asarray(tokenizer.end, dtype)
    ids: list[np.ndarray] = []
    masks: list[np.ndarray] = []
    passages = source.passages(part, tokenizer.chat)
    while group := [p for _, p in zip(range(PASSAGES), passages, strict=False)]:
        prompts = tokenizer.arrays([p.prompt for p in group])
        texts = tokenizer.arrays([p.text for p in group])
        for passage, prompt, text in zip(group, prompts, texts, strict=True):
            new = [prompt.astype(dtype), text.astype(dtype), *([end] if passage.ends else [])]
            ids += new
            masks += [np.arange(sum(map(len, new))) >= len(prompt)]
    mask = np.concatenate([np.zeros(0, bool), *masks])
    return np.concatenate([np.zeros(0, dtype), *ids]), None if mask.all() else mask
