"""The step of ranks that are not alike: jitter and stragglers, drawn, through the schedule itself.

A step is max over replicas of the pipeline, which meet only at its end. Within one, the ranks of a stage
that meet in every block (tp, cp, ep, shards that are gathered) go at the pace of the slowest of n:

    pace of a stage = max of n draws of exp(rank Z), or slow_factor where one of the n is slow
    an action       = its seconds x pace x max of n draws of exp(compute Z), new for each action

The largest of n independent draws is one draw at U^(1/n), which is exact. Collectives and the optimizer
keep their times. Steps of more actions than the clock plays are drawn at a shorter length, and the share
by which they grow is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from partita.parallel.laid import Laid
from partita.parallel.pp.rules import schedule_of
from partita.schedule.clock import Costs
from partita.schedule.ir import Schedule
from partita.schedule.order import Turn, turns
from partita.simulate.pipeline import FULL, PERIOD, WARM
from partita.simulate.stage import Works
from partita.spec.mesh import FOLD
from partita.spec.reliability import Jitter

if TYPE_CHECKING:
    import numpy as np

LANES = 4_000_000  # actions x replicas x draws at most
DRAWS = (32, 512)  # steps: at least, at most
SEED = 0


@dataclass(frozen=True)
class Crowd:
    """`beside` ranks of a stage meet in every block; `replicas` of the pipeline at the step's end."""

    beside: int
    replicas: int


def crowd(laid: Laid, works: Works) -> Crowd:
    """Who waits for whom, by the axes of the collectives that run in every microbatch."""
    axes = {a for w in works.stages for p in w.parts for c in p.calls for a in c.axes}
    if axes - set(laid.mesh.order) - {"ulysses", "tp/share"}:
        axes |= set(FOLD)  # experts' axes are these, refolded
    beside = 1
    for axis in ("dp_replicate", *FOLD):
        beside *= laid.sizes[axis] if axis in axes else 1
    return Crowd(beside, laid.mesh.world_size // laid.sizes["pp"] // beside)


def drawn_steps(schedule: Schedule, costs: Costs, jitter: Jitter, among: Crowd) -> np.ndarray:
    """Seconds of the schedule in each drawn step: the slowest replica's."""
    import numpy as np

    order = turns(schedule)
    draws = max(min(LANES // (len(order) * among.replicas), DRAWS[1]), DRAWS[0])
    random = np.random.default_rng(SEED)
    shape = (draws, among.replicas)
    pace = [_pace(jitter, among.beside, random, shape) for _ in schedule.ranks]

    def seconds(turn: Turn) -> Any:
        takes = costs.stages[turn.action.stage].of(turn.action.kind) * pace[turn.rank]
        if jitter.compute:
            takes = takes * _largest(jitter.compute, among.beside, random, shape)
        return takes

    return played(order, map(seconds, order), costs).max(axis=1)


def played(order: Sequence[Turn], seconds: Iterable[Any], costs: Costs) -> Any:
    """The last end of turns that take these seconds: numbers, or arrays of many steps at once; messages
    take what `costs` say."""
    import numpy as np

    leave, wires = {other for turn in order for other in turn.far}, dict[int, Any]()
    ends, come = list[Any](), dict[int, Any]()
    for at, (turn, takes) in enumerate(zip(order, seconds, strict=True)):
        start = ends[turn.before] if turn.before >= 0 else 0.0
        for other in turn.far:
            start = np.maximum(start, come[other])
        ends.append(start + takes)
        if at in leave:
            left = np.maximum(ends[at], wires.get(turn.rank, 0.0))
            wires[turn.rank], come[at] = left + costs.wire, left + costs.send
    last = {turn.rank: end for turn, end in zip(order, ends, strict=True)}
    return np.maximum.reduce(list(last.values()))


def _pace(jitter: Jitter, n: int, random: np.random.Generator, shape: tuple[int, int]) -> Any:
    import numpy as np

    pace = _largest(jitter.rank, n, random, shape) if jitter.rank else np.ones(shape)
    if jitter.slow_fraction:
        hit = random.random(shape) < 1 - (1 - jitter.slow_fraction) ** n
        pace = np.where(hit, np.maximum(pace, jitter.slow_factor), pace)
    return pace


def _largest(sigma: float, n: int, random: np.random.Generator, shape: tuple[int, int]) -> Any:
    import numpy as np
    from scipy.special import ndtri

    return np.exp(sigma * ndtri(random.random(shape) ** (1 / n)))


def outlook(
    laid: Laid, works: Works, costs: Costs, jitter: Jitter, times: tuple[float, float]
) -> dict[str, Any]:
    """The answer's `jitter`. `times`: seconds of the schedule where all ranks are alike, and of the step."""
    import numpy as np

    pipeline_s, step_s = times
    plan, p = laid.request.plan, laid.sizes["pp"]
    m = plan.num_microbatches
    if 2 * len(costs.stages) * m > FULL:
        m = min(m, (WARM + PERIOD) * p + m % p)
    schedule = schedule_of(plan.with_("pipeline", num_microbatches=m))
    among = crowd(laid, works)
    order = turns(schedule)
    alike = played(order, [costs.stages[t.action.stage].of(t.action.kind) for t in order], costs)
    found = step_s + pipeline_s * (drawn_steps(schedule, costs, jitter, among) / alike - 1)
    quantiles = {f"p{q}": float(np.quantile(found, q / 100)) for q in (50, 90, 99)}
    return {
        "seed": SEED, "draws": len(found), "meet_in_blocks": among.beside, "replicas": among.replicas,
        "step_time_s": {"mean": float(found.mean()), **quantiles},
        "slowdown": float(found.mean() / step_s),
    }  # fmt: skip
