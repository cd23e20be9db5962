"""Bytes of a rank by category, read off the laid program and the schedule's lifetimes.

parameters   working weights        gradients   flat units               optimizer   moments, masters
activations  kept tensors of each block x microbatches in flight (the schedule's peak); from I to W, where
             backward is in halves, what W reads if that is more (all of it is where blocks run again)
buffers      what lives inside one op at the worst moment, the tensors it makes and their gradients and what
             a recomputed block makes again, beyond what of a microbatch is not there then: blocks behind it;
             and whole units that come and go under ZeRO

At ZeRO stages 2 and 3 a gradient's shard comes as the step's first backward lets go of what it kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

from partita.parallel.dp.rules import zero_stage
from partita.parallel.laid import Laid
from partita.parallel.offload.rules import CHUNK, KEPT_BUFFERS, arena_of, staging_bytes, targets
from partita.parallel.read import (
    BYTES,
    kept_bytes,
    once,
    once_of_ops,
    replayed,
    state_bytes,
    tensor_bytes,
)
from partita.record.ledger import Ledger
from partita.schedule.clock import rank_peak
from partita.schedule.ir import Schedule
from partita.schedule.versions import held_at
from partita.simulate import away
from partita.simulate.groups import moves
from partita.simulate.inside import DRAWN_BYTES, read_later, worst_half, worst_op
from partita.spec.cluster import Cluster
from partita.spec.program import DRAWN_AT_ONCE, Block, Sizes, distinct


def stage_ledger(
    laid: Laid, place: int, schedule: Schedule, cluster: Cluster | None = None
) -> Ledger:
    """The predicted device ledger of a rank at a place of pp at its peak; on a cluster, where it is known."""
    stages, sizes = laid.stages_of(place), laid.sizes
    categories: Counter[str] = Counter()
    for block, times in distinct(b for s in stages for b in s.blocks):
        categories.update({c: times * n for c, n in state_bytes(block, sizes).items()})
    if schedule.is_asynchronous:
        categories["parameters"], apart = version_bytes(laid, place, schedule)
        categories["optimizer"] += apart
    activations, come = kept_at_once(laid, place, schedule)
    lent = max((lent_parts(laid, s.blocks, cluster) for s in stages), key=lambda x: sum(x.values()))
    brought = brought_bytes(laid, place)
    beside = lent["whole gradients"] + brought
    moments = (worst_moment(laid, s.blocks, schedule, beside) for s in stages)
    worst = max(moments, key=lambda x: x.size)
    if away.leaves(laid):  # not when most is kept
        worst = worst._replace(size=away.full_peak(laid, place, schedule) - activations)
    gone = min(worst.gone, activations)  # forward alone keeps nothing
    categories["activations"] = activations - gone + picture_bytes(laid, place)
    categories["gradients"] = standing_gradients(laid, place) + come
    categories["buffers"] = worst.size + gone + sum(lent.values()) + brought
    categories["buffers"] += waiting_bytes(laid, place)
    there = sum(categories[c] for c in ("activations", "buffers"))
    categories["buffers"] += max(update_bytes(laid, place) + picture_bytes(laid, place) - there, 0)
    most = {c: n for c, n in categories.items() if c != "buffers"}
    most["activations"] += gone
    rank = laid.mesh.rank_of({"pp": place})
    return Ledger(rank, "device", dict(categories), most)


def kept_at_once(laid: Laid, place: int, schedule: Schedule) -> tuple[int, int]:
    """The most that microbatches under way keep, and the gradients that have come by then."""
    kept, coming = chunk_bytes(laid, place)
    if away.leaves(laid):
        return away.peak(laid, place, schedule), int(sum(coming))
    most, come = rank_peak(schedule.ranks[place], kept, coming, deferred_bytes(laid, place))
    return int(most), int(come)


def chunk_bytes(laid: Laid, place: int) -> tuple[list[float], list[float]]:
    """For each stage, zero where the place does not hold it: what a microbatch keeps, and the gradients
    that come with the step's first backward."""
    kept, coming = [0.0] * len(laid.stages), [0.0] * len(laid.stages)
    for s in laid.stages_of(place):
        each = distinct(s.blocks)
        kept[s.index] = float(
            sum(n * kept_bytes(b, laid.sizes) for b, n in each) - away.pictures_kept(laid, s)
        )
        coming[s.index] = float(sum(n * coming_bytes(b, laid.sizes) for b, n in each))
    return kept, coming


