"""Every plan for a job: the choices, what the user fixed or forbade, and how they nest.

    world     any number of devices of FEW; of more divisors, whole nodes of NODES, else times powers of two
    mesh      pp, dp, cp, tp, sp, split          their product (but sp) = world; dp divides the batch
    fold      ep, etp; recompute
    method    cp's
    schedule  x virtual stages, micro_batch_size all divisors of a replica's samples
    states    dp = dp_replicate x dp_shard, ZeRO stage; the order of axes on the links

Sizes are all divisors, not powers of two. The order of axes is the default or what the user fixes, or else
all others (orders.py); the split of the layers is the balanced one, precision what the user fixes. What a
leaf may not be is said by `problems` alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from partita.parallel.tp.rules import channels
from partita.planner.orders import other_orders
from partita.planner.words import Words
from partita.spec.job import Job
from partita.spec.mesh import divisors
from partita.spec.plan import DEFAULT_ORDER, OffloadPlan, Plan, has_fixed_stages

SCHEDULES = (
    "1f1b", "gpipe", "zb_h1", "zb_h2", "zb_v", "v_half", "v_min", "dualpipe", "dualpipev",
)  # fmt: skip
VIRTUAL = ("interleaved_1f1b", "looped_bfs", "interleaved_zb")
MOST_VIRTUAL = 8
FEW, NODES = 16, 16  # devices any number of which may be ranks; nodes any number of which may
HERE = OffloadPlan()  # all on the device
Order = tuple[str, ...]
State = tuple[int, int, Order]
EVERY = (2, 3, 4)  # full recomputation of only each k-th block


class MeshChoice(NamedTuple):
    """Sizes before dp is told apart."""

    pp: int
    dp: int
    cp: int
    tp: int
    sp: bool
    split: int = 1

    @property
    def world(self) -> int:
        """Ranks."""
        return self.pp * self.dp * self.cp * self.inner

    @property
    def inner(self) -> int:
        """Ranks of tp and of the split that stands inside it."""
        return self.tp * self.split


class Shape(NamedTuple):
    """How attention sees a cut sequence, and experts the ranks."""

    method: str = "ring"
    ulysses: int = 1
    ep: int = 1
    etp: int = 1

    @lru_cache(maxsize=4096)  # noqa: B019 (shapes are few)
    def narrower(self, cp: int) -> list[tuple[int, Shape]]:
        """Fewer parts into which the same method may cut a sequence, each a divisor; a hybrid of but its own
        ranks of ulysses is ulysses. Of rows none: fewer parts may have more edges to send for their size."""
        if self.method == "halo":
            return []
        if self.method != "hybrid":
            return [(parts, self) for parts in divisors(cp)[1:-1]]
        alone = self._replace(method="ulysses", ulysses=1)
        found = [parts for parts in divisors(cp)[1:-1] if parts % self.ulysses == 0]
        return [(parts, alone if parts == self.ulysses else self) for parts in found]


class Tokens(NamedTuple):
    """What backward makes again, and a microbatch's samples."""

    mode: str = "none"
    every: int = 1
    micro: int = 1


class Leaf(NamedTuple):
    """The rest."""

    schedule: str = "1f1b"
    virtual: int = 1
    dp_shard: int = 1
    zero: int = 3
    order: Order = DEFAULT_ORDER
    split: tuple[int, ...] = ()  # layers of each stage; none: the balanced one
    costs: tuple[str, ...] = ()  # of auto, as a plan's line has them
    limit: int = 0


