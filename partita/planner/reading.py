"""Tables of blocks, read off a laid model of as few layers as differ.

What is recomputed changes what layers keep, and nothing else of a plan whose states are not cut: a model is
laid once for every choice of it, and blocks that it leaves alone are priced once.

Units: of each layer the largest flat unit of its experts and of all else, which ZeRO cuts and gathers over
different ranks (parallel/dp/rules.py). Weights that are tied, and the embedding's, count as states alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from partita.base.errors import PlanError, Problem
from partita.cost.machine import Machine
from partita.parallel.laid import Laid, lay
from partita.parallel.offload.rules import targets
from partita.parallel.read import flops, gradient_axes, kept_bytes, state_bytes, tensor_bytes
from partita.parallel.recompute import rules as recompute
from partita.parallel.room import Request
from partita.planner.table import Cost, Table
from partita.simulate.memory import read_later_bytes, transient_bytes
from partita.simulate.stage import StageTime, Work, stage_time, stage_work
from partita.simulate.work import MATMULS, STATE_BYTES
from partita.spec.families import program
from partita.spec.plan import OffloadPlan, Plan, RecomputePlan
from partita.spec.program import Block, Tensor, distinct

STATES = ("parameters", "gradients", "optimizer")
REMEMBERED = 256  # models laid


def cost_of(t: StageTime, late: bool = False) -> Cost:
    """The cost of a stage or block. `late`: what backward waits for counts as weight work: what is seen of
    it depends on how long that is, so that of large microbatches only the sum of both bounds that of small
    ones."""
    forward = t.forward_s + sum(t.comm_forward_s.values()) + t.host_forward_s
    waits = sum(t.comm_backward_s.values()) + t.host_backward_s
    back, weight = (0.0, waits) if late else (waits, 0.0)
    travel = t.comm_forward_s.get("ep", 0.0) + t.comm_backward_s.get("ep", 0.0)
    rooms = (t.forward_s, t.paths_s[0], t.backward_s, t.paths_s[1])
    times = forward, t.input_s + back, t.weight_s + weight
    return Cost(*times, travel=travel, rooms=rooms, least=(*t.calls_s, 0.0))


Priced = dict[int, tuple[Block, Cost]]  # by id, which the block keeps


class Reader:
    """Tables of models on one machine, under plans without a pipeline or ZeRO."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._plain: dict[tuple[Request, bool], tuple[Laid, Priced]] = {}

    def __call__(self, request: Request, late: bool) -> Table | Problem:
        """The table of a model, or why it cannot be laid. `late`: as `cost_of` takes it."""
        short, at = _shortest(request)
        try:
            plain, known = self._laid(short, late)
        except PlanError as wrong:
            return wrong.problems[0]
        blocks = recompute.lay(short, plain.program).blocks
        costs, weight = _block_costs(plain, blocks, known, self.machine, late)
        order = [0, *(1 + i for i in at), len(costs) - 1]
        return Table.of([costs[i] for i in order], [weight[i] for i in order])

    def _laid(self, short: Request, late: bool) -> tuple[Laid, Priced]:
        """The model with nothing recomputed, its blocks as its only stage has them; what they cost."""
        key = replace(short, plan=replace(short.plan, recompute=RecomputePlan())), late
        if key not in self._plain:
            if len(self._plain) >= REMEMBERED:
                self._plain.pop(next(iter(self._plain)))
            laid = lay(key[0])
            program = replace(laid.program, blocks=laid.stages[0].blocks)
            laid, known = replace(laid, program=program), Priced()
            _price(laid, program.blocks, known, self.machine, late)
            self._plain[key] = laid, known
        return self._plain[key]


def on_device(table: Table | Problem, offload: OffloadPlan) -> Table | Problem:
    """The table with what stays on the device: states and activations that lie elsewhere are left out. Its
    times are the same: moves only add to them, and an update elsewhere follows (`Bounds.updated`)."""
    if offload.to == "none" or isinstance(table, Problem):
        return table
    gone = targets(replace(Plan(), offload=offload))
    here = tuple(float(name not in gone) for name in STATES)

    def rest(cost: Cost) -> Cost:
        states, experts = (
            tuple(size * stays for size, stays in zip(sizes, here, strict=True))
            for sizes in (cost.states, cost.experts)
        )
        if "activations" in gone:
            cost = replace(cost, kept=0.0, read=0.0)
        away = (cost.states[2], cost.experts[2]) if "optimizer" in gone else (0.0, 0.0)
        return replace(cost, states=states, experts=experts, away=away)

    return replace(table, kinds=tuple(map(rest, table.kinds)))


