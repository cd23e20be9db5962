"""Tables of blocks, read off a laid model of as few layers as differ.

Under plans whose states are not cut a block is laid by itself, for what it depends on alone: with one
sample, since rooms ask nothing of their number; once for all that may be recomputed, which changes what
layers keep and nothing else; and without experts once for all ways these may lie. What a number of samples
takes is read off its ops at that size.

Units: of each layer the largest flat unit of its experts and of all else, which ZeRO cuts and gathers over
different ranks (parallel/dp/rules.py). Weights that are tied, and the embedding's, count as states alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from partita.base.errors import Problem
from partita.cost.machine import Machine
from partita.parallel.ep import rules as ep
from partita.parallel.laid import Laid, Stage, lay, problems
from partita.parallel.laid_cut import cut_tokens, whole, with_samples
from partita.parallel.laid_step import step_sums
from partita.parallel.offload.rules import targets
from partita.parallel.precision import rules as precision
from partita.parallel.read import flops, gradient_axes, kept_bytes, state_bytes, tensor_bytes
from partita.parallel.recompute import rules as recompute
from partita.parallel.room import Request
from partita.planner.bounds.rings import kept
from partita.planner.bounds.starts import lines_of
from partita.planner.bounds.table import Cost, Table, Three
from partita.simulate.inside import transient_bytes
from partita.simulate.memory import read_later_bytes
from partita.simulate.stage import StageTime, stage_time, stage_work
from partita.simulate.work import MATMULS
from partita.spec.families import program
from partita.spec.frozen import Frozen, freeze
from partita.spec.model import ModelSpec
from partita.spec.plan import OffloadPlan, Plan, RecomputePlan
from partita.spec.program import Block, Program, Tensor

STATES = ("parameters", "gradients", "optimizer")
REMEMBERED, SAMPLED = 1024, 4  # blocks laid, and numbers of samples of each


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
    return Cost(*times, travel=travel, rooms=rooms, least=t.calls_s)


@dataclass(frozen=True)
class _Place:
    """Where a block of a model stands: the first place of one like it, its full name, and which of its
    weights a block before it holds."""

    first: int
    name: str
    held: frozenset[str]
    has_experts: bool
    is_layer: bool


@lru_cache(maxsize=64)
def _places(model: ModelSpec, seq_len: int, frozen: Frozen) -> tuple[_Place, ...]:
    """Of all blocks in order."""
    found = freeze(program(model, 1, seq_len), frozen)
    places, seen, known = [], set[str](), dict[object, int]()
    for i, (block, name) in enumerate(zip(found.blocks, found.names, strict=True)):
        weights = {w.name for w in block.weights()}
        held = frozenset(weights & seen)
        seen |= weights & set(found.tied)
        first = known.setdefault((id(block), held), i)
        is_layer = block.name not in ("embedding", "head")
        places.append(_Place(first, name, held, "sent" in block.tensors, is_layer))
    return tuple(places)


class _Way:
    """A way to cut a model, of one sample and with nothing recomputed, by which caches key."""

    def __init__(self, request: Request) -> None:
        self.request = request


class _Form:
    """A block laid in such a way: what of it depends neither on the number of samples nor on what is
    recomputed, and itself with other numbers of samples, which share all that follows from their ops."""

    def __init__(self, laid: Laid, place: _Place, each: Three) -> None:
        (block,), sizes = laid.program.blocks, laid.sizes
        own = [w for w in block.weights() if w.name not in place.held]
        experts = [w for w in own if _of_experts(w)]
        rest = [w for w in own if not _of_experts(w)]
        self.states, self.experts = _states(rest, each, laid), _states(experts, each, laid)
        alone = rest if place.first else []
        self.units = (*_largest(block, alone, each, laid), *_largest(block, experts, each, laid))
        self._sampled = {1: laid}
        self._changes = dict[RecomputePlan, bool]()
        matmuls = [op for op in block.ops() if op.kind in MATMULS]
        self._read = sum(tensor_bytes(block.tensors[op.weights[0]], sizes) for op in matmuls)

    def sampled(self, samples: int) -> Laid:
        """The block of a microbatch of so many samples."""
        if samples not in self._sampled:
            laid = self._sampled[1]
            _forget(self._sampled, SAMPLED)
            self._sampled[1] = laid
            self._sampled[samples] = _changed(laid, with_samples(laid.program.blocks[0], samples))
        return self._sampled[samples]

    def changes(self, made: RecomputePlan) -> bool:
        """Whether that keeps anything else: flash attention has no scores to make again."""
        if made not in self._changes:
            before, after = self._sampled[1], _made_again(self._sampled[1], made)
            kept, now = (x.program.blocks[0].kept for x in (before, after))
            self._changes[made] = kept != now
        return self._changes[made]

    def least(self, calls: tuple[float, float], machine: Machine) -> tuple[float, float]:
        """What forward and backward take however few the tokens are: the host's `calls`; and each matmul
        reads its weight (simulate/work.py)."""
        if machine.cluster.piece_seconds is not None:
            return calls
        return max(calls[0], self._read / machine.memory_rate), calls[1]


class Reader:
    """Tables of models on one machine, under plans without a pipeline or ZeRO."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._ways: dict[Request, _Way] = {}
        self._forms: dict[tuple[int, _Way], _Form] = {}
        self._tokens: dict[tuple[int, _Way], Program] = {}
        self._costs: dict[object, tuple[Cost, float]] = {}
        self._each: dict[object, Three] = {}
        self._found: dict[tuple[Request, bool], Table | Problem] = {}
        self._priced = [(machine, self._costs, self._found)]

    def remember(self, other: Reader) -> None:
        """Takes what another has laid, and on the same machine priced."""
        self._ways, self._forms, self._each = other._ways, other._forms, other._each
        self._tokens = other._tokens
        self._priced = other._priced
        for machine, costs, found in self._priced:
            if machine == self.machine:
                self._costs, self._found = costs, found
                return
        self._priced.append((self.machine, self._costs, self._found))

    def learn(self, request: Request, late: bool, found: Table | Problem) -> None:
        """Takes a table that was made elsewhere."""
        self._found.setdefault((request, late), found)

    def __call__(self, request: Request, late: bool) -> Table | Problem:
        """The table of a model, or why it cannot be laid. `late`: as `cost_of` takes it."""
        key = request, late
        if key not in self._found:
            self._found[key] = self._table(request, late)
        return self._found[key]

    def _table(self, request: Request, late: bool) -> Table | Problem:
        short, at = _shortest(request)
        wrong = [p for p in problems(short) if p.severity == "error"]
        if wrong:
            return wrong[0]
        plan, places = short.plan, _places(short.model, short.seq_len, short.frozen)
        one = replace(short, plan=replace(plan, recompute=RecomputePlan()), micro_batch_size=1)
        sparse = dense = self._way(one)
        if _tiles(request, self.machine):  # a block without experts is the same however these lie
            mesh = replace(plan.mesh, ep=1, etp=1, dp_shard=1)
            dense = self._way(replace(one, plan=replace(one.plan, mesh=mesh)))
        found = []
        for i, place in enumerate(places):
            made = RecomputePlan()
            if place.is_layer and (i - 1) % plan.recompute.every == 0:
                made = replace(plan.recompute, every=1)
            way = sparse if place.has_experts else dense
            found.append(self._block(way, place, short.micro_batch_size, made, late))
        order = [0, *(1 + i for i in at), len(found) - 1]
        return Table.of([found[i][0] for i in order], [found[i][1] for i in order])

    def _way(self, request: Request) -> _Way:
        if request not in self._ways:
            self._ways[request] = _Way(request)
        return self._ways[request]

    def _block(
        self, way: _Way, place: _Place, samples: int, made: RecomputePlan, late: bool
    ) -> tuple[Cost, float]:
        """The cost and the FLOPs of a block; those of plain ones where nothing is made again."""
        key = place.first, way, samples, made, late
        if key not in self._costs:
            form = self._form(way, place)
            if made.mode != "none" and not form.changes(made):
                self._costs[key] = self._block(way, place, samples, RecomputePlan(), late)
                return self._costs[key]
            laid = _made_again(form.sampled(samples), made)
            each = flops(laid.program.blocks[0], laid.sizes).values()
            self._costs[key] = (
                self._cost(way, laid, place, samples if late else 0),
                float(sum(each)),
            )
        return self._costs[key]

    def _form(self, way: _Way, place: _Place) -> _Form:
        key = place.first, way
        if key not in self._forms:
            laid = _lay(way.request, self._cut(way.request, place))
            _forget(self._forms, REMEMBERED)
            self._forms[key] = _Form(laid, place, self._bytes(way.request))
        return self._forms[key]

    def _cut(self, request: Request, place: _Place) -> Program:
        """A block before experts are cut: the same wherever they lie."""
        mesh = replace(request.plan.mesh, ep=1, etp=1)
        key = place.first, self._way(replace(request, plan=replace(request.plan, mesh=mesh)))
        if key not in self._tokens:
            block = whole(request).blocks[place.first]
            _forget(self._tokens, REMEMBERED)
            self._tokens[key] = cut_tokens(request, Program((block,), (place.name,)))
        return self._tokens[key]

    def _cost(self, way: _Way, laid: Laid, place: _Place, late: int) -> Cost:
        """What a microbatch takes in the block, and what a rank holds of it. `late`: samples of
        an endless one."""
        (block,), sizes, form = laid.program.blocks, laid.sizes, self._form(way, place)
        work = stage_work(laid, 0)
        took = stage_time(work, laid, self.machine)
        cost = cost_of(took, late > 0)
        if late:
            lines = lines_of(work.parts[0], took, late, laid, self.machine)
            cost = replace(cost, lines=lines, lanes=kept(took.lanes))
        return replace(
            cost,
            kept=kept_bytes(block, sizes),
            read=read_later_bytes(block, sizes),
            inside=transient_bytes(block, sizes),
            sent=tensor_bytes(block.tensors[block.output], sizes),
            states=form.states,
            experts=form.experts,
            units=form.units,
            least=form.least(cost.least, self.machine),
        )

    def _bytes(self, request: Request) -> Three:
        """Bytes of an element by state: read off the model as one rank lays it."""
        plan = Plan(precision=request.plan.precision)
        alone = replace(request, plan=plan, micro_batch_size=1)
        if alone not in self._each:
            laid = lay(alone)
            blocks = laid.stages[0].blocks
            total = sum((state_bytes(b, laid.sizes) for b in blocks), Counter[str]())
            weights = {n: t for u in laid.units(0) for n, t, _ in u.weights}.values()
            every = sum(w.numel() for w in weights)
            trained = sum(w.numel() for w in weights if not w.frozen)
            parts = zip(STATES, (every, trained, trained), strict=True)
            self._each[alone] = tuple(total[s] / max(n, 1) for s, n in parts)
        return self._each[alone]


