"""Schedules as text: torch's action CSV, one line a rank, one cell an action (``2F0``).

Empty cells are idle places of other generators and are skipped. Two actions that overlap share a
cell: ``(0F4;7B1)OVERLAP_F_B``; ``0F4+7B1``, shorter, is shown and read too, as is ``2REDUCE`` for torch's
``2REDUCE_GRAD``. torch has no name for U, OFFLOAD, RELOAD and FREE: its reader refuses them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from partita.base.errors import PartitaError, ScheduleError, UsageError
from partita.schedule.ir import (
    ACTIVATIONS,
    COMPUTE,
    KINDS,
    STEP,
    WEIGHTS,
    Action,
    Placement,
    Schedule,
)
from partita.schedule.staircase import marked

Program = tuple[tuple[Action, ...], ...]
_ACTION = re.compile(rf"(\d{{1,18}})({'|'.join((*KINDS, 'REDUCE_GRAD'))})(\d{{0,18}})")
FOREIGN = ("U", *ACTIVATIONS)  # kinds that torch has no name for
_SHOWN = 24  # characters of a cell in a picture
_OVERLAP = re.compile(r"\(([^;]+);([^)]+)\)OVERLAP_F_B")


def parse_action(text: str) -> Action:
    """An action from its text, e.g. '2F0'. Raises UsageError.

    >>> parse_action("2F0")
    Action(stage=2, kind='F', microbatch=0)
    """
    found = _ACTION.fullmatch(text.strip())
    kind = found[2].removesuffix("_GRAD") if found else ""
    if not found or not (found[3] or kind in WEIGHTS):
        raise UsageError(
            f"'{text.strip()}' is not an action: write <stage><kind><microbatch>, e.g. 2F0; "
            f"kinds are {' '.join(KINDS)}"
        )
    return Action(int(found[1]), kind, int(found[3]) if found[3] else STEP)


def cells(actions: Iterable[Action], paired: frozenset[Action] = frozenset()) -> list[str]:
    """The actions as cells; an overlapped pair is one cell, joined by '+'."""
    return ["+".join(map(str, cell)) for cell in _cells(actions, paired)]


def _cells(actions: Iterable[Action], paired: frozenset[Action]) -> list[list[Action]]:
    out: list[list[Action]] = []
    joins = False
    for action in actions:
        if joins:
            out[-1].append(action)
        else:
            out.append([action])
        joins = action in paired
    return out


def print_schedule(schedule: Schedule) -> str:
    """The CSV of a schedule: one line a rank, as torch's reader takes it.

    >>> from partita.schedule.make import schedule
    >>> print(print_schedule(schedule("dualpipev", num_ranks=1, num_microbatches=2)))
    0F0,1F0,0F1,1B0,(1F1;0B0)OVERLAP_F_B,1B1,0I1,0W1
    """
    return "\n".join(
        ",".join(map(_as_torch, _cells(actions, schedule.paired))) for actions in schedule.ranks
    )


def print_ranks(ranks: Sequence[Sequence[Action]]) -> str:
    """The CSV of plain action lists, e.g. those of `with_communication`."""
    return "\n".join(",".join(_as_torch([a]) for a in actions) for actions in ranks)


def _as_torch(cell: Sequence[Action]) -> str:
    names = [str(a._replace(kind="REDUCE_GRAD") if a.kind == "REDUCE" else a) for a in cell]
    return names[0] if len(names) == 1 else f"({';'.join(names)})OVERLAP_F_B"


def parse_schedule(text: str, name: str = "file") -> Schedule:
    """A schedule from its CSV; the numbers of stages and microbatches and the placement are read off, or both
    placements, where each stage lies on ranks r and p-1-r and a microbatch goes one of the two ways.

    Only compute actions are kept: what passes add is added again when it runs. A file in which a stage
    is updated before its last backward is asynchronous: where U stands says which weights F uses, B uses
    the same, and the list ends the step. Raises
    UsageError for a cell that is no action, ScheduleError for a stage that lies on two ranks and for a
    rank that computes nothing.
    """
    return parse_program(text, name)[0]


def parse_program(text: str, name: str = "file") -> tuple[Schedule, Program | None]:
    """The same, and the file's lists with actions of passes (SEND, REDUCE ...), where it has any."""
    paired: set[Action] = set()
    program: list[tuple[Action, ...]] = []
    for row, line in enumerate(text.rstrip().splitlines()):
        try:
            program.append(_parse_rank(line, paired))
        except UsageError as error:
            where = f"{name}, line {row + 1}"
            raise UsageError(f"{where}: {error.message}\n{_strange(row, line)}") from None
    ranks = tuple(tuple(a for a in row if a.kind in COMPUTE) for row in program)
    actions = [a for r in ranks for a in r]
    if not any(a.kind == "F" for a in actions):
        raise UsageError(
            f"{name} holds no forward; one line a rank is wanted, e.g. 0F0,0F1,0B0,0B1"
        )
    _hold_busy(name, ranks)
    _hold_numbers(name, ranks)
    placement, direction = _placed(name, ranks)
    made = Schedule(
        name=name,
        num_ranks=len(ranks),
        num_stages=max(a.stage for a in actions) + 1,
        num_microbatches=max(a.microbatch for a in actions) + 1,
        placement=placement,
        ranks=ranks,
        direction=direction,
        paired=frozenset(paired),
        versions="stated" if any(map(_updates_early, ranks)) else "flush",
    )
    added = any(a.kind not in COMPUTE for row in program for a in row)
    return made, tuple(program) if added else None


