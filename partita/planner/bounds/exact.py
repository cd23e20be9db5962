"""The last bound: of the laid plan itself, on its own stages, messages and schedule. On devices of their
own it is the step time and the memory that `simulate` says.
"""

from __future__ import annotations

from partita.cost.machine import Machine
from partita.parallel.laid import Laid
from partita.planner.bounds.shared import OWN, Turns
from partita.planner.bounds.table import Probe
from partita.schedule.clock import Costs
from partita.simulate.memory import stage_ledger
from partita.simulate.pipeline import Rehearsal
from partita.simulate.predict import stage_costs
from partita.simulate.stage import PartTimes, send_seconds, stage_time, works_of
from partita.simulate.step import step_time
from partita.spec.cluster import Cluster


def laid_memory(laid: Laid, probe: Probe, cluster: Cluster) -> float:
    """Bytes of the fullest rank at least, as the schedule of a short step says."""
    places = range(probe.schedule.num_ranks)
    return float(max(stage_ledger(laid, p, probe.schedule, cluster).peak_bytes for p in places))


def laid_seconds(
    laid: Laid, machine: Machine, step: Rehearsal, m: int = 1, turns: Turns = OWN
) -> float:
    """Step time at least, from the laid plan's own stages and messages; `turns` of ranks that share units, in
    `m` microbatches."""
    works, known = works_of(laid), PartTimes()
    times = [stage_time(w, laid, machine, known) for w in works.stages]
    blocks = machine.software.sends_block
    message = (0.0, 0.0) if blocks else send_seconds(laid, works.stages, machine)
    once = step_time(laid, works, times, machine, turns.once)
    stages = tuple(stage_costs(t, 1.0, 0.0) for t in times)
    mean = m * sum(s.F + s.I + s.W - s.hidden for s in stages) / laid.sizes["pp"]
    seconds = max(turns.path * step.least(Costs(stages, *message)), turns.work * mean)
    return seconds + once.seconds
