"""The mesh: where each rank stands on every axis, and who shares its place on the others.

Integers only. The order of axes is part of the plan; both views of the ranks are known at once:

    dense    pp dp_replicate dp_shard cp ulysses tp split
    experts  pp dp_replicate efsdp ep etp            the same ranks, dp_shard*cp*ulysses*tp refolded

split cuts convolutional models, which have no experts: the experts' view leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import isqrt, prod

DENSE = ("pp", "dp_replicate", "dp_shard", "cp", "ulysses", "tp", "split")
EXPERT = ("pp", "dp_replicate", "efsdp", "ep", "etp")
FOLD = ("dp_shard", "cp", "ulysses", "tp")
_UNFOLD = ("etp", "ep", "efsdp")


@lru_cache(maxsize=4096)
def divisors(n: int) -> tuple[int, ...]:
    """All divisors, smallest first."""
    low = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*low, *(n // d for d in low)}))


@dataclass(frozen=True)
class Mesh:
    """Axis sizes (as Plan.sizes) and the order of the plan's axes, innermost first.

    >>> mesh = Mesh({"pp": 2, "dp_replicate": 1, "dp_shard": 1, "cp": 1, "ulysses": 1, "tp": 2,
    ...              "efsdp": 2, "ep": 1, "etp": 1})
    >>> mesh.groups("tp")
    ((0, 1), (2, 3))
    >>> mesh.groups("pp")
    ((0, 2), (1, 3))
    """

    sizes: Mapping[str, int]
    order: tuple[str, ...] = ("tp", "cp", "dp_shard", "dp_replicate", "pp")

    @cached_property
    def _order(self) -> tuple[str, ...]:
        """Ulysses is the inner part of cp; split stands inside tp, where there is one."""
        inner = {"cp": ("ulysses", "cp"), "tp": ("split", "tp")}
        axes = (a for axis in self.order for a in inner.get(axis, (axis,)))
        return tuple(a for a in axes if a != "split" or self.sizes.get(a, 1) > 1)

    @cached_property
    def world_size(self) -> int:
        """Number of ranks."""
        return prod(self.sizes[a] for a in self._order)

    def coords(self, rank: int) -> dict[str, int]:
        """The rank's coordinate on every axis, of both views."""
        at = {"split": 0}
        for axis in self._order:
            rank, at[axis] = divmod(rank, self.sizes[axis])
        inner = 0
        for axis in FOLD:
            inner = inner * self.sizes[axis] + at[axis]
        for axis in _UNFOLD:
            inner, at[axis] = divmod(inner, self.sizes[axis])
        return at

    def rank_of(self, coords: Mapping[str, int]) -> int:
        """The rank at dense coordinates; axes left out are 0."""
        rank = 0
        for axis in reversed(self._order):
            rank = rank * self.sizes[axis] + coords.get(axis, 0)
        return rank

    @cached_property
    def _met(self) -> dict[tuple[int, tuple[str, ...]], tuple[int, ...]]:
        """Groups that were asked for: each is found by a look at every rank."""
        return {}

    def group(self, rank: int, *axes: str) -> tuple[int, ...]:
        """The ranks that differ from `rank` on `axes` only, the last axis innermost."""
        found = self._met.get((rank, axes))
        if found is None:
            found = self._met[rank, axes] = self._group(rank, axes)
        return found

    def _group(self, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
        view = EXPERT if set(axes) & set(_UNFOLD) else DENSE
        mine = self.coords(rank)
        fixed = [a for a in view if a not in axes]
        found = [
            (tuple(at[a] for a in axes), other)
            for other in range(self.world_size)
            for at in [self.coords(other)]
            if all(at[a] == mine[a] for a in fixed)
        ]
        return tuple(r for _, r in sorted(found))

    def groups(self, *axes: str) -> tuple[tuple[int, ...], ...]:
        """All groups over a product of axes: they tile the ranks."""
        view = EXPERT if set(axes) & set(_UNFOLD) else DENSE
        fixed = [a for a in view if a not in axes]
        found: dict[tuple[int, ...], list[tuple[tuple[int, ...], int]]] = {}
        for rank in range(self.world_size):
            at = self.coords(rank)
            entry = found.setdefault(tuple(at[a] for a in fixed), [])
            entry.append((tuple(at[a] for a in axes), rank))
        return tuple(sorted(tuple(r for _, r in sorted(g)) for g in found.values()))

    def __str__(self) -> str:
        return "mesh " + " x ".join(f"{a}{self.sizes[a]}" for a in reversed(self._order))