def _lay(request: Request, tokens: Program) -> Laid:
    """One block by itself, whose tokens are cut, as a rank has it that holds the whole model: what it
    computes, keeps and sends of a microbatch, without the states of its weights and their reductions. Nothing
    is recomputed."""
    laid = ep.lay(request, tokens)
    if laid.names == ("head",):
        laid = step_sums(laid, request.plan)
    laid = precision.lay(request, laid)
    return Laid(request, laid, (Stage(0, laid.names, laid.blocks),), ((),))


def _forget(known: dict[Any, Any], most: int) -> None:
    """Makes room for one more."""
    if len(known) >= most:
        known.pop(next(iter(known)))


def _changed(laid: Laid, block: Block) -> Laid:
    """The same of another form of its only block."""
    stage = replace(laid.stages[0], blocks=(block,))
    return replace(laid, program=replace(laid.program, blocks=(block,)), stages=(stage,))


def _made_again(laid: Laid, made: RecomputePlan) -> Laid:
    """The block with this of it recomputed."""
    if made.mode == "none":
        return laid
    plan = replace(laid.request.plan, recompute=made)
    (block,) = recompute.lay(replace(laid.request, plan=plan), laid.program).blocks
    return _changed(laid, block)


def _tiles(request: Request, machine: Machine) -> bool:
    """Whether the ranks of cp and tp lie alike wherever they begin: groups over them are then the same for
    any number of replicas."""
    m, cluster = request.plan.mesh, machine.cluster
    ranks = m.cp * m.tp * m.split
    node = cluster.devices_per_node
    return not cluster.nodes and (node % ranks == 0 or ranks % node == 0)


