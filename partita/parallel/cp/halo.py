"""Spatial parallelism of convolutions: the rows of an image lie on cp, edge rows go to who needs them.

    Jin et al. 2018, "Spatially parallel convolutions"; Dryden et al. 2019 (1903.06681), "Improving
    strong-scaling of CNN training by exploiting finer-grained parallelism": the halo exchange

Each map of r rows lies on n ranks in runs of ceil(r / n); the last ones hold fewer, or none, and padding,
which nobody reads. Output row o of a convolution or a pooling (kernel k, stride s, padding p) sees rows
o s - p .. o s - p + k - 1 of its input, and others may hold some of them. One all_to_all brings these from
their holders, however far they are, and none twice; backward sends their gradients the same way back, and the
holder adds them up. Pixels are data: a rank cuts what it sees out of the whole image, and nothing moves.

Response norms, ReLU and biases are of a place. The first fully connected layer sees the whole map: it is
gathered, and what follows is replicated. The gradient that comes back is then whole on every rank, and each
takes its own rows of it. Kernels' gradients are partial sums over cp, as the sum rule finds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

from partita.base.errors import Problem
from partita.parallel.room import Request, error, region
from partita.spec.image import POOL, POOL_STRIDE, ImageSpec
from partita.spec.program import Block, Dim, Event, Op, Program, Tensor, rewrite

METHOD, LANE = "halo", "halo"
ROWS = ("height", "rows")  # of maps between layers, and within one
SEEN, SENT, RECEIVED = "seen", "sent", "received"  # first words of dims that a window makes


@dataclass(frozen=True, slots=True)
class Window:
    """Rows that meet in a window: `size` of the input, `out` of the output, on `ways` ranks."""

    size: int
    out: int
    kernel: int
    stride: int
    padding: int
    ways: int

    @property
    def held(self) -> int:
        """Rows of the input that a rank holds, padding counted."""
        return -(-self.size // self.ways)

    @property
    def made(self) -> int:
        """Rows of the output that a rank makes, padding counted."""
        return -(-self.out // self.ways)

    @property
    def needed(self) -> int:
        """Rows of the input that its windows see, edges and padding counted."""
        return (self.made - 1) * self.stride + self.kernel

    def first(self, rank: int) -> int:
        """The row of the input at which a rank's windows begin; above the image it is less than 0."""
        return rank * self.made * self.stride - self.padding

    def own(self, rank: int) -> range:
        """Rows of the input that a rank holds."""
        held = self.held
        return range(min(rank * held, self.size), min((rank + 1) * held, self.size))

    def seen(self, rank: int) -> range:
        """Rows of the input, of all ranks, that a rank's windows see."""
        made = range(min(rank * self.made, self.out), min((rank + 1) * self.made, self.out))
        if not made:
            return range(0)
        last = (made.stop - 1) * self.stride - self.padding + self.kernel
        return range(max(self.first(rank), 0), max(min(last, self.size), 0))

    def sends(self, rank: int, to: int) -> range:
        """Rows that a rank hands to another, none to itself."""
        own, seen = self.own(rank), self.seen(to)
        first, end = max(own.start, seen.start), min(own.stop, seen.stop)
        return range(first, end) if rank != to and first < end else range(0)

    def sent(self, rank: int) -> int:
        """Rows that a rank hands out forward, whose gradients it gets."""
        return _moved(self)[0].get(rank, 0)

    def received(self, rank: int) -> int:
        """Rows that it gets forward, whose gradients it hands out."""
        return _moved(self)[1].get(rank, 0)

    @property
    def is_own(self) -> bool:
        """Whether every rank's windows see the rows that it holds, as it holds them."""
        return self.kernel == self.stride == 1 and self.padding == 0

    def named(self, what: str) -> str:
        """The name of a dim that follows from it: what a rank sees, sends or receives."""
        return f"{what} {self.size} {self.out} {self.kernel} {self.stride} {self.padding}"