def _shortest(request: Request) -> tuple[Request, Sequence[int]]:
    """The request for a model with each kind of layer once (of every k-th recomputed, k of them), and which
    of its layers each of the whole model's is."""
    model, period = request.model, request.plan.recompute.every
    kinds = len({id(b) for b in program(model, 1, request.seq_len).blocks[1:-1]})
    if kinds == 1 and model.layers > period:
        short = replace(model, layers=period, dense_layers=min(model.dense_layers, period))
        return replace(request, model=short), [i % period for i in range(model.layers)]
    if kinds == 2 and model.layers > 2 and model.dense_layers and period == 1:
        at = [int(i >= model.dense_layers) for i in range(model.layers)]
        return replace(request, model=replace(model, layers=2, dense_layers=1)), at
    return request, range(model.layers)


def _price(
    laid: Laid, blocks: Sequence[Block], known: Priced, machine: Machine, late: bool
) -> None:
    """Adds what a microbatch takes in those of the blocks that are not known yet."""
    new = tuple(b for b, _ in distinct(blocks) if id(b) not in known)
    alone = replace(laid, stages=(replace(laid.stages[0], blocks=new),))
    for block, part in zip(new, stage_work(alone, 0).parts, strict=True):
        work = Work((replace(part, times=1),), (), Counter())
        known[id(block)] = block, cost_of(stage_time(work, alone, machine), late)


def _block_costs(
    laid: Laid, blocks: Sequence[Block], plain: Priced, machine: Machine, late: bool
) -> tuple[list[Cost], list[float]]:
    """The cost and the FLOPs of each block. States go by weights: units may join several blocks. `plain`:
    what those cost that are as they were laid."""
    known = dict(plain)
    _price(laid, blocks, known, machine, late)
    total = sum((state_bytes(b, laid.sizes) for b in blocks), Counter[str]())
    tied, seen = set(laid.program.tied), set[str]()
    held: list[list[Tensor]] = []
    for b in blocks:
        held.append([w for w in b.weights() if w.name not in seen])
        seen |= {w.name for w in held[-1]} & tied
    whole = [sum(w.local(laid.sizes) for w in ws) for ws in held]
    trained = [sum(w.local(laid.sizes) for w in ws if not w.frozen) for ws in held]
    each = [
        total[s] / max(sum(n), 1) for s, n in zip(STATES, (whole, trained, trained), strict=True)
    ]
    costs = []
    for i, (b, ws) in enumerate(zip(blocks, held, strict=True)):
        experts = [w for w in ws if _of_experts(w)]
        rest = [w for w in ws if not _of_experts(w)]
        alone = [] if i == 0 else [w for w in rest if w.name not in tied]
        read = {
            "kept": kept_bytes(b, laid.sizes), "read": read_later_bytes(b, laid.sizes),
            "inside": transient_bytes(b, laid.sizes),
            "sent": tensor_bytes(b.tensors[b.output], laid.sizes),
            "states": _states(rest, each, laid), "experts": _states(experts, each, laid),
            "units": (*_largest(b, alone, each, laid), *_largest(b, experts, each, laid)),
            "least": _least(b, known[id(b)][1].least, laid, machine),
        }  # fmt: skip
        costs.append(replace(known[id(b)][1], **read))
    return costs, [float(sum(flops(b, laid.sizes).values())) for b in blocks]


def _least(block: Block, calls: Sequence[float], laid: Laid, machine: Machine) -> tuple[float, ...]:
    """What forward, backward and its weight half take however few the tokens are: the host's `calls`; and
    each matmul reads its weight, and adds to a gradient as large (simulate/work.py)."""
    if machine.cluster.piece_seconds is not None:
        return calls[0], calls[1], 0.0
    read = grown = 0.0
    for op in block.ops():
        if op.kind in MATMULS:
            w = block.tensors[op.weights[0]]
            read += tensor_bytes(w, laid.sizes)
            grown += 0 if op.frozen else STATE_BYTES * w.local(laid.sizes)
    return max(calls[0], read / machine.memory_rate), calls[1], grown / machine.memory_rate


def _of_experts(weight: Tensor) -> bool:
    return any(d.name == "experts" for d in weight.dims)


def _states(weights: Sequence[Tensor], each: Sequence[float], laid: Laid) -> tuple[float, ...]:
    """Bytes by state; frozen weights have parameters alone."""
    whole = sum(w.local(laid.sizes) for w in weights)
    trained = sum(w.local(laid.sizes) for w in weights if not w.frozen)
    return each[0] * whole, each[1] * trained, each[2] * trained


def _largest(
    block: Block, weights: Sequence[Tensor], each: Sequence[float], laid: Laid
) -> tuple[float, float]:
    """Bytes of the parameters, and of the gradients, of the largest unit that has them."""
    every, trained = Counter[object](), Counter[object]()
    for w in weights:
        key = w.frozen, gradient_axes(block, w, laid.sizes)
        every[key] += w.local(laid.sizes)
        trained[key] += 0 if w.frozen else w.local(laid.sizes)
    return each[0] * max(every.values(), default=0), each[1] * max(trained.values(), default=0)
