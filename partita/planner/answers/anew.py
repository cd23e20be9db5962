"""A changed plan's `auto` made anew: for what its own stages cost, and the memory they leave.

A plan's line states what its schedule was made for. With more microbatches, another tp or with recomputation
stages cost something else, and a schedule made for what they cost before would tell of the change too much.
"""

from __future__ import annotations

from partita.planner.search.made import Made, MadeSpace
from partita.planner.search.nodes import Node
from partita.planner.search.search import Search
from partita.planner.space import Leaf, MeshChoice, Shape, Tokens, Words
from partita.simulate.predict import weigh, wrongs
from partita.spec.job import Job
from partita.spec.plan import Plan
from partita.spec.stage_costs import read_costs


def anew(job: Job, plan: Plan, before: Plan) -> Plan:
    """The changed plan with its `auto` made for its own costs, within the most that memory allows (where none
    fits, the least there is); each rank has as many stages as `before`, a plan of stated costs. Itself where
    it has another schedule, where it states a split of the layers or two copies of a stage, whose costs are
    its user's, or where it cannot be."""
    p, old = plan.pipeline, before.pipeline
    if p.schedule != "auto" or p.split or p.copies > 1:
        return plan
    plain = plan.with_("pipeline", schedule="gpipe", virtual_stages=1, costs=(), limit=0)
    if any(problem.severity == "error" for problem in wrongs(job.with_plan(plain))):
        return plan  # its stages may have no costs; what is wrong with its `auto` alone, `weigh` says below
    virtual = len(read_costs(old.costs)[0]) // before.mesh.pp
    space = MadeSpace(job, Words(), plan.precision.dtype, plan.offload)
    levels, last = Search(space, Made).levels, plan
    assert isinstance(levels, Made)
    for leaf in levels.stated(_node(job, plan, virtual)):
        last = plan.with_("pipeline", costs=leaf.costs, limit=leaf.limit)
        weighed = weigh(job.with_plan(last))
        if weighed is None or weighed.fits:
            return plan if weighed is None else last
    return last


def _node(job: Job, plan: Plan, virtual: int) -> Node:
    """Where the plan stands in a space."""
    m, ways = plan.mesh, plan.data_parallel_size
    micro = job.train.global_batch_size // ways // plan.num_microbatches
    return Node(
        5, 0.0, 0.0, 1,
        MeshChoice(m.pp, ways, m.cp, m.tp, m.sp, m.split),
        Shape(plan.context.method, plan.context.ulysses, m.ep, m.etp),
        Tokens(plan.recompute.mode, plan.recompute.every, micro),
        Leaf("auto", virtual, m.dp_shard, plan.data.zero_stage, m.order),
    )  # fmt: skip