def _hold_busy(name: str, ranks: Sequence[Sequence[Action]]) -> None:
    """Raises ScheduleError where a rank computes nothing, as one whose line is blank."""
    idle = next((rank for rank, actions in enumerate(ranks) if not actions), None)
    if idle is not None:
        raise ScheduleError(
            f"{name}, line {idle + 1}: rank {idle} has no action to compute; every line is a rank with a "
            "stage of its own: fill the line, or take it out"
        )


def _hold_numbers(name: str, ranks: Sequence[Sequence[Action]]) -> None:
    """Raises ScheduleError where a stage or microbatch is numbered beyond what so many actions can have:
    what is missing below it is then not worth listing."""
    count = sum(map(len, ranks))
    for rank, actions in enumerate(ranks):
        for place, action in enumerate(actions):
            largest = max(action.stage, action.microbatch)
            if largest >= count:
                raise ScheduleError(
                    f"{name}: rank {rank} runs {action}, but each of stages or microbatches 0 to {largest} "
                    f"needs a forward, and the file has {count} actions\n"
                    + marked(rank, actions, place, f"a number below {count} is wanted")
                )


def _updates_early(actions: Sequence[Action]) -> bool:
    updated: set[int] = set()
    for action in actions:
        if action.kind == "U":
            updated.add(action.stage)
        elif action.kind in ("B", "W") and action.stage in updated:
            return True
    return False


def _parse_rank(line: str, paired: set[Action]) -> tuple[Action, ...]:
    out: list[Action] = []
    for cell in _split(line):
        actions = _parse_cell(cell)
        paired.update(actions[:-1])
        out += actions
    return tuple(out)


def _split(line: str) -> list[str]:
    cells = (cell.strip().strip('"') for cell in line.split(","))
    return [cell for cell in cells if cell]


def _parse_cell(cell: str) -> list[Action]:
    """One action, or those that overlap. Raises UsageError."""
    found = _OVERLAP.fullmatch(cell)
    actions = [parse_action(part) for part in (found.groups() if found else cell.split("+"))]
    strange = next((a for a in actions if len(actions) > 1 and a.kind not in COMPUTE), None)
    if strange is not None:
        raise UsageError(f"'{cell}': {strange} overlaps nothing; a pair is an F, then a B or an I")
    return actions


