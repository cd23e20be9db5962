"""The last bound: of the laid plan itself, on its own stages, messages and schedule. On devices of their
own it is the step time and the memory that `simulate` says.
"""

from __future__ import annotations

import numpy as np

from partita.cost.machine import Machine
from partita.parallel.laid import Laid, lay
from partita.parallel.read import kept_bytes, state_bytes
from partita.parallel.room import Request
from partita.planner.table import Probe
from partita.schedule.clock import Costs
from partita.simulate.away import leaves
from partita.simulate.memory import coming_bytes, lent_bytes, transient_bytes
from partita.simulate.pipeline import Rehearsal
from partita.simulate.predict import stage_costs
from partita.simulate.stage import PartTimes, send_seconds, stage_time, works_of
from partita.simulate.step import step_time


def laid_bound(
    request: Request, machine: Machine, probe: Probe, step: Rehearsal
) -> tuple[float, float]:
    """Step time and memory at least, from the laid plan's own stages and messages. Raises PlanError."""
    laid = lay(request)
    works, known = works_of(laid), PartTimes()
    times = [stage_time(w, laid, machine, known) for w in works.stages]
    send = 0.0 if machine.software.sends_block else send_seconds(laid, works.stages, machine)
    once = step_time(laid, works, times, machine)
    stages = tuple(stage_costs(t, 1.0, 0.0) for t in times)
    seconds = step.least(Costs(stages, send))
    return seconds + once.seconds, _laid_memory(laid, probe)


def _laid_memory(laid: Laid, probe: Probe) -> float:
    known: dict[int, tuple[int, int, int, int]] = {}
    away = leaves(
        laid
    )  # what blocks keep is on the device a block at a time, and counts for nothing
    for s in laid.stages:
        for b in s.blocks:
            if id(b) not in known:
                own, coming = state_bytes(b, laid.sizes), coming_bytes(b, laid.sizes)
                known[id(b)] = (
                    sum(own.values()) - coming,
                    0 if away else kept_bytes(b, laid.sizes),
                    transient_bytes(b, laid.sizes),
                    coming,
                )
    rows = np.array([np.sum([known[id(b)] for b in s.blocks], 0) for s in laid.stages])
    inside = [max(known[id(b)][2] for b in s.blocks) for s in laid.stages]
    lent = [lent_bytes(s.blocks, laid.request.plan) for s in laid.stages]
    most = probe.most(rows[:, 1], rows[probe.held, 3].sum(1))
    states = rows[probe.held, 0].sum(1)
    beside = np.array(inside)[probe.held].max(1) + np.array(lent)[probe.held].max(1)
    return float((states + most + beside).max())