def on_device(table: Table | Problem, offload: OffloadPlan) -> Table | Problem:
    """The table with what stays on the device: states and activations that lie elsewhere are left out, but
    for what one block keeps, which is there while it runs. Its times are the same: moves only add to them,
    and an update elsewhere follows (`Bounds.updated`)."""
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
            cost = replace(cost, kept=0.0, read=0.0, inside=cost.inside + cost.kept)
        away = (cost.states[2], cost.experts[2]) if "optimizer" in gone else (0.0, 0.0)
        return replace(cost, states=states, experts=experts, away=away)

    return replace(table, kinds=tuple(map(rest, table.kinds)))


@lru_cache(maxsize=64)
def _kinds(model: ModelSpec, seq_len: int, frozen: Frozen) -> int:
    """Layers of a model that differ, in what of them is frozen too."""
    return len({id(b) for b in freeze(program(model, 1, seq_len), frozen).blocks[1:-1]})


def _shortest(request: Request) -> tuple[Request, Sequence[int]]:
    """The request for a model with each kind of layer once (of every k-th recomputed, k of them), and which
    of its layers each of the whole model's is. What is frozen is named by its place: layers are of one kind
    where that is the same, and which of them have experts changes what a place is."""
    model, period = request.model, request.plan.recompute.every
    kinds = _kinds(model, request.seq_len, request.frozen)
    if kinds == 1 and model.layers > period:
        short = replace(model, layers=period, dense_layers=min(model.dense_layers, period))
        return replace(request, model=short), [i % period for i in range(model.layers)]
    if request.frozen:
        return request, range(model.layers)
    if kinds == 2 and model.layers > 2 and model.dense_layers and period == 1:
        at = [int(i >= model.dense_layers) for i in range(model.layers)]
        return replace(request, model=replace(model, layers=2, dense_layers=1)), at
    return request, range(model.layers)


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
