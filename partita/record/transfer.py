"""A Transfer is one call that moves bytes between ranks, predicted or recorded: both look alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Transfer:
    """One collective or send as one rank sees it.

    `bytes` is the size of the tensor this rank hands *in* (all_gather: its shard; reduce_scatter: the
    whole input; a receive is not counted, so it is no Transfer). `axis` is a mesh axis, a product
    joined by '.', 'tied' or 'tp/share'. `phase` is F, B, I, W or step: replayed regions are B.
    `site` is '<block>.<op>:<region kind>', e.g. 'blocks.3.attention.wo:reduce_from'.
    """

    rank: int
    axis: str
    op: str
    site: str
    phase: str
    bytes: int
    step: int = 0
    microbatch: int = -1
    start_s: float = 0.0
    end_s: float = 0.0


@dataclass(frozen=True, slots=True, order=True)
class TrafficLine:
    """Equal transfers of one rank in one step, joined: `bytes` is the sum over `count` calls."""

    rank: int
    axis: str
    op: str
    site: str
    phase: str
    count: int
    bytes: int


def summarise(transfers: list[Transfer]) -> list[TrafficLine]:
    """Joins transfers of the same rank, axis, op, site and phase; sorted."""
    return joined(TrafficLine(t.rank, t.axis, t.op, t.site, t.phase, 1, t.bytes) for t in transfers)


def joined(lines: Iterable[TrafficLine]) -> list[TrafficLine]:
    """Lines of the same rank, axis, op, site and phase added up; sorted."""
    found: dict[tuple[int, str, str, str, str], list[int]] = {}
    for t in lines:
        entry = found.setdefault((t.rank, t.axis, t.op, t.site, t.phase), [0, 0])
        entry[0] += t.count
        entry[1] += t.bytes
    return sorted(TrafficLine(*key, count, size) for key, (count, size) in found.items())
