"""Predicted beside measured: traffic line by line, memory category by category."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from partita.record.transfer import TrafficLine


@dataclass(frozen=True)
class TrafficPair:
    """One kind of transfer of one rank in one step: what was declared and what was recorded. Rows to experts
    are declared for even loads and go where routers send them: of these the number of calls is compared, and
    `verify`, which knows what was chosen, compares their bytes."""

    rank: int
    axis: str
    op: str
    site: str
    phase: str
    declared_count: int = 0
    declared_bytes: int = 0
    recorded_count: int = 0
    recorded_bytes: int = 0
    equal: bool = True


def pair_traffic(
    declared: Sequence[TrafficLine], recorded: Sequence[TrafficLine]
) -> list[TrafficPair]:
    """Declared and recorded lines side by side, exact: a line that one side lacks is there with 0."""
    both: dict[tuple[int, str, str, str, str], list[int]] = {}
    for place, lines in ((0, declared), (2, recorded)):
        for t in lines:
            entry = both.setdefault((t.rank, t.axis, t.op, t.site, t.phase), [0, 0, 0, 0])
            entry[place] += t.count
            entry[place + 1] += t.bytes
    return [
        TrafficPair(*key, n[0], n[1], n[2], n[3], _equal(key, n)) for key, n in sorted(both.items())
    ]


def _equal(key: tuple[int, str, str, str, str], n: list[int]) -> bool:
    routed = key[1:3] == ("ep", "all_to_all")
    return n[0] == n[2] and (routed or n[1] == n[3])


def join_blocks(pairs: Sequence[TrafficPair]) -> list[TrafficPair]:
    """Lines that differ only in the number of their block, joined as 'blocks.*': equal if all are."""
    found: dict[tuple[int, str, str, str, str], TrafficPair] = {}
    for p in pairs:
        site = re.sub(r"^blocks\.\d+", "blocks.*", p.site)
        key = (p.rank, p.axis, p.op, site, p.phase)
        q = found.get(key, TrafficPair(*key))
        found[key] = TrafficPair(
            *key,
            q.declared_count + p.declared_count,
            q.declared_bytes + p.declared_bytes,
            q.recorded_count + p.recorded_count,
            q.recorded_bytes + p.recorded_bytes,
            q.equal and p.equal,
        )
    return list(found.values())
