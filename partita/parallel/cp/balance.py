"""Which part of the sequence each rank of a ring holds: whole chunks, equally many, about equal work.

Work is the unmasked area: the number of (query, key) pairs that are seen. Chunks go, largest first, to the
rank with the least so far that has room. For one document and two chunks a rank that is the zig-zag of
Llama 3 (2407.21783, sec. 3.3.2) and others: rank r of n holds chunks r and 2n-1-r.

    one document, ring of 2       chunk    0  1  2  3
                                  area     1  3  5  7      rank 0: 0 3     rank 1: 1 2

Where tokens attend both ways every token of a document sees as many keys: shares are neighbours.

The sequence in that order, rank after rank, is the *laid* sequence: everything that cuts seq cuts it, and
only what needs positions (data, RoPE, masks, dropout) asks where a token comes from. Packed documents make
another order for each sample. An order is data: it is in no weight's layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Ints = NDArray[np.int64]
FINE = 4  # pairs of chunks a rank for packed documents
SMALLEST = 64  # tokens of such a chunk


@dataclass(frozen=True)
class Order:
    """Chunks of `chunk` tokens by laid place, a row for each sample, or one for all of them."""

    chunk: int
    rows: tuple[tuple[int, ...], ...]

    @cached_property
    def positions(self) -> Ints:
        """[rows, seq]: the global position at each laid place."""
        import numpy as np  # here, because a plan without a ring is judged without it

        first = np.array(self.rows, np.int64)[..., None] * self.chunk
        return (first + np.arange(self.chunk)).reshape(len(self.rows), -1)

    def spans(self, row: int, first: int, end: int) -> list[tuple[int, int]]:
        """Laid places first .. end - 1 of a row as runs of neighbouring positions."""
        import numpy as np

        held = self.positions[row, first:end]
        breaks = np.flatnonzero(np.diff(held) != 1) + 1
        ends = [0, *breaks.tolist(), len(held)]
        return [(int(held[a]), int(held[b - 1]) + 1) for a, b in pairwise(ends) if b > a]


def order(
    seq_len: int, ring: int, documents: Ints | None = None, window: int = 0, causal: bool = True
) -> Order:
    """The laid order for a ring of `ring` ranks; `documents` [samples, seq] where they are packed."""
    if ring == 1:
        return Order(seq_len, ((0,),))
    if documents is None:
        if not causal:
            return Order(seq_len // ring, (tuple(range(ring)),))
        return _plain(seq_len, ring, window)
    chunk = seq_len // chunks(seq_len, ring, packed=True)
    areas = (seen(row, window, causal).reshape(-1, chunk).sum(1).tolist() for row in documents)
    return Order(chunk, tuple(_row(area, ring) for area in areas))


@cache
def _plain(seq_len: int, ring: int, window: int) -> Order:
    import numpy as np

    chunk = seq_len // chunks(seq_len, ring)
    area = seen(np.zeros(seq_len, np.int64), window).reshape(-1, chunk).sum(1)
    return Order(chunk, (_row(area.tolist(), ring),))


def chunks(seq_len: int, ring: int, packed: bool = False) -> int:
    """Chunks of a sequence: two a rank, more for packed documents where they stay large; one where the
    length does not divide by twice the ring (all_gather allows it)."""
    if seq_len % (2 * ring):
        return ring
    fine = FINE if packed else 1
    while seq_len % (2 * ring * fine) or (fine > 1 and seq_len // (2 * ring * fine) < SMALLEST):
        fine //= 2
    return 2 * ring * fine


def seen(documents: Ints, window: int = 0, causal: bool = True) -> Ints:
    """How many keys each position sees: earlier ones of its own document and itself, at most `window`; where
    attention is not causal, as many later ones."""
    import numpy as np

    found = np.empty(len(documents), np.int64)
    for document in np.unique(documents):
        at = np.flatnonzero(documents == document)
        first = np.searchsorted(at, at - window + 1) if window else 0
        end = np.arange(1, len(at) + 1)
        if not causal:
            end = np.searchsorted(at, at + window) if window else len(at)
        found[at] = end - first
    return found


def _row(areas: Sequence[int], ring: int) -> tuple[int, ...]:
    return tuple(c for held in assign(areas, ring) for c in held)


def assign(areas: Sequence[int], ring: int) -> list[list[int]]:
    """Chunks of each rank, ascending; equally many each. Largest first to the least loaded."""
    each = len(areas) // ring
    held: list[list[int]] = [[] for _ in range(ring)]
    load = [0] * ring
    for c in sorted(range(len(areas)), key=lambda c: (-areas[c], -c)):
        r = min((r for r in range(ring) if len(held[r]) < each), key=lambda r: (load[r], r))
        held[r].append(c)
        load[r] += areas[c]
    return [sorted(h) for h in held]