def deferred_bytes(laid: Laid, place: int) -> list[float]:
    """For each stage, zero where the place does not hold it: what the weight half of a microbatch reads,
    which the input half leaves for it, whatever F kept."""
    found = [0.0] * len(laid.stages)
    for s in laid.stages_of(place):
        found[s.index] = float(
            sum(n * read_later_bytes(b, laid.sizes) for b, n in distinct(s.blocks))
            - away.pictures_kept(laid, s)
        )
    return found


def picture_bytes(laid: Laid, place: int) -> int:
    """A step's pictures, in fp32 whatever computes on them, which a place that has the first stage holds from
    begin to end: with the next step's, where a pipeline stays full."""
    image, plan = laid.request.model.image, laid.request.plan
    if image is None or all(s.index for s in laid.stages_of(place)):
        return 0
    samples = laid.request.micro_batch_size * plan.num_microbatches
    steps = 1 + laid.schedule.runs_ahead
    return steps * samples * image.colors * image.size**2 * BYTES["fp32"]


@once_of_ops
def read_later_bytes(block: Block, sizes: Sizes) -> int:
    """What a weight half reads: inputs of a block's products with weights, and gradients of what these and
    lookups make."""
    inputs, made = read_later(block)
    return sum(tensor_bytes(block.tensors[t], sizes) for t in inputs | made)


def standing_gradients(laid: Laid, place: int) -> int:
    """Bytes of a place's gradients that are there for the whole run."""
    every = distinct(b for s in laid.stages_of(place) for b in s.blocks)
    return sum(
        n * (state_bytes(b, laid.sizes)["gradients"] - coming_bytes(b, laid.sizes))
        for b, n in every
    )


@once
def coming_bytes(block: Block, sizes: Sizes) -> int:
    """Gradients of a block that are not there before the step's first backward: those that ZeRO cuts."""
    own = (t for t in block.tensors.values() if t.role == "gradient" and t.arena == "device")
    return sum(tensor_bytes(t, sizes) for t in own if t.axes())


