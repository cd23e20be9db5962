"""Bytes of a rank by category, read off the laid program and the schedule's lifetimes.

parameters   working weights        gradients   flat units               optimizer   moments, masters
activations  kept tensors of each block x microbatches in flight (the schedule's peak); from I to W, where
             backward is in halves, what W reads if that is more (all of it is where blocks run again)
buffers      what lives inside one op at the worst moment: the tensors it makes and their gradients,
             what a recomputed block makes again, and whole units that come and go under ZeRO

At ZeRO stages 2 and 3 a gradient's shard comes as the step's first backward lets go of what it kept.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from partita.parallel.dp.rules import zero_stage
from partita.parallel.laid import Laid
from partita.parallel.offload.rules import KEPT_BUFFERS, arena_of, staging_bytes, targets
from partita.parallel.pp.rules import versions_held
from partita.parallel.read import BYTES, kept_bytes, once, replayed, state_bytes, tensor_bytes
from partita.record.ledger import Ledger
from partita.schedule.clock import rank_peak
from partita.schedule.ir import Schedule
from partita.simulate import away
from partita.spec.plan import Plan
from partita.spec.program import Block, Sizes, distinct


def stage_ledger(laid: Laid, place: int, schedule: Schedule) -> Ledger:
    """The predicted device ledger of a rank at a place of pp at its peak."""
    stages, sizes = laid.stages_of(place), laid.sizes
    categories: Counter[str] = Counter()
    for block, times in distinct(b for s in stages for b in s.blocks):
        categories.update({c: times * n for c, n in state_bytes(block, sizes).items()})
    if schedule.is_asynchronous:
        categories["parameters"] = version_bytes(laid, place, schedule)
    kept, coming = chunk_bytes(laid, place)
    if away.leaves(laid):
        activations, come = float(away.peak(laid, place, schedule)), sum(coming)
    else:
        waits = deferred_bytes(laid, place)
        activations, come = rank_peak(schedule.ranks[place], kept, coming, waits)
    categories["activations"] = int(activations)
    categories["gradients"] = standing_gradients(laid, place) + int(come)
    categories["buffers"] = max(
        transient_bytes(b, sizes) for s in stages for b, _ in distinct(s.blocks)
    )
    categories["buffers"] += max(lent_bytes(s.blocks, laid.request.plan) for s in stages)
    categories["buffers"] += waiting_bytes(laid, place)
    rank = laid.mesh.rank_of({"pp": place})
    return Ledger(rank, "device", dict(categories))


def chunk_bytes(laid: Laid, place: int) -> tuple[list[float], list[float]]:
    """For each stage, zero where the place does not hold it: what a microbatch keeps, and the gradients
    that come with the step's first backward."""
    kept, coming = [0.0] * len(laid.stages), [0.0] * len(laid.stages)
    for s in laid.stages_of(place):
        each = distinct(s.blocks)
        kept[s.index] = float(sum(n * kept_bytes(b, laid.sizes) for b, n in each))
        coming[s.index] = float(sum(n * coming_bytes(b, laid.sizes) for b, n in each))
    return kept, coming


def deferred_bytes(laid: Laid, place: int) -> list[float]:
    """For each stage, zero where the place does not hold it: what the weight half of a microbatch reads,
    which the input half leaves for it, whatever F kept."""
    found = [0.0] * len(laid.stages)
    for s in laid.stages_of(place):
        found[s.index] = float(
            sum(n * read_later_bytes(b, laid.sizes) for b, n in distinct(s.blocks))
        )
    return found


@once
def read_later_bytes(block: Block, sizes: Sizes) -> int:
    """What a weight half reads: inputs of a block's products with weights, and gradients of what these and
    lookups make."""
    products = [op for op in block.ops() if op.weights and op.kind in ("linear", "lookup")]
    names = {t for op in products for t in op.saves} | {op.writes for op in products}
    return sum(tensor_bytes(block.tensors[t], sizes) for t in names)


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


