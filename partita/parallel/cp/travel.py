"""How a rank sees the shares of the others: they go round a ring, or are gathered.

    step     rank 0   rank 1   rank 2     share that each rank computes with; the next one is on its way
    0        s0       s1       s2
    1        s2       s0       s1
    2        s1       s2       s0

A ring of n hands on each share n-1 times, and holds two at a time: the one it computes with and the one that
comes. In backward the gradient of a share follows it: each rank adds its part and hands the sum on, n-1
times; the owner adds its own part at home. Shares travel as [batch, share, heads, head_dim].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from partita.comm.protocol import Comm, Handle, Key
from partita.parallel.cp.tile import wide
from partita.parallel.regions import Region

SEQ = 1


class Gradients(Protocol):
    """Where parts of the gradients of all shares are added up."""

    def add(self, owner: int, parts: Sequence[Tensor]) -> None:
        """This rank's parts, wide, for the shares of `owner`; in the order of `shares`."""
        ...

    def home(self) -> list[Tensor]:
        """The gradients of this rank's shares, all ranks' parts added, wide."""
        ...


class Travel(Protocol):
    """One way for shares to be seen; `regions` move one tensor each."""

    @property
    def rank(self) -> int:
        """This rank's place."""
        ...

    def shares(
        self, regions: Sequence[Region], tensors: Sequence[Tensor], kind: str
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """(owner, its tensors), this rank's own first. `kind` F or B names the messages."""
        ...

    def gradients(self, regions: Sequence[Region], like: Sequence[Tensor]) -> Gradients:
        """Adds up gradients of tensors shaped like these."""
        ...


@dataclass(frozen=True)
class Ring:
    """Shares go from rank to rank (Liu et al. 2023)."""

    comm: Comm

    @property
    def rank(self) -> int:
        """This rank's place."""
        return self.comm.rank

    def shares(
        self, regions: Sequence[Region], tensors: Sequence[Tensor], kind: str
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """The next share is under way while this one is used. Each has gone out when the next is there: the
        first may be what attention keeps, whose memory is freed where it is moved away."""
        held, size = [t.contiguous() for t in tensors], self.comm.size
        for step in range(size):
            going, coming = ([], []) if step == size - 1 else _hand_on(regions, held, kind, step)
            yield (self.rank - step) % size, held
            held = [handle.wait() for handle in coming]
            _waited(going)

    def gradients(self, regions: Sequence[Region], like: Sequence[Tensor]) -> Gradients:
        """They follow their shares."""
        return _Following(self, regions)


def _hand_on(
    regions: Sequence[Region], tensors: Sequence[Tensor], kind: str, step: int, slot: int = 0
) -> tuple[list[Handle], list[Handle]]:
    """Sends each tensor to the next rank; handles of those that go, and that come from the one before."""
    going, coming = [], []
    for i, (region, x) in enumerate(zip(regions, tensors, strict=True)):
        comm, key = region.comm, Key(kind, step, 0, slot + i)
        going.append(comm.send(x, (comm.rank + 1) % comm.size, key=key, site=region.site))
        before = (comm.rank - 1) % comm.size
        coming.append(comm.receive(x, before, key=key, site=region.site))
    return going, coming


def _waited(going: list[Handle]) -> None:
    """Until all have gone out; none holds its tensor any longer."""
    while going:
        going.pop().wait()


class _Following:
    """Gradients that go round: a rank's part is added to what comes, and the sum handed on."""

    def __init__(self, ring: Ring, regions: Sequence[Region]) -> None:
        self._ring, self._regions = ring, regions
        self._home: list[Tensor] = []
        self._going: list[Handle] = []
        self._coming: list[Handle] = []
        self._step = 0

    def add(self, owner: int, parts: Sequence[Tensor]) -> None:
        """The own part stays; others travel on."""
        if owner == self._ring.rank:
            self._home = list(parts)
            return
        total = [x if h is None else x.add_(h.wait()) for x, h in self._with_coming(parts)]
        _waited(self._going)
        self._going, self._coming = _hand_on(self._regions, total, "B", self._step, slot=2)
        self._step += 1

    def _with_coming(self, parts: Sequence[Tensor]) -> list[tuple[Tensor, Handle | None]]:
        coming: Sequence[Handle | None] = self._coming or [None] * len(parts)
        return list(zip(parts, coming, strict=True))

    def home(self) -> list[Tensor]:
        """What came last is the own share's."""
        found = [x.add_(h.wait()) for x, h in zip(self._home, self._coming, strict=True)]
        _waited(self._going)
        return found


@dataclass(frozen=True)
class Gather:
    """Every rank has all shares at once (Llama 3)."""

    comm: Comm

    @property
    def rank(self) -> int:
        """This rank's place."""
        return self.comm.rank

    def shares(
        self, regions: Sequence[Region], tensors: Sequence[Tensor], kind: str
    ) -> Iterator[tuple[int, list[Tensor]]]:
        """Gathered along seq."""
        started = [
            r.comm.start_all_gather(t.contiguous(), site=r.site, dim=SEQ)
            for r, t in zip(regions, tensors, strict=True)
        ]
        parts = [h.wait().chunk(self.comm.size, SEQ) for h in started]
        for step in range(self.comm.size):
            owner = (self.rank - step) % self.comm.size
            yield owner, [p[owner] for p in parts]

    def gradients(self, regions: Sequence[Region], like: Sequence[Tensor]) -> Gradients:
        """They are reduced and scattered."""
        return _Scattered(self, regions, like)


class _Scattered:
    """Gradients of all shares side by side, in the wide dtype until they are handed in."""

    def __init__(self, gather: Gather, regions: Sequence[Region], like: Sequence[Tensor]) -> None:
        size = gather.comm.size
        self._size, self._regions, self._dtypes = size, regions, [t.dtype for t in like]
        shapes = [(t.shape[0], t.shape[SEQ] * size, *t.shape[2:]) for t in like]
        self._whole = [
            t.new_empty(s, dtype=wide(t.dtype)) for s, t in zip(shapes, like, strict=True)
        ]

    def add(self, owner: int, parts: Sequence[Tensor]) -> None:
        """Lays them where the owner's share is."""
        for whole, part in zip(self._whole, parts, strict=True):
            whole.chunk(self._size, SEQ)[owner].copy_(part)

    def home(self) -> list[Tensor]:
        """Summed over the ranks in the compute dtype."""
        started = [
            r.comm.start_reduce_scatter(w.to(dtype), site=r.site, dim=SEQ)
            for r, w, dtype in zip(self._regions, self._whole, self._dtypes, strict=True)
        ]
        return [h.wait() for h in started]