def _strange(rank: int, line: str) -> str:
    """A picture of the first cell of a line that cannot be read."""
    cells = _split(line)
    for place, cell in enumerate(cells):
        try:
            _parse_cell(cell)
        except UsageError:
            shown = [text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..." for text in cells]
            return marked(rank, shown, place, "cannot be read")
    raise AssertionError("a line that was refused has such a cell")


def _placed(
    name: str, ranks: Sequence[Sequence[Action]]
) -> tuple[Placement | tuple[Placement, Placement], tuple[int, ...] | None]:
    """The placement; or those of two ways, and the way of each microbatch. Raises ScheduleError."""
    where: dict[int, set[int]] = {}
    for rank, actions in enumerate(ranks):
        for action in actions:
            where.setdefault(action.stage, set()).add(rank)
    missing = sorted(set(range(max(where) + 1)) - set(where))
    if missing:
        raise ScheduleError(
            f"{name}: stages 0 to {max(where)} are named, but none of the ranks runs "
            f"stage {', '.join(map(str, missing))}\n{_beyond(missing[0], ranks)}"
        )
    for stage, found in sorted(where.items()):
        if len(found) > 1:
            both = _two_ways(ranks, len(where))
            if both is not None:
                return both
            raise ScheduleError(
                f"{name}: stage {stage} runs on ranks {', '.join(map(str, sorted(found)))}; in a file a "
                "stage lies on one rank, or each on ranks r and p-1-r of an even p\n"
                f"{_stray(stage, found, ranks)}"
            )
    return tuple(min(where[stage]) for stage in sorted(where)), None


def _two_ways(
    ranks: Sequence[Sequence[Action]], stages: int
) -> tuple[tuple[Placement, Placement], tuple[int, ...]] | None:
    """The first whole microbatch's way and its mirror image, where the whole ones go these two and no other.
    One that is not whole goes the way of most of its actions: what stands elsewhere is for the checker."""
    at: dict[int, Counter[tuple[int, int]]] = {}
    for rank, actions in enumerate(ranks):
        for stage, kind, microbatch in actions:
            if kind != "U":  # of both copies
                at.setdefault(microbatch, Counter())[stage, rank] += 1
    whole = [
        tuple(rank for _, rank in sorted(found))
        for _, found in sorted(at.items())
        if [stage for stage, _ in sorted(found)] == list(range(stages))
    ]
    if len(ranks) % 2 or not whole:
        return None
    ways = whole[0], tuple(len(ranks) - 1 - rank for rank in whole[0])
    if set(whole) != set(ways):
        return None
    direction = []
    for microbatch in range(max(at) + 1):
        found = at.get(microbatch, Counter())
        there, back = (sum(n for (s, r), n in found.items() if way[s] == r) for way in ways)
        direction.append(int(back > there))
    return ways, tuple(direction)


def _beyond(missing: int, ranks: Sequence[Sequence[Action]]) -> str:
    """A picture of the first action of the next stage that there is."""
    stage, rank, place = min(
        (a.stage, rank, place)
        for rank, actions in enumerate(ranks)
        for place, a in enumerate(actions)
        if a.stage > missing
    )
    return marked(
        rank,
        ranks[rank],
        place,
        f"{ranks[rank][place]} is of stage {stage}, and no rank has {missing}",
    )


def _stray(stage: int, found: Iterable[int], ranks: Sequence[Sequence[Action]]) -> str:
    """A picture of the stage's first action on the rank that has fewest of it."""
    rank = min(found, key=lambda r: sum(a.stage == stage for a in ranks[r]))
    place = next(i for i, a in enumerate(ranks[rank]) if a.stage == stage)
    return marked(rank, ranks[rank], place, f"{ranks[rank][place]} lies elsewhere")


def read_schedule(path: str | Path) -> Schedule:
    """A schedule from a CSV file. Raises UsageError where it is missing or not text."""
    return read_program(path)[0]


def read_program(path: str | Path) -> tuple[Schedule, Program | None]:
    """A schedule from a CSV file, and its lists with actions of passes where the file has any."""
    from partita.base.config import read_text  # slow to import, and only files need it

    try:
        return parse_program(read_text(path), name=str(path))
    except PartitaError as error:
        error.file = error.file or str(path)
        raise