def version_bytes(laid: Laid, place: int, schedule: Schedule) -> int:
    """Working weights of an asynchronous schedule at a place of pp: every version that is held in the compute
    dtype, and masters apart from them. Where ranks update shards, or there are no masters, the newest version
    is held whole beside the one in use."""
    sizes, precision = laid.sizes, laid.request.plan.precision
    alone = precision.rounding == "stochastic"
    wide = precision.dtype in ("fp32", "fp64") and not alone
    total = 0
    for block, times in distinct(b for s in laid.stages_of(place) for b in s.blocks):
        for t in (t for t in block.tensors.values() if t.role == "parameter"):
            unit = t.name.removesuffix(".parameter")
            held = versions_held(schedule, place, unit in laid.program.tied)
            states = block.tensors[f"{unit}.optimizer"]
            shard = replace(t, dims=states.dims[-1:])
            beside = (alone or bool(shard.axes())) and held > 1
            total += times * (held + beside) * tensor_bytes(t, sizes)
            total += times * tensor_bytes(shard, sizes) if wide and states.arena == "device" else 0
    return total


def lent_bytes(blocks: tuple[Block, ...], plan: Plan) -> int:
    """Whole units of a stage under ZeRO beyond what is stored."""
    return sum(lent_parts(blocks, plan).values())


def lent_parts(blocks: tuple[Block, ...], plan: Plan) -> dict[str, int]:
    """Whole units of a stage under ZeRO beyond what is stored: gathered weights of 1 + prefetch blocks (of
    all, where they stay for the step), and two gradients, one being filled and one on its way: one where
    nothing is fetched ahead."""
    every = distinct(blocks)
    each = {id(b): _lent(b, plan) for b, _ in every}
    stay = sum(n * each[id(b)][0] for b, n in every)
    gathered = [each[id(b)][1] for b in blocks]
    gradients = [size for b, n in every for size in each[id(b)][2] for _ in range(min(n, 2))]
    if plan.num_microbatches > 1 and len(gradients) == 1:
        gradients *= 2  # the last microbatch's is on its way
    held = 1 + plan.data.prefetch
    at_once = max(sum(gathered[i : i + held]) for i in range(len(gathered)))
    whole = sum(sorted(gradients)[-min(held, 2) :])
    return {"gathered parameters": stay + at_once, "whole gradients": whole}


def _lent(block: Block, plan: Plan) -> tuple[int, int, tuple[int, ...]]:
    """Of a block under ZeRO: gathered weights that stay for the step, those of its forward and backward, and
    its whole gradients."""
    here, stay, made = 0, 0, dict[str, int]()
    for op in block.regions:
        phases = {e.phase for e in op.events}
        if op.kind == "gather" and zero_stage(plan) == 3:
            whole = tensor_bytes(block.tensors[op.writes], plan.sizes)
            stay += whole if "step" in phases else 0
            here += whole if "F" in phases else 0
            if arena_of(plan, "parameters") != "device":  # beside it, the shard that is gathered
                here += tensor_bytes(block.tensors[op.reads[0]], plan.sizes)
        elif op.kind in ("scatter", "offload") and "B" in phases:
            unit = op.name.rpartition(":")[0]
            made[unit] = tensor_bytes(block.tensors[f"{unit}.whole_gradient"], plan.sizes)
    return stay, here, tuple(made.values())


@once
def transient_bytes(block: Block, sizes: Sizes) -> int:
    """The worst moment inside the block: an op's tensors that are not kept, and their gradients; and
    what recomputation holds again. What comes round a ring is seen share by share, two at a time."""
    held = (
        {t for op in block.ops() for t in op.saves if t not in block.kept}
        if replayed(block)
        else set()
    )
    share = {op.writes: op.reads[0] for op in block.ops() if op.kind == "ring"}

    def size_of(name: str) -> int:
        times = 2 if name in share else 1
        return times * tensor_bytes(block.tensors[share.get(name, name)], sizes)

    again = sum(tensor_bytes(block.tensors[t], sizes) for t in held)
    worst = 0
    for op in block.ops():
        names = [n for n in (*op.reads, op.writes) if n not in held]
        size = sum(map(size_of, set(names)))
        weights = sum(tensor_bytes(block.tensors[w], sizes) for w in op.weights)
        worst = max(worst, size + weights)
    return again + worst


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
