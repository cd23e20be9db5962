"""Every schedule by its name. One file a family: a generator is a pure function of (p, m, v).

A new one is a file beside these and a line in GENERATORS; the checker, the clock, the executor and
the drawings have never heard of its name.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from importlib import import_module

from partita.base.errors import ScheduleError, UsageError
from partita.schedule.ir import Schedule
from partita.schedule.text import read_schedule

MAX_ACTIONS = 1_000_000  # stage-microbatches: more is a slip of the hand


@dataclass(frozen=True, slots=True)
class Generator:
    """Where a generator is, the stages a rank holds (1, 2 in a vee, None for as many as are asked for),
    and the options it takes besides. Its file is read when it is asked for."""

    file: str
    function: str
    stages: int | None = 1
    options: tuple[str, ...] = ()

    @property
    def virtual(self) -> bool:
        """Whether the number of stages a rank is free."""
        return self.stages is None

    @property
    def make(self) -> Callable[..., Schedule]:
        """The generator itself."""
        return getattr(import_module(f"{__name__}.{self.file}"), self.function)


GENERATORS = {
    "gpipe": Generator("gpipe", "gpipe"),
    "1f1b": Generator("one_f_one_b", "one_f_one_b"),
    "interleaved_1f1b": Generator("interleaved", "interleaved_1f1b", stages=None),
    "looped_bfs": Generator("looped_bfs", "looped_bfs", stages=None),
    "zb_h1": Generator("zero_bubble", "zb_h1"),
    "zb_h2": Generator("zero_bubble", "zb_h2"),
    "zb_v": Generator("zb_v", "zb_v", stages=2),
    "v_half": Generator("v_memory", "v_half", stages=2),
    "v_min": Generator("v_memory", "v_min", stages=2),
    "interleaved_zb": Generator("interleaved_zb", "interleaved_zb", stages=None),
    "dualpipe": Generator("dualpipe", "dualpipe"),
    "dualpipev": Generator("dualpipe", "dualpipev", stages=2),
    "chimera": Generator("chimera", "chimera"),
    "pipedream": Generator("pipedream", "pipedream", options=("vertical_sync",)),
    "pipedream_2bw": Generator("pipedream", "pipedream_2bw", options=("updates",)),
    "forward": Generator("forward", "forward", stages=None),
    "auto": Generator(
        "auto", "auto", stages=None, options=("costs", "limit", "limit_in_bytes", "copies", "seed")
    ),
}
_SHARE = re.compile(r"v_([1-9]\d*)_([1-9]\d*)")  # a stated memory, e.g. v_2_3
FAMILY = Generator("v_memory", "v_share", stages=2)
NAMES = (*GENERATORS, "v_<num>_<den>")


def schedule(
    name: str,
    *,
    num_ranks: int,
    num_microbatches: int,
    virtual_stages: int = 1,
    **options: object,
) -> Schedule:
    """The schedule `name` for p ranks, m microbatches and v stages a rank.

    `name` is one of NAMES, or 'file:<path>.csv' (torch's action CSV). Where the schedule itself fixes v
    at 2 (a vee), 1 stands for it. Raises UsageError for an unknown name or option, ScheduleError where
    the schedule does not exist for these numbers.

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
    generator, fixed = generator_of(name)
    unknown = sorted(set(options) - set(generator.options))
    if unknown:
        raise UsageError(f"{name} takes no option {', '.join(unknown)}", key=unknown[0])
    hold_to_size(num_ranks * virtual_stages, num_microbatches)
    if virtual_stages not in (1, generator.stages) and not generator.virtual:
        others = ", ".join(n for n, g in GENERATORS.items() if g.virtual)
        count = "one stage" if generator.stages == 1 else f"{generator.stages} stages"
        raise ScheduleError(
            f"{name} has {count} a rank, {virtual_stages} were asked for; any number have: {others}"
        )
    numbers = (*fixed, num_ranks, num_microbatches)
    numbers += (virtual_stages,) if generator.virtual else ()
    return _made(generator, numbers, tuple(sorted(options.items())))


def generator_of(name: str) -> tuple[Generator, tuple[int, ...]]:
    """The generator of a name and the numbers that the name itself states. Raises UsageError."""
    share = _SHARE.fullmatch(name)
    if share:
        return FAMILY, (int(share[1]), int(share[2]))
    if name in GENERATORS:
        return GENERATORS[name], ()
    close = get_close_matches(name, GENERATORS, n=1)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UsageError(
        f"no schedule is called '{name}'{hint}; there are {', '.join(NAMES)}, and 'file:<path>.csv'",
        key="schedule",
    )


def hold_to_size(num_stages: int, num_microbatches: int) -> None:
    """Raises UsageError where there would be more stage-microbatches than anyone means."""
    if num_stages * num_microbatches > MAX_ACTIONS:
        raise UsageError(
            f"{num_stages} stages x {num_microbatches} microbatches are more than {MAX_ACTIONS:,} "
            "stage-microbatches",
            key="num_microbatches",
        )


@lru_cache(maxsize=32)
def _made(
    generator: Generator, numbers: tuple[int, ...], options: tuple[tuple[str, object], ...]
) -> Schedule:
    return generator.make(*numbers, **dict(options))


def _from_file(path: str, num_ranks: int, num_microbatches: int) -> Schedule:
    from partita.schedule.make.files import read_proven  # only a user's own may be wrong

    found = read_schedule(path)
    asked, given = (num_ranks, num_microbatches), (found.num_ranks, found.num_microbatches)
    if asked != given:
        raise ScheduleError(
            f"{path} is a schedule of {given[0]} ranks and {given[1]} microbatches; "
            f"{asked[0]} ranks and {asked[1]} microbatches were asked for"
        )
    return read_proven(path)