class Space:
    """The choices of a job under a user's words, level by level; what lies elsewhere is the same of all
    plans. `turned`: of plans in every order of axes but the default; `uneven`: with layers split in other
    ways than the balanced one (uneven.py)."""

    uneven, spare = False, 0  # stages beyond the layers: ends with embedding and head alone

    def __init__(
        self, job: Job, words: Words, dtype: str, offload: OffloadPlan = HERE, turned: bool = False
    ) -> None:
        self.job, self.words, self.dtype, self.offload = job, words, dtype, offload
        stated = [v for f, v in words.fixed if f == "order"]
        self.stated: Order | None = stated[0] if stated else None  # type: ignore[assignment]
        self.turned = turned
        self.batch, self.model = job.train.global_batch_size, job.model
        self._micros: dict[int, list[int]] = {}
        self._schedules: dict[int, list[tuple[str, int]]] = {}
        self._states: dict[tuple[int, ...], list[State]] = {}

    def worlds(self) -> list[int]:
        """Numbers of ranks, most first."""
        devices, node = self.job.cluster.devices, self.job.cluster.devices_per_node
        if devices <= FEW:
            return list(range(devices, 0, -1))
        found = set(divisors(devices))
        if devices <= NODES * node:
            found.update(range(node, devices + 1, node))
        size = node
        while size <= devices:
            found.add(devices // size * size)
            size *= 2
        return sorted(found, reverse=True)

    def meshes(self) -> Iterator[MeshChoice]:
        """Every mesh that ranks, layers, heads and batch allow at all."""
        ok, text = self.words.admit, self.model.image is None
        for world in self.worlds():
            for pp in divisors(world):
                if pp > self.model.layers + self.spare or not ok("pp", pp):
                    continue
                for tp, split in self._widths(world // pp):
                    for cp in divisors(world // pp // tp // split):
                        dp = world // pp // tp // split // cp
                        if self.batch % dp or not self._cuts(cp):
                            continue
                        if not (ok("cp", cp) and ok("dp", dp)):
                            continue
                        for sp in (True, False) if tp > 1 and text else (False,):
                            if ok("sp", sp):
                                yield MeshChoice(pp, dp, cp, tp, sp, split)

    def _widths(self, ranks: int) -> list[tuple[int, int]]:
        """tp and split, each of as many ranks as heads, or what lies in a group and the groups, allow."""
        model, ok, image = self.model, self.words.admit, self.model.image
        every = [model.heads] if image is None else [*channels(image, model.hidden).values()]
        groups = 1 if image is None else image.groups
        return [
            (tp, split)
            for tp in divisors(ranks)
            if ok("tp", tp) and not any(n % tp for n in every)
            for split in divisors(ranks // tp)
            if groups % split == 0 and ok("groups", split) and ok("split", split)
        ]

    def _cuts(self, cp: int) -> bool:
        """Whether cp may cut so many ways: the sequence, or the rows of the first convolution's map."""
        image = self.model.image
        return self.job.train.seq_len % cp == 0 if image is None else cp <= image.convs[0].out

    def shapes(self, mesh: MeshChoice) -> list[Shape]:
        """cp's methods times the foldings of experts."""
        return [Shape(*m, *e) for m in self.methods(mesh) for e in self.folds(mesh)]

    def methods(self, mesh: MeshChoice) -> list[tuple[str, int]]:
        """How attention sees a cut sequence: a method, and the ranks of ulysses it states."""
        if mesh.cp == 1:  # has none that words could fix
            return [("ring", 1)] if all(f != "method" for f, _ in self.words.fixed) else []
        if self.model.image is not None:  # rows have but one way
            return [("halo", 1)] if self.words.admit("method", "halo") else []
        found = [("ring", 1), ("all_gather", 1), ("ulysses", 1)]
        found += [("hybrid", u) for u in divisors(mesh.cp)[1:-1] if self.words.admit("ulysses", u)]
        return [m for m in found if self.words.admit("method", m[0])]

    def folds(self, mesh: MeshChoice) -> list[tuple[int, int]]:
        """ep and etp."""
        if not self.model.experts:
            ok = self.words.admit("ep", 1) and self.words.admit("etp", 1)
            return [(1, 1)] if ok else []
        fold = mesh.dp * mesh.cp * mesh.inner
        return [
            (ep, etp)
            for ep in divisors(self.model.experts)
            for etp in sorted({1, mesh.tp})
            if fold % (ep * etp) == 0
            and self.words.admit("ep", ep)
            and self.words.admit("etp", etp)
        ]

    def tokens(self, mesh: MeshChoice) -> list[Tokens]:
        """Recomputation times microbatches."""
        return [Tokens(*mode, micro) for mode in self.modes() for micro in self.micros(mesh)]

    def modes(self) -> list[tuple[str, int]]:
        """What is recomputed, and of every how many blocks."""
        every = [("full", k) for k in EVERY if k < self.model.layers]
        modes = [("none", 1), ("selective", 1), ("full", 1), *every]
        return [m for m in modes if self.words.admit("recompute", m[0])]

    def micros(self, mesh: MeshChoice) -> list[int]:
        """Samples of a microbatch."""
        if mesh.dp not in self._micros:
            samples, stated = self.batch // mesh.dp, self.job.train.micro_batch_size
            self._micros[mesh.dp] = [
                b
                for b in divisors(samples)
                if stated in (None, b) and self.words.admit("num_microbatches", samples // b)
            ]
        return self._micros[mesh.dp]

    def schedules(self, mesh: MeshChoice) -> list[tuple[str, int]]:
        """Names and stages a rank."""
        key = mesh.pp
        if key not in self._schedules:
            self._schedules[key] = self._all_schedules(mesh)
        return self._schedules[key]

    def _all_schedules(self, mesh: MeshChoice) -> list[tuple[str, int]]:
        if mesh.pp == 1:
            return (
                [("1f1b", 1)]
                if all(f not in ("schedule", "virtual") for f, _ in self.words.fixed)
                else []
            )
        most = min(MOST_VIRTUAL, (self.model.layers + self.spare) // mesh.pp)
        found = [(n, 2 if has_fixed_stages(n) else 1) for n in SCHEDULES]
        found = [(n, v) for n, v in found if v <= max(most, 1)]
        found += [(n, v) for n in VIRTUAL for v in range(2, most + 1)]
        found += [(n, v) for n, v in self._named() if v <= most]
        return [
            (n, v)
            for n, v in found
            if self.words.admit("schedule", n) and self.words.admit("virtual", v)
        ]

    def _named(self) -> list[tuple[str, int]]:
        """Schedules that are searched where they are fixed alone: chimera, a vee of a stated memory."""
        names = [str(v) for f, v in self.words.fixed if f == "schedule"]
        vees = [(n, 2) for n in names if has_fixed_stages(n) and n not in SCHEDULES]
        return [*vees, *((n, 1) for n in names if n == "chimera")]

    def states(self, mesh: MeshChoice, shape: Shape) -> list[State]:
        """(dp_shard, ZeRO stage, order of axes); ZeRO 0 on dp_shard only where experts need the axis."""
        axes = (mesh.pp, mesh.cp, mesh.inner) if self.turned else (mesh.cp * mesh.inner,)
        key = (mesh.dp, *axes, shape.ep, shape.etp)
        if key not in self._states:
            self._states[key] = self._all_states(mesh, shape)
        return self._states[key]

    def _all_states(self, mesh: MeshChoice, shape: Shape) -> list[State]:
        found = []
        for shard in divisors(mesh.dp):
            ok = self.words.admit
            fits = ok("dp_shard", shard) and ok("dp_replicate", mesh.dp // shard)
            if not fits or shard * mesh.cp * mesh.inner % (shape.ep * shape.etp):
                continue
            stages = (3,) if shard == 1 else (1, 2, 3, *((0,) if shape.ep > 1 else ()))
            if "parameters" in self.offload.targets:  # they come as the shards of stage 3
                stages = (3,) if shard > 1 else ()
            zeros = [z for z in stages if self.words.admit("zero", z if shard > 1 else 0)]
            found += [(shard, z, order) for order in self.orders(mesh, shard) for z in zeros]
        return found

    def orders(self, mesh: MeshChoice, shard: int) -> list[Order]:
        """Orders of axes, innermost first."""
        if not self.turned:
            return [self.stated or DEFAULT_ORDER]
        sizes = (mesh.inner, mesh.cp, shard, mesh.dp // shard, mesh.pp)
        return [o for o in other_orders(sizes, self.job.cluster) if self.words.admit("order", o)]

    def times(self, mesh: MeshChoice, schedule: tuple[str, int]) -> int:
        """How many plans a schedule stands for, everything else being chosen."""
        return 1

    def leaves(self, mesh: MeshChoice) -> int:
        """How many plans lie below."""
        states = sum(len(self.states(mesh, Shape(ep=n, etp=t))) for n, t in self.folds(mesh))
        tokens = len(self.modes()) * len(self.micros(mesh))
        schedules = sum(self.times(mesh, s) for s in self.schedules(mesh))
        return tokens * len(self.methods(mesh)) * schedules * states

    def plan(self, mesh: MeshChoice, shape: Shape, tokens: Tokens, leaf: Leaf) -> Plan:
        """The plan of one leaf, with all of it on the device."""
        base = Plan()
        m = self.batch // mesh.dp // tokens.micro
        return replace(
            base,
            mesh=replace(
                base.mesh, pp=mesh.pp, dp_replicate=mesh.dp // leaf.dp_shard, dp_shard=leaf.dp_shard,
                cp=mesh.cp, tp=mesh.tp, sp=mesh.sp, ep=shape.ep, etp=shape.etp, order=leaf.order,
                split=mesh.split,
            ),
            pipeline=replace(
                base.pipeline, schedule=leaf.schedule, virtual_stages=leaf.virtual, num_microbatches=m,
                split=leaf.split, costs=leaf.costs, limit=leaf.limit,
            ),
            data=replace(base.data, zero_stage=leaf.zero),
            context=replace(base.context, method=shape.method, ulysses=shape.ulysses),
            recompute=replace(base.recompute, mode=tokens.mode, every=tokens.every),
            precision=replace(base.precision, dtype=self.dtype),
        )  # fmt: skip


def default_dtype(job: Job) -> str:
    """bf16 where the device is faster in it, else fp32."""
    return "bf16" if job.cluster.peak("bf16") > job.cluster.peak("fp32") else "fp32"
