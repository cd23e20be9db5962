"""`auto` among the schedules: made for what the stages of a plan are predicted to cost and the memory they
leave, and chosen where it is better than the best named schedule by MARGIN.

few devices    every plan, as a space of its own: schedule-free bounds of its stages on a line, a loop, a vee
more           the meshes of the best plans (BEST at most), with every choice but those of the mesh

A bound of weight halves apart holds for every order of stages that lie alike; what an order holds is at least
one microbatch; then synth/bounds.py says what no order within the limit undercuts. The plan's line states the
costs and the limit (`pipeline.costs`, `pipeline.limit`), so it runs the schedule that was predicted. Left out
are steps of more than MOST stage-microbatches: there a schedule repeats itself, and is not played whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from partita.base.errors import Problem
from partita.planner.bounds.columns import KEPT, TIMES
from partita.planner.bounds.table import Probe, Table
from partita.planner.search.elsewhere import ways_of
from partita.planner.search.levels import Levels
from partita.planner.search.nodes import Found, Goal, Node
from partita.planner.search.search import Search
from partita.planner.space import Leaf, MeshChoice, Shape, Space, Tokens, Words
from partita.schedule.clock import Costs, StageCosts
from partita.schedule.synth.bounds import lower_bound
from partita.schedule.synth.flow import flow_of
from partita.simulate.pipeline import FULL
from partita.simulate.predict import weigh, wrongs
from partita.spec.plan import DEFAULT_ORDER, OffloadPlan, Plan
from partita.spec.stage_costs import write_costs

MARGIN = 0.01  # of what is best, that a schedule without a name must save
FEW, BEST = 16, 2
MOST = FULL // 2  # stage-microbatches
SHORT_S = 2.0  # on more devices
FINE = 300  # the dearest stage's seconds, in units of what a plan's line states
LIE = {1: ("auto",), 2: ("auto_loop", "auto_vee")}  # by the stages of a rank
TRIES = 3  # limits, where stages hold unlike much


class MadeSpace(Space):
    """The plans of a space with `auto`."""

    def _all_schedules(self, mesh: MeshChoice) -> list[tuple[str, int]]:
        if mesh.pp == 1 or not self.words.admit("schedule", "auto"):
            return []
        found = [
            (n, v) for v, names in LIE.items() for n in names if self.model.layers >= v * mesh.pp
        ]
        return [(n, v) for n, v in found if self.words.admit("virtual", v)]

    def plan(self, mesh: MeshChoice, shape: Shape, tokens: Tokens, leaf: Leaf) -> Plan:
        """The plan of one leaf: what it is made for says how many stages a rank has."""
        return super().plan(mesh, shape, tokens, leaf._replace(schedule="auto", virtual=1))


class Made(Levels):
    """The steps down to a plan with a schedule of its own."""

    begins = False

    def scheduled(self, node: Node) -> Iterator[Node]:
        """Stages that lie so, with one size of microbatch; then the others."""
        lies = self.bounds.lies(node.mesh, (node.leaf.schedule, node.leaf.virtual))
        for child in super().scheduled(node):
            if child.level == 4 and lies.num_stages * self._microbatches(node) > MOST:
                self.refuse("a step too long for auto", child.leaves)
                continue
            yield child

    def played(self, node: Node) -> Iterator[Node]:
        """What no order within the memory undercuts."""
        costs, m, (_, stages, _) = self._costs(node), self._microbatches(node), self._parts(node)
        lies = self.bounds.lies(node.mesh, (node.leaf.schedule, node.leaf.virtual))
        most, _ = self._rooms(node)
        if most.min() < node.leaf.virtual:
            self.refuse("memory", 1)
            return
        rank = {s: r for r, mine in enumerate(lies.held.tolist()) for s in mine}
        placement = tuple(rank[s] for s in range(lies.num_stages))
        flow = flow_of((placement,), m, costs, most.tolist())
        seconds = self.bounds.turns.least(node.mesh, lower_bound(flow), stages, m) + node.once
        yield node._replace(level=6, seconds=max(seconds, node.seconds))

    def laid(self, node: Node) -> Iterator[Node]:
        """The schedule made, within the most that memory allows. Stages that may lie in a loop or a vee have
        one, whichever node asks: the better of the two, at the limits of both; it has that placement's
        bound."""
        why: Problem | str = "memory"
        for leaf in self.stated(node):
            told = node._replace(level=7, leaf=leaf)
            job = self.job.with_plan(self.plan(told))
            weighed = weigh(job)
            if weighed is None:
                why = next(p for p in wrongs(job) if p.severity == "error")
            elif weighed.fits:
                yield told._replace(num_bytes=max(told.num_bytes, float(weighed.peak_bytes)))
                return
            else:
                here = weighed.peak_bytes <= self.bounds.limit_bytes
                why = "memory of the host or its disk" if here else "memory"
        self.refuse(why, 1)

    def stated(self, node: Node) -> Iterator[Leaf]:
        """What a schedule may be made for, as a plan's line has it, the most that it may hold first; none
        where the node cannot be."""
        if not self._can_be(node):
            return
        costs, v = self._costs(node), node.leaf.virtual
        unit = max(s.F + s.I + s.W for s in costs.stages) / FINE
        rows = [tuple(round(x / unit) for x in (s.F, s.I, s.W)) for s in costs.stages]
        message = round(costs.send / unit), round(costs.wire / unit)
        texts = write_costs(rows, message)  # type: ignore[arg-type]
        limits = set[int]()
        for name in LIE[v]:
            other = node._replace(leaf=node.leaf._replace(schedule=name))
            most, mean = (int(x.min()) for x in self._rooms(other))
            limits |= {most, *(mean - i for i in range(TRIES))}
        for limit in (0, *sorted((x for x in limits if x >= v), reverse=True)):
            yield node.leaf._replace(costs=texts, limit=limit)

    def _can_be(self, node: Node) -> bool:
        """Whether blocks can be cut so, and lie on as many stages."""
        leaf, m = node.leaf, self._microbatches(node)
        if leaf.virtual not in LIE or leaf.virtual * node.mesh.pp > self.space.model.layers:
            return False
        probe = self.bounds.probe(node.mesh, LIE[leaf.virtual][0], leaf.virtual, m)
        table = self.bounds.table(node.mesh, node.shape, node.tokens)
        return isinstance(table, Table) and isinstance(probe, Probe)

    def _costs(self, node: Node) -> Costs:
        """What the stages cost at least."""
        (table, stages, _), leaf, b = self._parts(node), node.leaf, self.bounds
        cut = leaf.zero if leaf.dp_shard > 1 else 0
        at = b.links.meetings(node.mesh, node.shape, leaf.dp_shard, cut)
        rows = b.sharded(table, len(stages), at, cut)[:, TIMES].tolist()
        each = tuple(StageCosts(*row) for row in rows)
        mesh, sent = node.mesh, table.sent
        return Costs(each, b.links.send(mesh, sent), b.links.wire(mesh, sent))

    def _rooms(self, node: Node) -> tuple[np.ndarray, np.ndarray]:
        """[rank]: stage-microbatches that a rank may hold at most, of its lightest stage; and of its mean
        one."""
        (table, stages, probe), leaf, b = self._parts(node), node.leaf, self.bounds
        cut = leaf.zero if leaf.dp_shard > 1 else 0
        shards, held = b.shards(node.mesh, node.shape, leaf.dp_shard), probe.held
        parameters, gradients, optimizer = shards.states(stages, cut)[held].sum(1).T
        stays = parameters + optimizer + (gradients if cut < 2 else 0.0)
        stays = stays + b.inside(table, held, True) + b.whole(table, held, [(cut, shards)])[0]
        room, kept = b.limit_bytes - stays, np.maximum(stages[:, KEPT][held], 1.0)
        every = self._microbatches(node) * leaf.virtual
        least, mean = (
            np.clip(room / each, 0, every).astype(int) for each in (kept.min(1), kept.mean(1))
        )
        return least, mean


def made(
    search: Search,
    goal: Goal,
    top: int,
    found: Found,
    budget_s: float,
    every: bool = True,
    first: bool = False,
) -> Found:
    """What was found, and with schedules of their own, as one answer: `every` plan of few devices, else those
    of the best meshes; `first`: any plan that fits."""
    space, start = search.space, time.perf_counter()
    if not space.words.admit("schedule", "auto") or space.model.image is not None:
        return found
    few = every and space.job.cluster.devices <= FEW
    if few or not found.plans:
        for offload in ways_of(space, found):
            more = _search(search, space.words, offload)
            left = max(budget_s - (time.perf_counter() - start), 0.0)
            there = more.best(goal, top, left, first, found.plans, MARGIN)
            found.join_other("schedules made for a plan", there)
            if not there.complete:
                break
        return found
    end = start + min(budget_s, SHORT_S)
    for words in dict.fromkeys(
        _mesh_of(space.words, p.plan) for p in found.plans[: min(top, BEST)]
    ):
        left = end - time.perf_counter()
        if left > 0:
            offload = Plan.parse(found.plans[0].plan).offload
            there = _search(search, words, offload).best(
                goal, top, left, seen=found.plans, margin=MARGIN
            )
            found.made += there.simulated
            found.plans = there.plans
    found.seconds += time.perf_counter() - start
    return found


def _search(search: Search, words: Words, offload: OffloadPlan) -> Search:
    """A search of such plans; what is known of blocks is known here."""
    space = search.space
    more = Search(MadeSpace(space.job, words, space.dtype, offload), Made, search)
    if offload == space.offload and not space.turned and space.stated == more.space.stated:
        more.bounds.share(search.bounds)
    return more


def _mesh_of(words: Words, line: str) -> Words:
    """Words that a plan's mesh fixes too."""
    plan = Plan.parse(line)
    m = plan.mesh
    fixed: list[tuple[str, object]] = [("dp", plan.data_parallel_size)]
    fixed += [(axis, getattr(m, axis)) for axis in ("pp", "cp", "tp", "sp", "ep", "etp")]
    fixed += [("order", m.order)] if m.order != DEFAULT_ORDER else []
    return replace(words, fixed=(*words.fixed, *fixed))
