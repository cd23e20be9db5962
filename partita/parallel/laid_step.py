"""What a step sums once, whatever the blocks: loss, count of tokens, norm, what routers chose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from partita.parallel.dp import rules as dp
from partita.parallel.room import PRODUCT_ORDER
from partita.spec.mesh import EXPERT, FOLD
from partita.spec.plan import Plan
from partita.spec.program import Block, Dim, Event, Op, Program, Tensor, distinct

LATE = "validate"  # the lane of sums that a step starts and the next one waits for
ROUTING_SUMS = 3  # balance loss, z-loss, dropped rows: what step.routing holds before the counts


def step_sums(program: Program, plan: Plan, two_ways: bool = False) -> Program:
    """What is summed once a step: the loss leaves its block as a partial sum, and is reduced after the
    last microbatch over the product of the axes that cut the labels; so is the count of valid tokens,
    before the first. Then the loss goes to every stage; the norm is summed over ranks that count different
    elements of the gradient. A schedule that goes two ways leaves the loss at both ends: it is summed over
    pp too. So it is where stages update before the norm is known (`pipeline.post_validation`): then each
    hands the squares so far on to the next, and all other sums over stages are started, not waited for."""
    *body, head = program.blocks
    sizes = plan.sizes
    chain = [
        op for op in head.ops() if op.kind == "reduce_from" and op.name == "loss.mean:reduce_from"
    ]
    axes = sorted((a for op in chain for a in op.axes), key=PRODUCT_ORDER.index)
    drop = {id(op) for op in chain}
    segments = tuple(
        replace(s, ops=tuple(op for op in s.ops if id(op) not in drop)) for s in head.segments
    )
    output = next(op.writes for op in head.ops() if op.name == "loss.mean")
    head = replace(head, segments=segments, output=output)
    cut_labels = tuple(a for d in head.tensors["valid"].dims for a in d.cut if sizes[a] > 1)
    norm_axes = _norm_axes(program.blocks, plan)
    step: list[Op] = []
    tensors = {"step.count": Tensor("step.count", (), "count")}
    tensors |= {n: Tensor(n, (), "sum") for n in ("step.loss", "step.known", "step.norm")}
    if cut_labels:
        step.append(_once("step.count", "reduce_from", cut_labels, "all_reduce"))
    after = plan.pipeline.post_validation
    lane = LATE if after else "compute"
    if two_ways or after:
        axes = ["pp", *axes]
    if axes:
        step.append(_once("step.loss", "reduce_from", axes, "all_reduce", lane))
    if sizes["pp"] > 1 and not (two_ways or after):
        step.append(_once("step.loss", "broadcast", ("pp",), "broadcast"))
    if after:
        step.append(_once("step.known", "hand_on", ("pp",), "send", lane))
    if norm_axes:
        step.append(_once("step.norm", "reduce_from", norm_axes, "all_reduce", lane))
    layers = [b for b in body if "chosen" in b.tensors]
    if layers:
        chosen = layers[0].tensors["chosen"]
        token_axes = {a for d in chosen.dims for a in d.cut} | {"pp"}
        over = sorted((a for a in token_axes if sizes[a] > 1), key=PRODUCT_ORDER.index)
        size = ROUTING_SUMS + len(layers) * layers[0].tensors["loads"].numel()
        tensors["step.routing"] = Tensor("step.routing", (Dim("routing", size),), "sum")
        if over:
            step.append(_once("step.routing", "reduce_from", over, "all_reduce", lane))
    return replace(program, blocks=(*body, head), step=tuple(step), tensors=tensors)


def _norm_axes(blocks: Iterable[Block], plan: Plan) -> tuple[str, ...]:
    """Axes over which elements lie apart, or are counted by one rank: experts and what ZeRO cuts lie on
    the whole fold."""
    cut = {a for b, _ in distinct(blocks) for w in b.weights() for a in w.axes()}
    apart = dp.zero_stage(plan) or cut & (set(EXPERT) - {"pp", "dp_replicate"})
    return tuple(a for a in ("pp", *(FOLD if apart else ("tp",)), "split") if plan.sizes[a] > 1)


def _once(name: str, kind: str, axes: Iterable[str], collective: str, lane: str = "compute") -> Op:
    events = (Event("step", collective, name),)
    return Op(f"{name}:{kind}", kind, (name,), name, axes=tuple(axes), events=events, lane=lane)
