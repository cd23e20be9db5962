"""Placements: how stages lie on ranks (pictures in schedule/ir.py).

line           stage s -> rank s               one stage a rank
loop           stage s -> rank s mod p         v stages a rank
vee            stage s -> min(s, 2p-1-s)       two stages a rank: rank r holds r and 2p-1-r
wave           down, up, down ...              v stages a rank; a vee where v is 2
bidirectional  stage s -> rank s or p-1-s      two copies of every stage, one for each direction
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from partita.base.errors import ScheduleError
from partita.schedule.ir import Action, Placement, Schedule

RankList = Callable[[int], Iterable[Action]]


def line(name: str, num_ranks: int, num_microbatches: int, rank_list: RankList) -> Schedule:
    """A schedule of one stage a rank; `rank_list(rank)` are its actions in order."""
    return loop(name, num_ranks, num_microbatches, 1, rank_list)


def loop(
    name: str, num_ranks: int, num_microbatches: int, virtual_stages: int, rank_list: RankList
) -> Schedule:
    """A schedule of v stages a rank: rank r holds stages r, p+r, 2p+r, ..."""
    placement = loop_placement(num_ranks, virtual_stages)
    return placed(name, num_ranks, num_microbatches, placement, rank_list)


def vee(name: str, num_ranks: int, num_microbatches: int, rank_list: RankList) -> Schedule:
    """A schedule of two stages a rank, down and up again: rank r holds stages r and 2p-1-r."""
    return placed(name, num_ranks, num_microbatches, vee_placement(num_ranks), rank_list)


def bidirectional(
    name: str, num_ranks: int, direction: tuple[int, ...], rank_list: RankList
) -> Schedule:
    """A schedule of two copies of each stage; microbatch k goes in `direction[k]`."""
    p = num_ranks
    ways = (tuple(range(p)), tuple(reversed(range(p))))
    ranks = tuple(tuple(rank_list(rank)) for rank in range(p))
    return Schedule(name, p, p, len(direction), ways, ranks, direction=direction)


def loop_placement(num_ranks: int, virtual_stages: int) -> Placement:
    """The rank of each of the pv stages of a loop."""
    return tuple(stage % num_ranks for stage in range(num_ranks * virtual_stages))


def vee_placement(num_ranks: int) -> Placement:
    """The rank of each of the 2p stages of a vee."""
    return wave_placement(num_ranks, 2)


def wave_placement(num_ranks: int, virtual_stages: int) -> Placement:
    """The rank of each of the pv stages that go down the ranks and up again in turn (Liu et al. 2023, Hanayo,
    arXiv 2308.15762): no message is sent where a wave turns."""
    down = tuple(range(num_ranks))
    turns = (down if chunk % 2 == 0 else down[::-1] for chunk in range(virtual_stages))
    return tuple(rank for turn in turns for rank in turn)


def placed(
    name: str, num_ranks: int, num_microbatches: int, placement: Placement, rank_list: RankList
) -> Schedule:
    """A schedule of stages placed anywhere; `rank_list(rank)` are its actions in order."""
    ranks = tuple(tuple(rank_list(rank)) for rank in range(num_ranks))
    return Schedule(name, num_ranks, len(placement), num_microbatches, placement, ranks)


def require(holds: bool, name: str, asked: str, rule: str, instead: str = "") -> None:
    """Raises ScheduleError unless the generator's rule holds; `instead` takes these numbers."""
    if not holds:
        hint = f"; {instead}" if instead else ""
        raise ScheduleError(f"{name} does not exist for {asked}: it needs {rule}{hint}")
