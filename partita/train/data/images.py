"""Images with labels as a source of data: `digits` (scikit-learn's), or images:FILE.npz.

The file has `images` [n, h, w] or [n, colors, h, w] (bytes, or floats) and `labels` [n], whole numbers, -100
where an image is not counted. Bytes are divided by 255, then the mean image of those trained on is taken
from each (Krizhevsky et al. 2012, sec. 2). The last `eval_fraction` of them are held out. An image is a
sequence of one place: its pixels are what a model reads, its label the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
import xxhash

from partita.base.errors import DataError, UsageError
from partita.spec.image import ImageSpec
from partita.train.data.streams import IGNORED, Batch

DIGITS, IMAGES = "digits", "images:"


@dataclass(frozen=True)
class Images:
    """`pixels` [n, colors, h, w] fp32 and `labels` [n]; what a Stream is to tokens."""

    pixels: np.ndarray
    labels: np.ndarray

    def num_sequences(self, length: int) -> int:
        """Images."""
        return len(self.labels)

    def batch(self, sequences: Sequence[int], length: int) -> Batch:
        """The images of these numbers, in this order; targets [b, 1]."""
        at = np.asarray(sequences, np.int64)
        found = self.labelled(at)  # which knows a number that is none
        pixels = torch.empty(len(at), *self.pixels.shape[1:])  # torch's memory, which is measured
        # "raise" would write into a buffer of numpy's first
        np.take(self.pixels, at, 0, out=pixels.numpy(), mode="clip")
        return replace(found, ids=pixels)

    def labelled(self, sequences: Sequence[int] | np.ndarray) -> Batch:
        """The same without a picture: for a rank that reads none."""
        raw = torch.from_numpy(self.labels[np.asarray(sequences, np.int64)]).unsqueeze(1)
        valid = raw != IGNORED
        return Batch(torch.empty(len(raw), 0), raw.where(valid, 0), valid)

    def check_ids(self, vocab: int, where: str) -> None:
        """DataError with the first label that is neither in [0, vocab) nor -100."""
        bad = ((self.labels < 0) & (self.labels != IGNORED)) | (self.labels >= vocab)
        if bad.any():
            i = int(bad.argmax())
            raise DataError(
                f"{where}: label {i} is {self.labels[i]}, outside [0, {vocab}), the model's classes "
                f"({IGNORED} marks an image not counted)", file=where,
            )  # fmt: skip

    def target_entropy(self, length: int) -> float:
        """Nats an image: the entropy of the counted labels' own frequencies."""
        _, counts = np.unique(self.labels[self.labels != IGNORED], return_counts=True)
        share = counts / max(1, counts.sum())
        return float(-(share * np.log(share)).sum())


def is_images(source: str) -> bool:
    """Whether a source has images."""
    return source == DIGITS or source.startswith(IMAGES)


def open_images(
    source: str, image: ImageSpec, vocab: int, eval_fraction: float
) -> tuple[Images, Images | None, str]:
    """(trained on, held out, digest). Raises UsageError for a file or package that is missing, DataError
    for content that is wrong: no such arrays, another size than the model's, labels beyond its classes."""
    pixels, labels = _digits() if source == DIGITS else _file(source.removeprefix(IMAGES))
    where, size = source.removeprefix(IMAGES), (image.colors, image.size, image.size)
    if pixels.shape[1:] != size:
        raise DataError(
            f"{where}: images of {list(pixels.shape[1:])}; the model sees {list(size)} (model.image.colors, "
            "size, size)", file=where, key="data.source",
        )  # fmt: skip
    digest = xxhash.xxh3_128(pixels.tobytes())
    digest.update(labels.tobytes())
    held = int(len(labels) * eval_fraction)
    n = len(labels) - held
    if n == 0:
        raise DataError(f"{where}: no image to train on", file=where, key="data.source")
    wide = pixels.astype(np.float32) / (255 if pixels.dtype == np.uint8 else 1)
    wide -= wide[:n].mean(0, dtype=np.float64).astype(np.float32)
    both = [Images(wide[a:b], labels[a:b].astype(np.int64)) for a, b in ((0, n), (n, n + held))]
    for part in both:
        part.check_ids(vocab, where)
    return both[0], both[1] if held else None, digest.hexdigest()


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """1797 images of 8 x 8 pixels, values 0 to 16, of ten digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError(
            "data.source = 'digits' is scikit-learn's: pip install scikit-learn, or name images:FILE.npz",
            key="data.source",
        ) from None
    rows, labels = load_digits(return_X_y=True)
    pixels = np.asarray(rows, np.float32).reshape(-1, 1, 8, 8) / 16
    return pixels, np.asarray(labels)


def _file(name: str) -> tuple[np.ndarray, np.ndarray]:
    path = Path(name).expanduser()
    if not path.is_file():
        text = f"data.source: {name!r}: no such file; a .npz of images and labels is needed"
        raise UsageError(text, file=name, key="data.source")
    try:
        with np.load(path, allow_pickle=False) as held:
            pixels, labels = held["images"], held["labels"]
    except (OSError, ValueError, EOFError, KeyError, BadZipFile, IndexError) as error:
        text = f"{path}: not a .npz with `images` and `labels`: {error}"
        raise DataError(text, file=name, key="data.source") from error
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    fits = pixels.ndim == 4 and labels.shape == pixels.shape[:1]
    if not fits or pixels.dtype.kind not in "uif" or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: images {pixels.dtype}{list(pixels.shape)} and labels {labels.dtype}"
            f"{list(labels.shape)}; [n, h, w] or [n, colors, h, w] and whole numbers [n] are needed",
            file=name, key="data.source",
        )  # fmt: skip
    return pixels, labels
