"""One block on all ranks of a stage: forward through its ops and regions, backward in reverse.

Backward has what the block keeps, what it replays from that (read.replayed), and what regions declare for
phase B; asking for more is an ExecuteError. A region does what its *events* say and nothing else, so a
program whose events are wrong computes other numbers. Every event is recorded as it happens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from partita.parallel.cp.halo import window_of
from partita.parallel.cp.rules import laid_order
from partita.parallel.ep.counts import rows
from partita.parallel.exact.algebra import ExecuteError, Get, Local, P, Place, total
from partita.parallel.exact.moe import exchange, unfold
from partita.parallel.exact.move import (
    arrive,
    cut_to,
    elements,
    folded,
    rows_to,
    scaled,
    spread,
)
from partita.parallel.exact.ops import BACKWARD, FORWARD
from partita.parallel.laid import Laid
from partita.parallel.read import BYTES, replayed, tensor_bytes
from partita.parallel.room import axis_name
from partita.record.transfer import TrafficLine
from partita.spec.layout import product_coordinate
from partita.spec.mesh import DENSE, EXPERT
from partita.spec.program import Block, Dim, Event, Op, Tensor

VIEWS = ("all_to_all", "gather_rows", "scatter_rows", "counts")  # what moves rows of experts
Parts = Mapping[int, Local]  # rank -> its part of one tensor
CARRIES = ("value", "stat", "aux", "weight")  # roles that have a gradient
AUX_SEED = 11  # what an auxiliary loss of a microbatch starts backward with


@dataclass
class World:
    """All ranks of a laid plan: who holds what, who meets whom, and what they sent this step."""

    laid: Laid
    sent: dict[tuple[int, str, str, str, str], list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        mesh = self.laid.mesh
        self.at = [mesh.coords(r) for r in range(mesh.world_size)]
        self.span, self.group = cache(self._span), cache(self._group)
        self.views: dict[int, Mapping[str, Tensor]] = {}  # by the laid block's identity
        self.order = laid_order(self.laid.request).positions[0]
        self.shares: dict[tuple[int, int], tuple[range, ...]] = {}  # by the laid tensor's identity

    def view(self, block: Block) -> Mapping[str, Tensor]:
        """A block's tensors, rows of experts unfolded; the same ones each time."""
        if id(block) not in self.views:
            self.views[id(block)] = unfold(block)
        return self.views[id(block)]

    def ranks(self, place: int) -> list[int]:
        """Ranks at a place of pp."""
        return [r for r, at in enumerate(self.at) if at["pp"] == place]

    def _span(self, d: Dim, rank: int) -> range:
        window = window_of(d.name, self.laid.sizes["cp"])
        if window is not None:
            return window.seen(self.at[rank]["cp"])
        ways, mine = product_coordinate(self.laid.sizes, self.at[rank], d.cut)
        if d.padded:
            each = d.local(self.laid.sizes)
        elif ways > d.size and ways % d.size == 0:  # neighbours share one unit
            return range(mine // (ways // d.size), mine // (ways // d.size) + 1)
        elif d.size % ways:
            raise ExecuteError(f"{d.name} {d.size} is cut {ways} ways")
        else:
            each = d.size // ways
        return range(min(mine * each, d.size), min((mine + 1) * each, d.size))

    def share(self, t: Tensor, rank: int) -> tuple[range, ...]:
        """What a rank holds of a tensor."""
        key = id(t), rank
        if key not in self.shares:
            self.shares[key] = tuple(self.span(d, rank) for d in t.dims)
        return self.shares[key]

    def place(
        self, block: str, tensors: Mapping[str, Tensor], rank: int, step: int, first: int
    ) -> Place:
        """Where an op runs on a rank."""
        spec, order = self.laid.request.model, self.order
        facts = spec.alibi, spec.lora_dropout > 0, self.laid.request.seq_len
        return Place(block, tensors, lambda t: self.share(t, rank), step, first, order, *facts)

    def _group(self, rank: int, axes: tuple[str, ...]) -> tuple[int, ...]:
        """Ranks that meet on a product of axes; on 'tp/share' those that hold the same kv head."""
        at, sizes = self.at[rank], self.laid.sizes
        shared = {a.removesuffix("/share") for a in axes if a.endswith("/share")}
        holders = sizes["tp"] // min(self.laid.request.model.kv_heads, sizes["tp"])
        free = set(axes) | shared
        view = EXPERT if free & (set(EXPERT) - set(DENSE)) else DENSE

        def meets(other: Mapping[str, int]) -> bool:
            same = all(other[a] == at[a] for a in view if a not in free)
            return same and all(other[a] // holders == at[a] // holders for a in shared)

        return tuple(r for r, other in enumerate(self.at) if meets(other))

    def record(self, rank: int, op: Op, event: Event, site: str, phase: str, size: int) -> None:
        """Notes an event of one rank: `times` collectives of `size` bytes, each in `parts`."""
        key = rank, axis_name(op.axes), event.collective, site, phase
        entry = self.sent.setdefault(key, [0, 0])
        entry[0] += event.times * event.parts
        entry[1] += event.times * size

    def traffic(self, rank: int) -> list[TrafficLine]:
        """What the rank sent since `sent` was last emptied, as Laid.traffic declares it."""
        return sorted(TrafficLine(*key, *n) for key, n in self.sent.items() if key[0] == rank)


def add(a: Local, b: Local) -> Local:
    """The sum of two parts of one tensor."""
    return total(a.dims, a, b)


@dataclass
class BlockRun:
    """One block, one microbatch, all ranks of its stage. `env` holds local tensors by rank and name,
    weights among them; after `forward` only what the block keeps (less `lost`, a fault to be found).
    `split`: the schedule runs its backward as I and W."""

    world: World
    name: str
    block: Block
    ranks: Sequence[int]
    step: int
    first: int
    env: dict[int, dict[str, Local]]
    lost: str = ""
    split: bool = False
    grads: dict[int, dict[str, Local]] = field(default_factory=dict)
    again: set[str] = field(default_factory=set)
    loads: dict[int, tuple[int, ...]] = field(default_factory=dict)  # rows to each expert, by rank
    known: dict[int, dict[int, tuple[int, ...]]] = field(default_factory=dict)  # what each is told
    away: dict[int, dict[str, Local]] = field(default_factory=dict)  # kept, in another arena

    def __post_init__(self) -> None:
        self.tensors = self.world.view(self.block)
        self.places = {r: self._place(r) for r in self.ranks}

    def _place(self, rank: int) -> Place:
        world = self.world
        return world.place(self.name, self.tensors, rank, self.step, self.first)

    def forward(self) -> dict[int, Local]:
        """Runs the block; returns its output and keeps what it says it keeps."""
        self._run(self.block.ops(), "F")
        out = {r: self.env[r][self.block.output] for r in self.ranks}
        self.auxiliary = {
            r: sum(int(x.values) for n, x in self.env[r].items() if self.tensors[n].role == "aux")
            % P
            for r in self.ranks
        }
        self._keep(self.block.kept - {self.lost})
        return out

    def backward(self, gradient: Parts) -> None:
        """Fills `grads` from the gradient of the block's output."""
        self._run(replayed(self.block), "B")
        self._keep(frozenset(n for op in self.block.ops() for n in op.saves))
        seeds = {
            n: Local((), (), np.array(AUX_SEED, np.int64))
            for n, t in self.tensors.items()
            if t.role == "aux"
        }
        self.grads = {r: {self.block.output: gradient[r], **seeds} for r in self.ranks}
        for op in reversed(self.block.ops()):
            if self.block.tensors[op.writes].role not in CARRIES:
                continue
            if op.is_region:
                self._region_back(op)
            else:
                sources = self._sources(op)
                self._made_again(sources)
                knows = frozenset((*op.saves, *op.weights, *(o.writes for o in sources)))
                for r in self.ranks:
                    self._op_back(op, r, knows)

    def move(self, phase: str, leaves: bool) -> None:
        """What the block keeps goes to another arena behind F, and comes back before B, as its regions say;
        `leaves`: other work stands between this microbatch's F and B."""
        kept = [op for op in self.block.regions if op.name.startswith("kept:")]
        for op, event in [(k, e) for k in kept for e in k.events if e.phase == phase]:
            for r in self.ranks if leaves or not event.apart else ():
                held, names = self.env[r] | self.away.get(r, {}), (event.of, *event.beside)
                if not (names[0] in held and (op.kind != "reload" or r in self.away)):
                    raise ExecuteError(f"{self.name}:{op.kind} finds nothing to move")
                moved = {n: held[n] for n in names}
                sizes = self.world.laid.sizes
                size = sum(tensor_bytes(self.block.tensors[n], sizes) for n in names)
                site = self.world.laid.site(self.name, op.name)
                self.world.record(r, op, event, site, self._phase(phase, event), size)
                if op.kind == "offload":
                    self.away[r] = {n: self.env[r].pop(n) for n in moved}
                elif op.kind == "reload":
                    self.env[r] |= self.away.pop(r)

    def input_gradient(self) -> dict[int, Local]:
        """The gradient of the block's input."""
        x = self.block.input
        return {r: self._gradient(r, x) for r in self.ranks}

    def _gradient(self, rank: int, name: str) -> Local:
        """A tensor's gradient, zeros where nothing came."""
        found = self.grads[rank].get(name)
        return self.places[rank].filled(name) if found is None else found

    def _keep(self, names: frozenset[str]) -> None:
        kept = names | {w.name for w in self.block.weights()}
        self.env = {r: {n: x for n, x in mine.items() if n in kept} for r, mine in self.env.items()}

    def _get(self, rank: int, op: Op, names: Iterable[str] | None = None) -> Get:
        """What an op may ask for on a rank; in backward `names` only."""

        def get(name: str) -> Local:
            if names is not None and name not in names:
                raise ExecuteError(f"{self.name}.{op.name} needs {name}, which it does not save")
            if name not in self.env[rank]:
                raise ExecuteError(f"{self.name}.{op.name} needs {name}, which is not there")
            return self.env[rank][name]

        return get

    def _run(self, ops: Sequence[Op], phase: str) -> None:
        for op in ops:
            if op.is_region:
                events = [e for e in op.events if e.phase == "F"]
                got = self._move(op, events, op.reads[0], op.writes, self.env, phase)
                for r in self.ranks:
                    self.env[r][op.writes] = got[r]
                continue
            for r in self.ranks:
                made = FORWARD[op.kind](op, self.places[r], self._get(r, op))
                for n, x in made.items():
                    self._holds(op, n, x, r)
                self.env[r] |= made
                if op.kind == "load":
                    self.loads[r] = tuple(int(n) for n in made[op.writes].values)

    def _holds(self, op: Op, name: str, x: Local, rank: int) -> None:
        want = self.world.share(self.tensors[name], rank)
        if x.spans != want:
            raise ExecuteError(f"{self.name}.{op.name}: {name} is {x.spans}, laid as {want}")

    def _move(
        self, op: Op, events: Sequence[Event], x: str, y: str,
        held: Mapping[int, Mapping[str, Local]], phase: str,
    ) -> dict[int, Local]:  # fmt: skip
        """Tensor x, moved as the events say, arrives as y; without one it passes on."""
        site = self.world.laid.site(self.name, op.name)
        for r in self.ranks:
            if x not in held[r]:
                raise ExecuteError(f"{site} needs {x}, which is not there")
        parts = {r: held[r][x] for r in self.ranks}
        if (times := self._copies(op, y, x)) > 1:
            parts = {r: spread(part, "kv_heads", times) for r, part in parts.items()}
        groups = {r: self.world.group(r, op.axes) for r in self.ranks}
        for event in events:
            for r, group in groups.items():
                if len(group) > 1:
                    wants = [self._spans(y, q) for q in group]
                    handed_in = self._handed_in(op, event, parts[r], r, wants)
                    self.world.record(r, op, event, site, self._phase(phase, event), handed_in)
            parts = {
                r: self._collective(op, event, [parts[q] for q in group], y, r, site)
                for r, group in groups.items()
            }
        if op.kind == "gather_map" and x == op.writes:  # of a gradient that is whole
            parts = {r: cut_to(parts[r], self._spans(y, r), site) for r in self.ranks}
        if op.kind in VIEWS and not events:  # nobody to meet: the same rows in the other view
            parts = {r: self._viewed([parts[r]], y, r) for r in self.ranks}
        if op.kind == "counts":
            told = {r: groups[r] if events else (r,) for r in self.ranks}
            self.known = {r: {q: self.loads[q] for q in told[r]} for r in self.ranks}
        for r in self.ranks:
            self._holds(op, y, parts[r], r)
        return parts

    def _copies(self, op: Op, many: str, one: str) -> int:
        """How many kv heads of `many` are copies of one, after an exchange."""
        if op.kind != "exchange" or "kv_heads" not in (place := self.places[self.ranks[0]]).dims(
            one
        ):
            return 1
        return place.size(many, "kv_heads") // place.size(one, "kv_heads")

    def _spans(self, name: str, rank: int) -> tuple[range, ...]:
        return self.world.share(self.tensors[name], rank)

    def _handed_in(
        self, op: Op, event: Event, x: Local, rank: int, wants: Sequence[tuple[range, ...]]
    ) -> int:
        """Bytes; of rows as many as were chosen, whatever is zero; of context what `wants` say."""
        t = self.block.tensors[event.of]
        if event.gradient and (times := self._copies(op, op.writes, op.reads[0])) > 1:
            wants = [scaled(want, x.dims.index("kv_heads"), times) for want in wants]
        if op.kind in ("ring", "exchange", "halo"):
            mine = self._spans(op.reads[0] if event.gradient else op.writes, rank)
            stays = elements(event, x, [mine]) if op.kind == "halo" else 0
            return (elements(event, x, wants) - stays) * BYTES[t.dtype]
        padded = any(d.padded and d.cut for d in t.dims)  # zeros go along
        if op.kind == "counts" or padded:  # of every chunk; here rows go in one
            return tensor_bytes(t, self.world.laid.sizes)
        if not any(d.of for d in t.dims):
            return x.values.size * BYTES[t.dtype]
        laid = self.world.laid
        try:
            mine = rows(laid.mesh, self.known[rank], rank, laid.replicates_tokens)
        except KeyError as peer:
            raise ExecuteError(
                f"{self.name}: rank {rank} does not know what {peer} sends"
            ) from None
        return tensor_bytes(t, laid.sizes | mine)

    def _viewed(self, parts: Sequence[Local], y: str, rank: int) -> Local:
        """What comes, where it belongs; tables of counts have no values here."""
        if not any(d.of for d in self.block.tensors[y].dims):
            return self.places[rank].filled(y)
        return exchange(parts, self._spans(y, rank))

    def _phase(self, phase: str, event: Event) -> str:
        if phase != "B" or not self.split:
            return phase
        return "W" if event.weights else "I"

    def _collective(
        self, op: Op, event: Event, parts: Sequence[Local], y: str, rank: int, site: str
    ) -> Local:
        spans = self._spans(y, rank)
        if event.gradient and (times := self._copies(op, op.writes, y)) > 1:
            return folded(parts, spans, "kv_heads", times, site)
        if op.kind in VIEWS:
            return self._viewed(parts, y, rank)
        if op.kind == "halo":
            dims = tuple(d.name for d in self.tensors[y].dims)
            return rows_to(parts, Local(dims, spans, np.zeros([len(s) for s in spans], np.int64)))
        return arrive(event, parts, spans, site)

    def _region_back(self, op: Op) -> None:
        x, y = op.reads[0], op.writes
        if self.tensors[y].role not in CARRIES:
            return
        events = [e for e in op.events if e.phase == "B" and e.gradient]
        for r in self.ranks:
            self.grads[r][y] = self._gradient(r, y)
        got = self._move(op, events, y, x, self.grads, "B")
        for r in self.ranks:
            self._accumulate(r, x, got[r])

    def _made_again(self, sources: Sequence[Op]) -> None:
        """Regions on what an op saved, whose result it reads, run again; if moving, as declared."""
        for region in sources:
            if region.writes in self.again:
                continue
            events = [e for e in region.events if e.phase == "B" and not e.gradient]
            got = self._move(region, events, region.reads[0], region.writes, self.env, "B")
            self.again.add(region.writes)
            for r in self.ranks:
                self.env[r][region.writes] = got[r]

    def _sources(self, op: Op) -> list[Op]:
        regions = [o for o in self.block.ops() if o.is_region and o.writes in op.reads]
        return [o for o in regions if o.writes not in op.saves and o.reads[0] in op.saves]

    def _op_back(self, op: Op, rank: int, knows: frozenset[str]) -> None:
        place, g = self.places[rank], self._gradient(rank, op.writes)
        for name, x in BACKWARD[op.kind](op, place, self._get(rank, op, knows), g).items():
            t = self.block.tensors[name]
            if t.role in CARRIES and not t.frozen:
                self._accumulate(rank, name, x)

    def _accumulate(self, rank: int, name: str, x: Local) -> None:
        held = self.grads[rank].get(name)
        self.grads[rank][name] = x if held is None else add(held, x)