@lru_cache(maxsize=1024)
def _moved(w: Window) -> tuple[dict[int, int], dict[int, int]]:
    """Rows sent and received by rank, of those that move any: each rank that makes rows, with those that hold
    what it sees. Steps are about as many as ranks with rows, however wide cp is."""
    sent, received = Counter[int](), Counter[int]()
    for to in range(-(-w.out // w.made)):
        seen = w.seen(to)
        for source in range(seen.start // w.held, -(-seen.stop // w.held)) if seen else ():
            if rows := len(w.sends(source, to)):
                sent[source] += rows
                received[to] += rows
    return dict(sent), dict(received)


@lru_cache(maxsize=1024)
def window_of(dim: str, ways: int) -> Window | None:
    """The window that a dim is named after; None for any other dim."""
    what, *sizes = dim.split(" ")
    return Window(*map(int, sizes), ways) if what in (SEEN, SENT, RECEIVED) else None


def windows(image: ImageSpec, ways: int) -> list[Window]:
    """Of all convolutions and poolings but the first convolution, which sees pixels."""
    found = []
    for i, c in enumerate(image.convs):
        found += [Window(c.size, c.out, c.kernel, c.stride, c.padding, ways)] * (i > 0)
        found += [Window(c.out, c.pooled, POOL, POOL_STRIDE, 0, ways)] * c.pool
    return found


def with_rows(sizes: dict[str, int], image: ImageSpec | None, rank: int) -> dict[str, int]:
    """`sizes`, and by dim the rows that a rank of cp sends and receives: the edges of the image fewer."""
    ways, found = sizes["cp"], dict[str, int]()
    for w in windows(image, ways) if image is not None and ways > 1 else ():
        found |= {w.named(SENT): w.sent(rank), w.named(RECEIVED): w.received(rank)}
    return {**sizes, **found} if found else sizes


def problems(job: Request) -> list[Problem]:
    """Images have one way to lie on cp, and sequences have not that one."""
    plan, image = job.plan, job.model.image
    if plan.mesh.cp == 1 or (image is not None) == (plan.context.method == METHOD):
        return []
    asked, ring = f"cp{plan.mesh.cp}:{plan.context.method}", "ring, all_gather, ulysses, hybrid"
    if image is None:
        message = f"{asked} cuts the rows of images, and family {job.model.family} has sequences"
        nearest, limit = plan.with_("context", method="ring", ulysses=1), f"cp of {ring}"
    else:
        message = (
            f"{asked} is of attention over a sequence; the context of an image is its rows, whose edges "
            f"neighbours exchange: cp{plan.mesh.cp}:{METHOD}"
        )
        nearest, limit = plan.with_("context", method=METHOD, ulysses=1), f"cp<n>:{METHOD}"
    return [error("cp", "method", message, asked=asked, limit=limit, nearest=str(nearest))]


def lay(job: Request, program: Program) -> Program:
    """Cuts rows of every map; a halo before each window, a gather before the first fully connected layer."""
    return program.map(lambda block: _cut(block, job.plan.sizes["cp"]))


def _cut(block: Block, ways: int) -> Block:
    if any(op.window for op in block.ops()):
        return _exchanged(_rows(block), block, ways)
    entered = block.tensors[block.input]
    return _whole(block, entered) if any(d.name in ROWS for d in entered.dims) else block


def _cut_dims(dims: tuple[Dim, ...]) -> tuple[Dim, ...]:
    return tuple(replace(d, cut=(*d.cut, "cp"), padded=True) if d.name in ROWS else d for d in dims)


def _rows(block: Block) -> Block:
    """Rows of all that is made cut: not of pixels."""
    tensors = {
        n: t if t.role == "data" else t.with_dims(_cut_dims(t.dims))
        for n, t in block.tensors.items()
    }
    return rewrite(replace(block, tensors=tensors), lambda op: (op.over(_cut_dims),))


def _exchanged(block: Block, before: Block, ways: int) -> Block:
    """Each window reads what it sees: brought by a region, or cut out of pixels."""
    new: dict[str, Tensor] = {}
    writer = {op.writes: op.name.partition(":")[0] for op in block.ops()}

    def change(op: Op) -> Iterable[Op]:
        if not op.window:
            return (op,)
        x, out = op.reads[0], before.tensors[op.writes].dims[-2].size
        w = Window(before.tensors[x].dims[-2].size, out, *op.window, ways)
        pixels = block.tensors[x].role == "data"
        if w.is_own and not pixels:
            return (op,)
        y = f"{x}>cp"
        new[y] = _like(block.tensors[x], y, Dim(w.named(SEEN), w.needed * ways, ("cp",)))
        moved = (
            replace(op, name=f"{op.segment}.rows", kind="crop", reads=(x,), writes=y, weights=(), sums=(),
                    whole=(), saves=(), space=(), extra=(), frozen=False)
            if pixels else _halo(writer.get(x, "input"), block.tensors[x], y, w, new)
        )  # fmt: skip

        def name(t: str) -> str:
            return y if t == x else t

        reads, saves = tuple(map(name, op.reads)), tuple(map(name, op.saves))
        whole = tuple((name(t), d) for t, d in op.whole if d not in ROWS)
        return moved, replace(op, reads=reads, saves=saves, whole=whole)

    block = rewrite(block, change, new)
    return replace(block, kept=frozenset(n for op in block.ops() for n in op.saves))


def _like(t: Tensor, name: str, rows: Dim) -> Tensor:
    """A tensor with other rows."""
    return replace(t, name=name, dims=(*t.dims[:-2], rows, t.dims[-1]))


def _halo(writer: str, t: Tensor, y: str, w: Window, new: dict[str, Tensor]) -> Op:
    """Brings rows to a window: forward what a rank sends, backward the gradients of what it received."""
    for what, rows in zip((SENT, RECEIVED), _moved(w), strict=True):
        most = max(rows.values(), default=0)
        name = f"{t.name}.{what}"
        new[name] = _like(t, name, Dim(w.named(what), most, of=(LANE,)))
    events = (
        Event("F", "all_to_all", f"{t.name}.{SENT}"),
        Event("B", "all_to_all", f"{t.name}.{RECEIVED}", gradient=True),
    )
    return replace(region(writer, "halo", ("cp",), (t.name, y), *events), lane=LANE)


def _whole(block: Block, entered: Tensor) -> Block:
    """A block that sees all rows gathers them; of their gradient a rank takes its own."""
    share = replace(entered, name=f"{entered.name}/cp", dims=_cut_dims(entered.dims))
    events = (Event("F", "all_gather", share.name),)
    gather = region("input", "gather_map", ("cp",), (share.name, entered.name), *events)
    gather, first = replace(gather, lane=LANE), block.ops()[0]

    def change(op: Op) -> Iterable[Op]:
        return (gather, op) if op is first else (op,)

    return replace(rewrite(block, change, {share.name: share}), input=share.name)
