"""Placements: how stages lie on ranks.

line  stage s -> rank s                 one stage a rank
loop  stage s -> rank s mod p           v stages a rank
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from partita.schedule.ir import Action, Schedule

RankList = Callable[[int], Iterable[Action]]


def line(name: str, num_ranks: int, num_microbatches: int, rank_list: RankList) -> Schedule:
    """A schedule of one stage a rank; `rank_list(rank)` are its actions in order."""
    return loop(name, num_ranks, num_microbatches, 1, rank_list)


def loop(
    name: str, num_ranks: int, num_microbatches: int, virtual_stages: int, rank_list: RankList
) -> Schedule:
    """A schedule of v stages a rank: rank r holds stages r, p+r, 2p+r, ..."""
    num_stages = num_ranks * virtual_stages
    return Schedule(
        name=name,
        num_ranks=num_ranks,
        num_stages=num_stages,
        num_microbatches=num_microbatches,
        placement=tuple(stage % num_ranks for stage in range(num_stages)),
        ranks=tuple(tuple(rank_list(rank)) for rank in range(num_ranks)),
    )
