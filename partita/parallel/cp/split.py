"""A microbatch on the laid sequence: where its tokens come from, and which tiles of attention are seen.

A ring's ranks hold equal shares of the laid sequence. A tile is a rectangle of (query, key) pairs between
two shares that one kernel call computes; a pair of chunks that nobody sees is in no tile. In a ring of n
without documents a rank computes its own share with a causal mask, then half a square for every other
share, each without a mask:

    own share (chunks r, 2n-1-r)      share of an earlier rank       of a later rank
        k0 k1                             k0 k1                          k0 k1
    q0  \\  .                          q0  #  .                       q0  .  .
    q1  #  \\                          q1  #  .                       q1  #  #
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import inf

import torch
from torch import Tensor

from partita.parallel.cp.balance import Order, order
from partita.parallel.cp.rules import balanced_window
from partita.parallel.cp.visible import Tokens, visible
from partita.parallel.room import Request

NONE, FULL, CAUSAL, PART = range(4)


@dataclass(frozen=True, slots=True)
class Tile:
    """Samples, queries and keys by place within their shares; `kind` FULL, CAUSAL (the same tokens, upper
    half hidden) or PART (a mask says)."""

    rows: slice
    q: slice
    k: slice
    kind: int


@dataclass(eq=False)
class Split:
    """The laid sequence of one microbatch, or of all of them where no documents are packed. `tokens` are
    all its tokens in laid order; `ring` ranks hold `share` of them each."""

    order: Order
    tokens: Tokens
    ring: int
    window: int = 0
    causal: bool = True
    _known: dict[tuple[int, int], tuple[Tile, ...]] = field(default_factory=dict)
    _tables: dict[tuple[int, int, int], tuple[Tensor, Tensor, object]] = field(default_factory=dict)
    _windows: dict[int, Split] = field(default_factory=dict)
    _moved: dict[torch.device, Split] = field(default_factory=dict)

    @staticmethod
    def of(request: Request, documents: Tensor | None = None) -> Split:
        """`documents` [samples, seq] in the sequence's own order."""
        ring, window = request.plan.sizes["cp"], balanced_window(request.model)
        causal = request.model.causal
        packed = None if documents is None else documents.numpy()
        made = order(request.laid_len, ring, packed, window, causal)
        positions = torch.from_numpy(made.positions)
        if documents is not None:
            documents = documents.gather(1, positions.expand(documents.shape))
        found = Split(made, Tokens(positions, documents), ring, window, causal)
        for other in request.model.windows:
            found.of_window(other)
        return found

    def of_window(self, window: int | None) -> Split:
        """The same tokens where queries see so many keys; itself where that is None."""
        if window is None or window == self.window:
            return self
        if window not in self._windows:
            self._windows[window] = Split(self.order, self.tokens, self.ring, window, self.causal)
        return self._windows[window]

    def to(self, device: torch.device) -> Split:
        """The same with positions and documents on a device; tiles are found before, on the host."""
        if device not in self._moved:
            for mine in range(self.ring):
                for other in range(self.ring):
                    self.tiles(mine, other)
            packed = self.tokens.documents
            documents = None if packed is None else packed.to(device)
            there = Tokens(self.tokens.positions.to(device), documents)
            known = self._known
            moved = Split(self.order, there, self.ring, self.window, self.causal, known)
            moved._windows |= {w: other.to(device) for w, other in self._windows.items()}
            self._moved[device] = moved
        return self._moved[device]

    @property
    def share(self) -> int:
        """Tokens of a ring's rank."""
        return self.tokens.positions.shape[1] // self.ring

    def take(self, tensors: Sequence[Tensor], part: int, parts: int) -> list[Tensor]:
        """Columns of [samples, seq] tensors in the sequence's own order: the `part`-th share, laid."""
        each = self.tokens.positions.shape[1] // parts
        at = self.tokens.part(part * each, (part + 1) * each).positions
        return [t.gather(1, at.expand(t.shape[0], -1)) for t in tensors]

    def of_rank(self, ring_rank: int) -> Tokens:
        """The tokens of one rank of the ring."""
        return self.tokens.part(ring_rank * self.share, (ring_rank + 1) * self.share)

    def tables(self, rope: tuple[Tensor, Tensor], first: int, end: int) -> tuple[Tensor, Tensor]:
        """RoPE's tables [samples or 1, places, head_dim / 2] at laid places first .. end - 1."""
        key = first, end, id(rope)
        if key not in self._tables:
            at = self.tokens.positions[:, first:end]
            self._tables[key] = rope[0][at], rope[1][at], rope  # whose id stays its own
        return self._tables[key][:2]

    def tiles(self, mine: int, other: int) -> tuple[Tile, ...]:
        """What queries of rank `mine` see of the keys of rank `other`."""
        if (mine, other) not in self._known:
            self._known[mine, other] = tuple(self._tiles(mine, other))
        return self._known[mine, other]

    def seen(self, tile: Tile, mine: int, other: int) -> Tensor | None:
        """bool [batch or 1, 1, queries, keys] of a tile that needs a mask."""
        if tile.kind != PART:
            return None
        return visible(*self.pair(tile, mine, other), self.window, self.causal).unsqueeze(1)

    def pair(self, tile: Tile, mine: int, other: int) -> tuple[Tokens, Tokens]:
        """The tokens of a tile's queries and of its keys."""
        q = _cut(self.of_rank(mine), tile.rows, tile.q)
        return q, _cut(self.of_rank(other), tile.rows, tile.k)

    def mask(self, mine: int) -> Tensor:
        """bool [batch or 1, 1, share, seq]: what queries of a rank see of all keys, in laid order."""
        return visible(self.of_rank(mine), self.tokens, self.window, self.causal).unsqueeze(1)

    def _tiles(self, mine: int, other: int) -> Iterator[Tile]:
        each = self.share // self.order.chunk
        plain = self.tokens.documents is None
        windowed = 0 < self.window < self.tokens.positions.shape[1]
        if plain and self.causal and mine == other and not windowed:
            whole = slice(0, self.share)
            yield Tile(slice(None), whole, whole, CAUSAL)
            return
        for row, chunks in enumerate(self.order.rows):
            q = chunks[mine * each : (mine + 1) * each]
            k = chunks[other * each : (other + 1) * each]
            held = {c: self._held(row, other * each + i) for i, c in enumerate(k)}
            held |= {c: self._held(row, mine * each + i) for i, c in enumerate(q)}
            grid = [[self._kind(a, b, held) for b in k] for a in q]
            rows = slice(None) if plain else slice(row, row + 1)
            yield from self._joined(rows, grid)

    def _held(self, row: int, place: int) -> frozenset[int]:
        """Documents in the chunk at a laid place."""
        if self.tokens.documents is None:
            return frozenset({0})
        c = self.order.chunk
        held = self.tokens.documents[row, place * c : (place + 1) * c]
        return frozenset(held.unique().tolist())

    def _kind(self, q: int, k: int, held: dict[int, frozenset[int]]) -> int:
        """What chunk q sees of chunk k, by their places in the sequence and their documents."""
        c, w = self.order.chunk, self.window
        nearest, farthest = (q - k - 1) * c + 1, (q - k + 1) * c - 1
        least, most = (0 if self.causal else -w + 1 if w else -inf), (w - 1 if w else inf)
        if farthest < least or nearest > most or not held[q] & held[k]:
            return NONE
        one = len(held[q] | held[k]) == 1
        if one and nearest >= least and farthest <= most:
            return FULL
        return CAUSAL if one and q == k and self.causal and not 0 < w < c else PART

    def _joined(self, rows: slice, grid: Sequence[Sequence[int]]) -> Iterator[Tile]:
        """Neighbouring keys are one tile, and so are neighbouring queries that see the same keys whole."""
        c, runs = self.order.chunk, [_runs(kinds) for kinds in grid]
        at = 0
        for seen, same in groupby(runs):
            count = len(list(same))
            whole = all(kind == FULL for *_, kind in seen)
            steps = [(at, at + count)] if whole else [(i, i + 1) for i in range(at, at + count)]
            for a, b in steps:
                for first, end, kind in seen:
                    yield Tile(rows, slice(a * c, b * c), slice(first * c, end * c), kind)
            at += count


def _cut(t: Tokens, rows: slice, places: slice) -> Tokens:
    """Some samples' tokens at some places."""
    positions = t.positions if t.positions.shape[0] == 1 else t.positions[rows]
    documents = None if t.documents is None else t.documents[rows, places]
    return Tokens(positions[:, places], documents)


def _runs(kinds: Sequence[int]) -> list[tuple[int, int, int]]:
    """Neighbours that are seen, as (first, end, kind)."""
    found, at = [], 0
    for seen, group in groupby(kinds, lambda kind: kind != NONE):
        run = list(group)
        if seen:
            kind = run[0] if len(run) == 1 else FULL if set(run) == {FULL} else PART
            found.append((at, at + len(run), kind))
        at += len(run)
    return found
