"""What runs once a step: the gradients' reduction, the optimizer, the small sums.

A reduction that the program gives its own lane (dp) runs beside the backward of the last microbatch, block by
block: only the last block's share, and what is longer than that backward, is seen. A program that reduces
afterwards (Software) shows all of it. The optimizer passes every state through memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from partita.cost.machine import Machine
from partita.cost.pieces import on_curve
from partita.parallel.laid import Laid
from partita.parallel.laid_step import LATE
from partita.parallel.read import Call
from partita.parallel.room import axis_name
from partita.simulate.moves import is_move, update_away
from partita.simulate.stage import StageTime, Works, call_seconds
from partita.simulate.unequal import machine_at

GRADIENT_PASSES = 4  # zeroed, measured for the norm, scaled, read by the update
BROUGHT_PASSES = 3  # written as it comes, scaled, read


@dataclass(frozen=True)
class StepTime:
    """Seconds that follow the schedule: exposed collectives by axis (of every update, where stages update
    under way), and the update, where the schedule has none."""

    comm_s: dict[str, float] = field(default_factory=dict)
    optimizer_s: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return sum(self.comm_s.values()) + self.optimizer_s


def step_time(
    laid: Laid, works: Works, stages: Sequence[StageTime], machine: Machine, busy: float = 1.0
) -> StepTime:
    """That of the dearest rank. Sums that the next step waits for lie under its warm-up."""
    comm: dict[str, float] = {}
    update = 0.0
    for place, once in enumerate(works.once):
        mine = [s.index for s in laid.stages_of(place)]
        blocks = sum(works.stages[i].blocks for i in mine)
        backward_s = sum(stages[i].backward_s for i in mine) * busy
        between = {c: n for c, n in once.items() if not is_move(c) and c.lane != LATE}
        updates, here = updates_of(laid, place), machine_at(laid, (place,), machine)
        found = _reduction(laid, between, backward_s * (blocks - 1) / blocks, here, updates or 1)
        away = sum((works.stages[i].away for i in mine), Counter())
        beyond = update_away(away, once, here)
        moved = 0.0 if updates else sum(moved_bytes(works.stages[i].states, laid) for i in mine)
        if not away["optimizer"]:
            moved += BROUGHT_PASSES * away["gradients"]
        own = update_seconds(moved, here) if moved else 0.0
        update = max(update, own + beyond.pop("optimizer", 0.0))
        found |= beyond
        if sum(found.values()) > sum(comm.values()):
            comm = found
    return StepTime({axis: s * busy for axis, s in comm.items()}, update * busy)


def updates_of(laid: Laid, place: int) -> int:
    """Updates that each stage of a place has within its list: none where the step ends with them."""
    made = [a.stage for a in laid.schedule.ranks[place] if a.kind == "U"]
    return made.count(made[0]) if made else 0


def stage_update_s(works: Works, laid: Laid, machine: Machine) -> list[float]:
    """Seconds of one U of each stage; 0 where the step ends with one update of all."""
    if "U" not in laid.schedule.kinds:
        return [0.0] * len(works.stages)
    places = [machine_at(laid, stage.places, machine) for stage in laid.stages]
    each = zip(works.stages, places, strict=True)
    return [update_seconds(moved_bytes(work.states, laid), here) for work, here in each]


def _reduction(
    laid: Laid, once: Mapping[Call, int], room: float, machine: Machine, updates: int
) -> dict[str, float]:
    """What of the step's collectives is not hidden under `room` seconds of the last backward before each of
    the `updates`."""
    seen: dict[str, float] = defaultdict(float)
    beside: dict[str, float] = defaultdict(float)
    for call, times in once.items():
        s = times * call.times * call_seconds(call, laid, machine)
        (beside if call.lane == "dp" else seen)[axis_name(call.axes)] += s
    total = sum(beside.values())
    hidden = min(total, room) if machine.software.overlaps_gradients else 0.0
    for axis, s in beside.items():
        seen[axis] += updates * s * (total - hidden) / total if total else 0.0
    return {axis: s for axis, s in seen.items() if s}


def update_seconds(moved: float, machine: Machine) -> float:
    """Seconds of an update that moves so many bytes, on the device: as measured, or by the memory's rate."""
    measured = machine.piece("update", "fp32")
    return on_curve(moved, measured) if measured else moved / machine.memory_rate


def moved_bytes(states: Mapping[str, int], laid: Laid) -> float:
    """Bytes that the job's own update moves: by one kernel, or operator by operator, where gradients are
    passed over three times before it."""
    passes = laid.request.update_passes
    if not passes:
        return update_bytes(states)
    blocks = (b for b in laid.program.blocks for t in b.tensors.values() if t.role == "optimizer")
    held = [t for t in next(blocks).tensors.values() if t.role == "optimizer"]
    unit = held[0].name.rpartition(".")[0]
    words = sum(t.dims[0].size for t in held if t.name.rpartition(".")[0] == unit)
    before = states["parameters"] + (GRADIENT_PASSES - 1) * states["gradients"]
    return before + passes * states["optimizer"] / words


def update_bytes(states: Mapping[str, int]) -> float:
    """Bytes that the update moves: parameters written, gradients passed over, states read and written."""
    return states["parameters"] + GRADIENT_PASSES * states["gradients"] + 2 * states["optimizer"]
