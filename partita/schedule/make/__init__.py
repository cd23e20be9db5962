"""Every schedule by its name. One file a family: a generator is a pure function of (p, m, v).

A new one is a file beside these and a line in GENERATORS; the checker, the clock, the executor and
the drawings have never heard of its name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from partita.base.errors import ScheduleError, UsageError
from partita.schedule.ir import Schedule
from partita.schedule.make.dualpipe import dualpipe, dualpipev
from partita.schedule.make.forward import forward
from partita.schedule.make.gpipe import gpipe
from partita.schedule.make.interleaved import interleaved_1f1b
from partita.schedule.make.looped_bfs import looped_bfs
from partita.schedule.make.one_f_one_b import one_f_one_b
from partita.schedule.make.zb_v import zb_v
from partita.schedule.make.zero_bubble import zb_h1, zb_h2
from partita.schedule.text import read_schedule

MAX_ACTIONS = 1_000_000  # stage-microbatches: more is a slip of the hand


@dataclass(frozen=True, slots=True)
class Generator:
    """A generator and the stages a rank holds: 1, 2 (a vee), or as many as are asked for (None)."""

    make: Callable[..., Schedule]
    stages: int | None = 1

    @property
    def virtual(self) -> bool:
        """Whether the number of stages a rank is free."""
        return self.stages is None


GENERATORS = {
    "gpipe": Generator(gpipe),
    "1f1b": Generator(one_f_one_b),
    "interleaved_1f1b": Generator(interleaved_1f1b, stages=None),
    "looped_bfs": Generator(looped_bfs, stages=None),
    "zb_h1": Generator(zb_h1),
    "zb_h2": Generator(zb_h2),
    "zb_v": Generator(zb_v, stages=2),
    "dualpipe": Generator(dualpipe),
    "dualpipev": Generator(dualpipev, stages=2),
    "forward": Generator(forward, stages=None),
}


def schedule(
    name: str, *, num_ranks: int, num_microbatches: int, virtual_stages: int = 1, **opts: object
) -> Schedule:
    """The schedule `name` for p ranks, m microbatches and v stages a rank.

    `name` is a row of GENERATORS, or 'file:<path>.csv' (torch's action CSV). Where the schedule itself
    fixes v at 2 (a vee), 1 stands for it. Raises UsageError for an unknown name or option,
    ScheduleError where the schedule does not exist for these numbers.

    >>> print(schedule("1f1b", num_ranks=2, num_microbatches=2))
    0F0,0F1,0B0,0B1
    1F0,1B0,1F1,1B1
    """
    for what, value in (
        ("num_ranks", num_ranks),
        ("num_microbatches", num_microbatches),
        ("virtual_stages", virtual_stages),
    ):
        if value < 1:
            raise UsageError(f"{what} is {value}; it must be at least 1", key=what)
    if name.strip('"').startswith("file:"):
        return _from_file(name.strip('"').removeprefix("file:"), num_ranks, num_microbatches)
    generator = GENERATORS.get(name)
    if generator is None:
        close = get_close_matches(name, GENERATORS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UsageError(
            f"no schedule is called '{name}'{hint}; there are {', '.join(GENERATORS)}, and "
            "'file:<path>.csv'",
            key="schedule",
        )
    if opts:
        raise UsageError(f"{name} takes no option {', '.join(sorted(opts))}", key=min(opts))
    hold_to_size(num_ranks * virtual_stages, num_microbatches)
    if generator.virtual:
        return _made(generator, num_ranks, num_microbatches, virtual_stages)
    if virtual_stages not in (1, generator.stages):
        others = ", ".join(n for n, g in GENERATORS.items() if g.virtual)
        count = "one stage" if generator.stages == 1 else f"{generator.stages} stages"
        raise ScheduleError(
            f"{name} has {count} a rank, {virtual_stages} were asked for; any number have: {others}"
        )
    return _made(generator, num_ranks, num_microbatches)


def hold_to_size(num_stages: int, num_microbatches: int) -> None:
    """Raises UsageError where there would be more stage-microbatches than anyone means."""
    if num_stages * num_microbatches > MAX_ACTIONS:
        raise UsageError(
            f"{num_stages} stages x {num_microbatches} microbatches are more than {MAX_ACTIONS:,} "
            "stage-microbatches",
            key="num_microbatches",
        )


@lru_cache(maxsize=32)
def _made(generator: Generator, *numbers: int) -> Schedule:
    return generator.make(*numbers)


def _from_file(path: str, num_ranks: int, num_microbatches: int) -> Schedule:
    found = read_schedule(path)
    asked, given = (num_ranks, num_microbatches), (found.num_ranks, found.num_microbatches)
    if asked != given:
        raise ScheduleError(
            f"{path} is a schedule of {given[0]} ranks and {given[1]} microbatches; "
            f"{asked[0]} ranks and {asked[1]} microbatches were asked for"
        )
    return found
