"""Finds the plan that serves a model best on a cluster: every legal one is predicted, none is cut off by a
bound, so the best is proven over

    pp, tp, +sp, ep, etp, dp_shard as places of experts     all divisors of a number of ranks
    engines (dp_replicate)                                  as many as devices hold; goal devices: any
    tokens of a step                                        512, 2048, 8192, where they are not stated
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from partita.base.errors import UsageError
from partita.base.text import did_you_mean
from partita.simulate.serving.predict import Asked, Serving, predict, steps_of, wrongs
from partita.spec.plan import MeshPlan, Plan

GOALS = ("throughput", "latency", "devices")
BATCH_TOKENS = (512, 2048, 8192)


@dataclass(frozen=True)
class Wanted:
    """What a plan is looked for: `goal` is throughput (tokens a second), latency (seconds of a request), or
    devices (the fewest that hold all requests at once). No plan is slower than the limits, where given;
    `batch_tokens` are the sizes of a step to choose from."""

    goal: str = "throughput"
    max_ttft_s: float | None = None
    max_itl_s: float | None = None
    batch_tokens: tuple[int, ...] = BATCH_TOKENS

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise UsageError(
                f"no goal '{self.goal}' of serving{did_you_mean(self.goal, GOALS)}", key="goal"
            )

    def late(self, p: Serving) -> str:
        """Which limit a plan is above; empty where it keeps both."""
        assert p.rates is not None
        if self.max_ttft_s is not None and p.rates.ttft_s > self.max_ttft_s:
            return "max-ttft"
        if self.max_itl_s is not None and p.rates.itl_s > self.max_itl_s:
            return "max-itl"
        return ""

    def key(self, p: Serving) -> tuple[float, ...]:
        """Smaller is better."""
        assert p.rates is not None and p.tokens_per_s is not None
        world = float(p.plan.world_size)
        if self.goal == "latency":
            return p.request_s, world
        if self.goal == "devices":
            return world, -p.tokens_per_s
        return -p.tokens_per_s, world, p.request_s


@dataclass
class FoundServing:
    """What a search found: plans that fit and keep the limits, best first; those that fit but are too slow;
    why the others were refused; and the one that fails by least, where none fits."""

    plans: list[Serving] = field(default_factory=list)
    late: list[Serving] = field(default_factory=list)
    too_big: list[Serving] = field(default_factory=list)
    rejected: Counter[str] = field(default_factory=Counter)
    wrong: str = ""  # of the first that is refused
    considered: int = 0
    seconds: float = 0.0


def search(asked: Asked, wanted: Wanted) -> FoundServing:
    """Predicts every plan."""
    start, found = time.perf_counter(), FoundServing()
    for plan in meshes(asked):
        wrong = wrongs(asked, plan)
        if wrong:
            found.considered += 1
            found.rejected[f"{wrong[0].room} {wrong[0].rule}"] += 1
            found.wrong = found.wrong or wrong[0].message
            continue
        steps = steps_of(asked, plan)
        for tokens in wanted.batch_tokens:
            found.considered += 1
            sized = replace(asked, load=replace(asked.load, max_batch_tokens=tokens))
            _sort_in(_engines(sized, plan, steps, wanted), wanted, found)
    found.plans.sort(key=wanted.key)
    found.seconds = time.perf_counter() - start
    return found


def of_each_plan(plans: Sequence[Serving]) -> list[Serving]:
    """Each plan with its best size of a step, in their order."""
    found: dict[str, Serving] = {}
    for p in plans:
        found.setdefault(p.line, p)
    return list(found.values())


def _sort_in(p: Serving, wanted: Wanted, found: FoundServing) -> None:
    if p.rates is None:
        found.rejected["memory"] += 1
        found.too_big.append(p)
    elif late := wanted.late(p):
        found.rejected[late] += 1
        found.late.append(p)
    elif wanted.goal == "devices" and p.rates.running < p.each:
        found.rejected["requests that wait"] += 1
        found.late.append(p)
    else:
        found.plans.append(p)


def _engines(asked: Asked, plan: Plan, steps: object, wanted: Wanted) -> Serving:
    """With as many engines as there are devices for; of goal devices the fewest that do, since more are never
    slower."""
    most = max(asked.cluster.devices // plan.world_size, 1)
    most = min(most, asked.load.concurrency)

    def of(engines: int) -> Serving:
        return predict(asked, plan.with_("mesh", dp_replicate=engines), steps)  # type: ignore[arg-type]

    best = of(most)
    if wanted.goal != "devices" or not _does(best, wanted):
        return best
    low, high = 1, most
    while low < high:
        middle = (low + high) // 2
        if _does(tried := of(middle), wanted):
            best, high = tried, middle
        else:
            low = middle + 1
    return best if best.engines == low else of(low)


def _does(p: Serving, wanted: Wanted) -> bool:
    return p.rates is not None and p.rates.running == p.each and not wanted.late(p)


def meshes(asked: Asked) -> Iterator[Plan]:
    """Every engine's mesh that the devices hold, legal or not."""
    devices, spec = asked.cluster.devices, asked.model
    for ranks in (n for n in range(1, devices + 1) if _whole(n, asked)):
        for pp in (n for n in divisors(ranks) if n <= spec.layers + 2):
            for tp in divisors(ranks // pp):
                rest = ranks // pp // tp
                for sp in (False, True)[: 1 + (tp > 1)]:
                    for ep, etp in _experts(asked, tp * rest, tp, sp, rest):
                        shard = rest if spec.experts else 1
                        if shard != rest:
                            continue
                        mesh = MeshPlan(pp=pp, dp_shard=shard, tp=tp, ep=ep, etp=etp, sp=sp)
                        yield Plan(mesh=mesh)


def _experts(asked: Asked, fold: int, tp: int, sp: bool, rest: int) -> Iterator[tuple[int, int]]:
    """(ep, etp): of ranks beyond tp all are places of experts."""
    if not asked.model.experts:
        yield 1, 1
        return
    for etp in dict.fromkeys((1, tp)):
        if fold % etp:
            continue
        for ep in divisors(fold // etp):
            whole = ep * etp == fold
            if (rest == 1 or whole) and (sp or tp == 1 or etp == tp):
                yield ep, etp


def _whole(ranks: int, asked: Asked) -> bool:
    """Numbers of ranks that are tried: all on few devices, else those that fill nodes or parts of one."""
    each = asked.cluster.devices_per_node
    if asked.cluster.devices <= 16:
        return True
    return each % ranks == 0 or (ranks % each == 0 and asked.cluster.devices % ranks == 0)


def divisors(n: int) -> Sequence[int]:
    """Of a number, rising."""
    return [d for d in range(1, n + 1) if n % d == 0]