def update_bytes(laid: Laid, place: int) -> int:
    """What an update of weights without masters holds, when nothing of a microbatch is there: elements of a
    unit in fp32, some at a time, and of a weight once more while they are rounded."""
    plan = laid.request.plan
    if plan.precision.rounding != "stochastic":
        return 0
    words, most = laid.request.state_words, 0
    for block, _ in distinct(b for s in laid.stages_of(place) for b in s.blocks):
        largest = max((w.local(laid.sizes) for w in block.weights()), default=0)
        for t in (t for n, t in block.tensors.items() if n.endswith(".optimizer")):
            unit = min(t.local(laid.sizes) // max(words, 1), CHUNK) if t.arena == "device" else 0
            box = min(unit, largest)
            drawn = DRAWN_BYTES * min(box, DRAWN_AT_ONCE)
            most = max(most, BYTES["fp32"] * (unit + box) + drawn)
    return most


def arena_ledger(laid: Laid, place: int, arena: str) -> Ledger:
    """What a rank at a place of pp holds on its host or disk for the whole run, and what moves pass."""
    every = distinct(b for s in laid.stages_of(place) for b in s.blocks)
    found = Counter[str]()
    for block, times in every:
        found.update({c: times * n for c, n in state_bytes(block, laid.sizes, arena).items()})
    states = [t for b, _ in every for n, t in b.tensors.items() if n.endswith(".optimizer")]
    if arena_of(laid.request.plan, "activations") == arena:
        sizes = away.slots(laid, place)
        peak = away.away_peak(laid, place, laid.schedule)
        found["activations"] = sum(sizes) if arena == "disk" else peak
    if arena_of(laid.request.plan, "activations") == "disk" and arena == "host":
        found["buffers"] += KEPT_BUFFERS * max(away.slots(laid, place), default=0)
    gone = {"optimizer", "gradients", "parameters"} & set(targets(laid.request.plan))
    if arena == "host" and states and gone:
        largest = max(states, key=lambda t: t.local(laid.sizes))
        words, width = largest.dims[0].size, BYTES[largest.dtype]
        elements = largest.local(laid.sizes) // max(words, 1)
        working = [t for b, _ in every for t in b.tensors.values() if t.role == "parameter"]
        bytes_ = max((BYTES[t.dtype] for t in working if t.arena == "disk"), default=0)
        found["buffers"] += staging_bytes(laid.request.plan, words, elements, width, bytes_)
    return Ledger(laid.mesh.rank_of({"pp": place}), arena, dict(found))


def version_bytes(laid: Laid, place: int, schedule: Schedule) -> tuple[int, int]:
    """Working weights of an asynchronous schedule at a place of pp: every version that is held in the compute
    dtype; and masters apart from them that the laid program has in one with these. Where ranks update shards,
    or there are no masters, the newest version is held whole beside the one in use. What is frozen has one
    version, and no master."""
    sizes, precision = laid.sizes, laid.request.plan.precision
    alone = precision.rounding == "stochastic"
    wide = precision.dtype in ("fp32", "fp64") and not alone
    versions = masters = 0
    every = [(s.index, *each) for s in laid.stages_of(place) for each in distinct(s.blocks)]
    for stage, block, times in every:
        for t in (t for t in block.tensors.values() if t.role == "parameter"):
            unit = t.name.removesuffix(".parameter")
            held = held_at(schedule, stage, unit in laid.program.tied)
            states = block.tensors.get(f"{unit}.optimizer")
            if states is None:
                versions += times * tensor_bytes(t, sizes)
                continue
            shard = replace(t, dims=states.dims[-1:])
            beside = (alone or bool(shard.axes())) and held > 1
            versions += times * (held + beside) * tensor_bytes(t, sizes)
            if wide and states.arena == "device":
                masters += times * tensor_bytes(shard, sizes)
    return versions, masters


def lent_parts(
    laid: Laid, blocks: tuple[Block, ...], cluster: Cluster | None = None
) -> dict[str, int]:
    """Whole units of a stage under ZeRO beyond what is stored: gathered weights of 1 + prefetch blocks (of
    all, where they stay for the step), and two gradients, one being filled and one on its way: one where
    nothing is fetched ahead. What would not move under compute on this cluster is neither gathered ahead nor
    on its way. Where kept tensors leave, a backward lets go of none that stood against it: beside a
    gradient on its way there is then the shard that comes of it, to be added to that of microbatches
    before."""
    plan, every = laid.request.plan, distinct(blocks)
    each = {id(b): _lent(b, laid, cluster) for b, _ in every}
    of, fetched = [each[id(b)] for b in blocks], plan.data.prefetch
    ahead = [x.here if x.moves else 0 for x in of]
    at_once = max(
        x.here + max(sum(ahead[i + 1 : i + 1 + fetched]), sum(ahead[max(i - fetched, 0) : i]))
        for i, x in enumerate(of)
    )
    made = [g for b, n in every for g in each[id(b)].gradients for _ in range(min(n, 2))]
    if plan.num_microbatches > 1 and len(made) == 1:
        made *= 2  # the last microbatch's is on its way
    made.sort()
    largest = [x.size for x in made]
    whole = max(largest, default=0)
    under_way = max((i for i, x in enumerate(made) if x.moves), default=None)
    if fetched and under_way is not None:
        goes = largest.pop(under_way)
        adds = plan.num_microbatches > 1 and away.leaves(laid)
        comes = made[under_way].shard if adds else 0
        whole = max(whole, goes + comes + max(largest, default=0))
    stay = sum(n * each[id(b)].stay for b, n in every)
    return {"gathered parameters": stay + at_once, "whole gradients": whole}


class _Whole(NamedTuple):
    """A whole gradient in bytes, whether it moves under compute, and the shard that comes of it, if any."""

    size: int
    moves: bool
    shard: int = 0


@dataclass(frozen=True)
class _Lent:
    """Of a block under ZeRO, in bytes: gathered weights that `stay` for the step, those `here` for its
    forward and its backward, and whether these move under compute; whole gradients."""

    stay: int
    here: int
    moves: bool
    gradients: tuple[_Whole, ...]


def _lent(block: Block, laid: Laid, cluster: Cluster | None) -> _Lent:
    plan, sizes = laid.request.plan, laid.sizes
    here, stay, alone, made = 0, 0, True, dict[str, _Whole]()
    for op in block.regions:
        phases = {e.phase for e in op.events}
        if op.kind == "gather" and zero_stage(plan) == 3:
            whole = tensor_bytes(block.tensors[op.writes], sizes)
            stay += whole if "step" in phases else 0
            here += whole if "F" in phases else 0
            alone &= moves(laid, cluster, op.axes, whole // prod(sizes[a] for a in op.axes))
            if arena_of(plan, "parameters") != "device":  # beside it, the shard that is gathered
                here += tensor_bytes(block.tensors[op.reads[0]], sizes)
        elif op.kind in ("scatter", "offload") and "B" in phases:
            unit = op.name.rpartition(":")[0]
            size = tensor_bytes(block.tensors[f"{unit}.whole_gradient"], sizes)
            if op.kind == "scatter":
                shard = size // prod(sizes[a] for a in op.axes)
                made[unit] = _Whole(size, moves(laid, cluster, op.axes, size), shard)
            else:  # which is over when it returns
                made.setdefault(unit, _Whole(size, False))
    return _Lent(stay, here, alone, tuple(made.values()))


class Moment(NamedTuple):
    """Bytes beyond what a stage's blocks keep when that is most, of what they keep those that are not there
    then, and the block."""

    size: int
    gone: int
    block: Block


def worst_moment(
    laid: Laid, blocks: Sequence[Block], schedule: Schedule, beside: int = 0
) -> Moment:
    """Of a microbatch in a stage of these blocks; `beside` as `worst_op` takes it.

        max over blocks  transient(block) - what blocks behind it keep

    Forward has not come to these, backward has left them. Of what stays behind a backward, a weight half's
    inputs and the gradients that ZeRO cuts, there is no less. What leaves between is counted by `away`; where
    weight halves read more than was kept, by `_worst_half`."""
    stays, split = away.leaves(laid), "W" in schedule.kinds
    if split and not stays:
        later = sum(n * read_later_bytes(b, laid.sizes) for b, n in distinct(blocks))
        if later > sum(n * kept_bytes(b, laid.sizes) for b, n in distinct(blocks)):
            return _worst_half(laid, blocks, beside)
    found, behind = Moment(0, 0, blocks[-1]), 0
    for block in reversed(blocks):
        most, gone = worst_op(block, laid.sizes, not stays, beside)
        if most - behind > found.size:
            found = Moment(most - behind, 0 if stays else gone + behind, block)
        behind += 0 if stays else freed_bytes(block, laid.sizes, split)
    return found


def _worst_half(laid: Laid, blocks: Sequence[Block], beside: int) -> Moment:
    """The same where what weight halves read of a stage is more than what it keeps, and is counted from the
    begin of an input half on (`rank_peak`). When that comes to a block, neither it nor those before it have
    left anything for later:

        max over blocks  transient(block) - sum over it and those before it (read later - kept)

    of which a forward knows nothing."""
    found, before, behind = Moment(0, 0, blocks[-1]), 0, 0
    more = [read_later_bytes(b, laid.sizes) - kept_bytes(b, laid.sizes) for b in blocks]
    for block, own in zip(blocks, more, strict=True):
        before += own
        most, gone = worst_op(block, laid.sizes, beside=beside)
        size = max(most, worst_half(block, laid.sizes)[1]) - before
        if size > found.size:
            found = Moment(size, gone + max(before, 0), block)
    for block in reversed(blocks):
        forward, _, product = worst_half(block, laid.sizes)
        size, gone = max((forward - behind, behind), (product, 0))
        if size > found.size:
            found = Moment(size, gone, block)
        behind += kept_bytes(block, laid.sizes)
    return found


@once
def freed_bytes(block: Block, sizes: Sizes, split: bool) -> int:
    """What a block keeps that is gone behind its backward (its input half, where halves are `split`), less
    what is there then and was not before."""
    left = coming_bytes(block, sizes) + (read_later_bytes(block, sizes) if split else 0)
    return max(kept_bytes(block, sizes) - left, 0)


def brought_bytes(laid: Laid, place: int) -> int:
    """The gradient of a stage's output, which is there as long as its backward runs; the last has none."""
    sending = (s.blocks[-1] for s in laid.stages_of(place) if s.index < len(laid.stages) - 1)
    return max((tensor_bytes(b.tensors[b.output], laid.sizes) for b in sending), default=0)


def waiting_bytes(laid: Laid, place: int) -> int:
    """What a forward holds beside the backward that it is paired with, where layers run again: what their
    backward keeps is not there yet, what lives while rows travel is (pp/pieces.py)."""
    if not laid.schedule.paired:
        return 0
    blocks = (b for s in laid.stages_of(place) for b, _ in distinct(s.blocks))
    return max(_paused_bytes(b, laid.sizes) for b in blocks)


@once
def _paused_bytes(block: Block, sizes: Sizes) -> int:
    """Rows that leave and come, what they were made of, and what is read later, but for what is kept."""
    if not replayed(block):
        return 0
    ops, worst = list(block.ops()), 0
    writer = {op.writes: op for op in ops}
    for at, op in enumerate(ops):
        if op.kind != "all_to_all":
            continue
        before = {block.input, *(o.writes for o in ops[:at])}
        live = {t for o in ops[at + 1 :] for t in o.reads if t in before}
        live |= {op.writes, *op.reads}
        live |= {r for t in op.reads if t in writer for r in writer[t].reads}
        worst = max(worst, sum(tensor_bytes(block.tensors[t], sizes) for t in live - block.kept))
    return worst
