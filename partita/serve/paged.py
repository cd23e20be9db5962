"""Keys and values in pages, and attention over them: what stands in the place of a layer's attention core.

Tokens of all sequences of a step stand in one row [1, tokens, hidden]. A core writes their keys and values
into pages [pages, page_size, kv_heads, head_dim], then sequences with few tokens attend together, by one
call over their gathered pages, and each long chunk of a prompt by itself: over the pages before it, and
causally over its own tokens, put together by their log-sum-exps.

    row     | a a a a a a a a a a | b | c | d d | e e |     a: a chunk of a prompt; b, c: decode together;
            |       prompt        |  few  |    few    |     d, e: two tokens each (speculation) do, too

Behind the last page lies a scratch page: what tokens that fill up a row write, and what shorter page tables
are filled up with. A page is zeroed when its first token is written, so that nobody meets what was there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from partita.model.core import Flash
from partita.parallel.cp.alibi import biased
from partita.parallel.cp.split import CAUSAL, FULL, Tile
from partita.parallel.cp.tile import Capped, Merged, Scale, attend, plain
from partita.parallel.cp.visible import Tokens, visible
from partita.serve.piece import Piece

FEW = 16  # tokens of a sequence up to which it attends together with others
SOME = 4  # pages: tables up to twice as long are filled up to one length


@dataclass(eq=False)
class Few:
    """Sequences with `n` tokens each, at `first` of the row: `table` [sequences, pages], positions
    [sequences, n]. `run`: where one sequence's pages follow each other, the first and behind the last."""

    first: int
    n: int
    table: Tensor
    positions: Tensor
    run: tuple[int, int] | None
    pages: Tensor  # the table's, one sequence's behind the other's
    _masks: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def mask(self, core: Paged, groups: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """What is added to scores [sequences, kv heads or 1, heads of each * n, keys]; all layers of one
        window have the same."""
        if core.window not in self._masks:
            kv, each = groups
            keys = torch.arange(self.table.shape[1] * core.page_size, device=self.table.device)
            k, q = Tokens(keys.unsqueeze(0)), Tokens(self.positions)
            if core.slopes is not None:
                found = biased(core.slopes, q, k, core.window)
                found = found.unflatten(1, (kv, each)).flatten(2, 3)
            else:
                hidden = ~visible(q, k, core.window)
                found = torch.zeros(hidden.shape, dtype=dtype, device=keys.device)
                found = found.masked_fill_(hidden, -torch.inf).unsqueeze(1).repeat(1, 1, each, 1)
            self._masks[core.window] = found
        return self._masks[core.window]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A chunk of one sequence, `n` tokens from position `start` at `first` of the row; `table`: the pages of
    what stands before it."""

    first: int
    n: int
    start: int
    table: Tensor


@dataclass(eq=False)
class Step:
    """What blocks are called with: the tokens of a row, their positions, where each goes. `whole`: places of
    the laid sequence, which a block's share of the row is stated in."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    fresh: Tensor | None  # pages that begin
    groups: Sequence[Few | Prompt]
    wanted: Tensor  # places in the row, in the order of pieces
    whole: int
    documents: None = None
    samples: None = None
    step: int = 0
    _tables: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    @property
    def split(self) -> Step:
        """Positions are not in order."""
        return self

    @property
    def tokens(self) -> Step:
        """They are the row's."""
        return self

    def tables(self, rope: tuple[Tensor, Tensor], *places: int) -> tuple[Tensor, Tensor]:
        """RoPE's tables [1, tokens, rope_dim / 2]; layers of one RoPE have the same."""
        if id(rope) not in self._tables:
            self._tables[id(rope)] = rope[0][self.positions], rope[1][self.positions]
        return self._tables[id(rope)]

    def part(self, first: int, end: int) -> Tokens:
        """The share of the row that stands at laid places first .. end - 1."""
        size = self.positions.shape[1] * (end - first) // self.whole
        at = first // (end - first) * size
        return Tokens(self.positions[:, at : at + size])

    @staticmethod
    def of(
        pieces: Sequence[Piece], pages: int, page_size: int, whole: int, ways: int = 1,
        device: torch.device | str = "cpu",
    ) -> Step:  # fmt: skip
        """Of pieces that have been found right; `pages` is the number of the scratch page; the row is filled
        up to a multiple of `ways`."""
        ids, positions, slots = [], [], []
        groups: list[Few | Prompt] = []
        first_of, fresh = {}, []
        for few in _together(pieces, page_size):
            first = len(ids)
            for at in few:
                p = pieces[at]
                first_of[at] = len(ids)
                ids += p.tokens
                positions += range(p.start, p.end)
                for i in range(p.start, p.end):
                    page, place = divmod(i, page_size)
                    slots.append(p.pages[page] * page_size + place)
                    fresh += [p.pages[page]] if place == 0 else []
            groups.append(_group([pieces[at] for at in few], first, pages, page_size, device))
        more = -len(ids) % ways
        ids, positions = ids + [0] * more, positions + [0] * more
        slots += [pages * page_size] * more
        wanted = [
            first_of[at] + i
            for at, p in enumerate(pieces)
            for i in range(len(p.tokens) - p.want, len(p.tokens))
        ]

        def made(values: list[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        return Step(
            made(ids).unsqueeze(0), made(positions).unsqueeze(0), made(slots),
            made(fresh) if fresh else None, groups, made(wanted), whole,
        )  # fmt: skip


def _together(pieces: Sequence[Piece], page_size: int) -> Iterator[list[int]]:
    """Places of pieces that attend by one call."""
    groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
    for at, p in enumerate(pieces):
        n = len(p.tokens)
        if n > FEW:
            yield [at]
        else:
            pages = -(-p.end // page_size)
            groups[n, max(pages - 1, SOME - 1).bit_length()].append(at)
    yield from groups.values()


def _group(
    pieces: Sequence[Piece], first: int, scratch: int, page_size: int, device: torch.device | str
) -> Few | Prompt:
    """What attends by one call; its tokens begin at `first` of the row."""
    n = len(pieces[0].tokens)
    held = [p.pages[: -(-p.end // page_size)] for p in pieces]
    if n > FEW:
        before = held[0][: -(-pieces[0].start // page_size)]
        table = torch.tensor(before, dtype=torch.int64, device=device)
        return Prompt(first, n, pieces[0].start, table)
    longest = max(map(len, held))
    table = torch.tensor([[*h, *[scratch] * (longest - len(h))] for h in held], device=device)
    positions = torch.tensor([range(p.start, p.end) for p in pieces], device=device)
    only, run = held[0], None
    if len(held) == 1 and only == tuple(range(only[0], only[0] + len(only))):
        run = only[0], only[0] + len(only)
    return Few(first, n, table, positions, run, table.flatten())


@dataclass(frozen=True, eq=False)
class Paged:
    """A layer's keys and values on this rank, and its attention. `window`, `scale` and `slopes` as
    model/core.py's Flash has them."""

    keys: Tensor  # [pages and a scratch page, page_size, kv_heads, head_dim]
    values: Tensor
    window: int = 0
    scale: Scale = None
    slopes: Tensor | None = None

    @staticmethod
    def like(core: Flash, keys: Tensor, values: Tensor) -> Paged:
        """In the place of a core."""
        return Paged(keys, values, core.window, core.scale, core.slopes)

    @property
    def page_size(self) -> int:
        """Tokens of a page."""
        return self.keys.shape[1]

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, batch: Step, step: int, training: bool
    ) -> Tensor:
        """q [1, heads, tokens, head_dim], k and v [1, kv_heads, tokens, dim] -> [1, heads, tokens, dim]."""
        for held, made in ((self.keys, k), (self.values, v)):
            if batch.fresh is not None:
                held.index_fill_(0, batch.fresh, 0)
            held.flatten(0, 1).index_copy_(0, batch.slots, made[0].transpose(0, 1))
        parts = [
            self._few(q, g) if isinstance(g, Few) else self._prompt(q, k, v, g)
            for g in batch.groups
        ]
        more = q.shape[2] - sum(len(p) for p in parts)
        if more:
            parts.append(parts[0].new_zeros(more, *parts[0].shape[1:]))
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole.unsqueeze(0).transpose(1, 2)

    def _few(self, q: Tensor, group: Few) -> Tensor:
        """[tokens, heads, dim] of sequences with few tokens: of those with one kv head, the queries of all
        heads and tokens side by side."""
        many, n = group.positions.shape
        kv, heads = self.keys.shape[2], q.shape[1]
        mine = q[0, :, group.first : group.first + many * n]
        mine = mine.unflatten(1, (many, n)).transpose(0, 1)  # [sequences, heads, n, head_dim]
        mine = mine.reshape(many, kv, heads // kv * n, -1)
        k, v = (self._gathered(t, group) for t in (self.keys, self.values))
        mask = group.mask(self, (kv, heads // kv), q.dtype)
        wide = mask.dtype != q.dtype and q.device.type != "cpu"
        if isinstance(self.scale, Capped) or wide:
            # ALiBi's are fp32, which a GPU's kernels read as if they were of 16 bits
            a = plain(mine, k, v, mask, False, self.scale)[0]
        else:
            a = scaled_dot_product_attention(mine, k, v, attn_mask=mask, scale=self.scale)
        return a.reshape(many, heads, n, -1).transpose(1, 2).flatten(0, 1)

    def _gathered(self, held: Tensor, group: Few) -> Tensor:
        """[sequences, kv_heads, keys, dim]."""
        run = group.run
        found = held.index_select(0, group.pages) if run is None else held[run[0] : run[1]]
        return found.view(len(group.table), -1, *held.shape[2:]).transpose(1, 2)

    def _prompt(self, q: Tensor, k: Tensor, v: Tensor, chunk: Prompt) -> Tensor:
        """[tokens, heads, dim] of a chunk."""
        own = slice(chunk.first, chunk.first + chunk.n)
        q, k, v = (t[:, :, own] for t in (q, k, v))
        if not chunk.start and not 0 < self.window < chunk.n and self.slopes is None:
            return attend(q, k, v, None, True, self.scale)[0][0].transpose(0, 1)
        past_k, past_v = (
            held[chunk.table].flatten(0, 1)[: chunk.start].transpose(0, 1).unsqueeze(0)
            for held in (self.keys, self.values)
        )
        end = chunk.start + chunk.n
        if not 0 < self.window < end and self.slopes is None:
            merged = Merged(q, v.shape[-1])
            every = slice(None)
            seen = attend(q, past_k, past_v, None, False, self.scale)
            merged.add(Tile(every, every, every, FULL), *seen)
            merged.add(Tile(every, every, every, CAUSAL), *attend(q, k, v, None, True, self.scale))
            return merged.out[0].transpose(0, 1)
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        at = torch.arange(end, device=q.device).unsqueeze(0)
        places = Tokens(at[:, chunk.start :]), Tokens(at)
        if self.slopes is None:
            mask = visible(*places, self.window).unsqueeze(1)
        else:
            mask = biased(self.slopes, *places, self.window)
        return attend(q, k, v, mask, False, self.scale)[0][0].transpose(0, 1)
