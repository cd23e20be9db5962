"""Context parallelism: seq lies on `cp` (outer) and `ulysses` (inner); attention alone must see more.

    ring        keys and values go round the ring, block by block       Liu et al. 2023 (2310.01889)
    all_gather  every rank gathers them                                 Llama 3 (2407.21783)
    ulysses     all_to_all: heads are cut between, seq is not           Jacobs et al. 2023 (2309.14509)
    hybrid UxR  ulysses U inside a ring of R                            Fang and Zhao 2024 (2405.07719)
    halo        rows of images, and nothing of the kind: halo.py        Dryden et al. 2019 (1903.06681)

Everything else works on its own tokens; the loss is a partial sum, and so is every weight's gradient: both
come out of the sum rule. A ring hands on k and v n-1 times in F and in B, and in B the gradients of both, in
the wide dtype. Ulysses hands in q, k, v and the output; kv heads that the ranks do not divide are handed in
as often as it takes for the ranks to divide them.
Rings want each rank's share in an order of equal work: balance.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from math import lcm

from partita.base.errors import Problem
from partita.parallel.cp import halo
from partita.parallel.cp.balance import Order, order
from partita.parallel.room import (
    Request,
    cut_everywhere,
    cut_tensor,
    error,
    filled_up,
    region,
    sum_rule,
)
from partita.spec.model_sizes import ModelSizes
from partita.spec.plan import Plan
from partita.spec.program import Block, Dim, Event, Op, Program, Tensor, rewrite

AXES = ("cp", "ulysses")
HEADS = ("heads", "kv_heads")


def problems(job: Request) -> list[Problem]:
    """Heads divide by what cuts them; a sequence that does not is filled up; rows of images lie as they
    come."""
    if job.plan.mesh.cp == 1:
        return []
    other = halo.problems(job)
    return (
        other
        if other or job.model.image is not None
        else [*_heads(job), *filled_up(job, "cp", _asked(job.plan))]
    )


def _heads_fit(heads: int, job: Request) -> bool:
    ways = job.plan.sizes["ulysses"] * job.plan.sizes["tp"]
    return job.plan.sizes["ulysses"] == 1 or heads % ways == 0


def _legal(job: Request) -> bool:
    return _heads_fit(job.model.heads, job)


def _heads(job: Request) -> Iterable[Problem]:
    m, inner, tp = job.model, job.plan.sizes["ulysses"], job.plan.sizes["tp"]
    ways = inner * tp
    on = f"cannot lie on ulysses {inner} x tp {tp} = {ways} ranks"
    if not _heads_fit(m.heads, job):
        yield error(
            "cp", "heads", f"{m.heads} query heads {on}: {m.heads} % {ways} = {m.heads % ways}",
            asked=_asked(job.plan), limit=f"ulysses * tp divides {m.heads}", nearest=_nearest(job),
        )  # fmt: skip


def _asked(plan: Plan) -> str:
    method = plan.context.method
    if method == "hybrid":
        method = f"hybrid{plan.sizes['ulysses']}x{plan.sizes['cp']}"
    return f"cp{plan.mesh.cp}:{method}"


def _nearest(job: Request) -> str:
    """The largest smaller ring, gather or Ulysses that this room allows; a hybrid's is a ring."""
    method = job.plan.context.method if job.plan.context.method != "hybrid" else "ring"
    alone = job.plan.with_("context", method=method, ulysses=1)
    sizes = (n for n in range(job.plan.mesh.cp, 1, -1) if job.seq_len % n == 0)
    smaller = (alone.with_("mesh", cp=size) for size in sizes)
    none = job.plan.with_("mesh", cp=1).with_("context", method="ring", ulysses=1)
    return str(next((p for p in smaller if _legal(replace(job, plan=p))), none))


def laid_order(job: Request) -> Order:
    """Which position lies at each place of the laid sequence where no documents are packed."""
    ring = 1 if job.model.image is not None else job.plan.sizes["cp"]
    window = balanced_window(job.model)
    return order(job.laid_len, ring, window=window, causal=job.model.causal)


def balanced_window(model: ModelSizes) -> int:
    """What all layers see, which shares are balanced for; 0 where some see all: those weigh most."""
    return min(model.windows) if model.image is None else 0


def lay(job: Request, program: Program) -> Program:
    """Cuts seq; then what must see it whole gets its exchanges, and behind them its ring. Of images rows."""
    sizes = job.plan.sizes
    if job.model.image is not None:
        return program if sizes["cp"] == 1 else halo.lay(job, program)
    for axis in AXES:
        if sizes[axis] > 1:
            program = program.map(
                lambda b, axis=axis: sum_rule(cut_everywhere(b, ("seq",), axis), axis)
            )
    if sizes["ulysses"] > 1:
        copied = _copied(job)
        program = program.map(lambda b: _ulysses(b, copied))
    if sizes["cp"] > 1:
        gathers = job.plan.context.method == "all_gather"
        program = program.map(lambda b: _travel(b, sizes["cp"], gathers))
    return program


def _must_travel(block: Block, op: Op, axis: str) -> list[str]:
    """Tensors the op must see whole along seq, which the axis cuts."""
    dims = block.tensors
    return [x for x, name in op.whole for d in dims[x].dims if d.name == name and axis in d.cut]


def _writers(block: Block) -> dict[str, str]:
    """Tensor -> the op that made its values, regions looked through."""
    return {op.writes: op.name.partition(":")[0] for op in block.ops()}


def _travel(block: Block, ring: int, gathers: bool) -> Block:
    """Keys and values go round the ring, or are gathered; backward moves the share it kept again."""
    new: dict[str, Tensor] = {}
    writer = _writers(block)

    def move(x: str) -> Op:
        t, y = block.tensors[x], f"{x}>cp"
        whole = tuple(replace(d, cut=tuple(a for a in d.cut if a != "cp")) for d in t.dims)
        new[y] = replace(t, name=y, dims=whole)
        if gathers:
            events = (
                Event("F", "all_gather", x), Event("B", "all_gather", x),
                Event("B", "reduce_scatter", y, gradient=True),
            )  # fmt: skip
            return region(writer[x], "all_gather", ("cp",), (x, y), *events)
        new[f"{x}.slope"] = replace(t, name=f"{x}.slope", role="stat")
        hops = ring - 1
        events = (
            Event("F", "send", x, times=hops), Event("B", "send", x, times=hops),
            Event("B", "send", f"{x}.slope", gradient=True, times=hops),
        )  # fmt: skip
        return region(writer[x], "ring", ("cp",), (x, y), *events)

    def change(op: Op) -> Iterable[Op]:
        moved = _must_travel(block, op, "cp")
        if not moved:
            return (op,)
        new.update(
            {x: cut_tensor(block.tensors[x], ("keys",), "cp") for x in op.scratch}
        )  # of a share
        name = {x: f"{x}>cp" for x in moved}
        reads = tuple(name.get(x, x) for x in op.reads)
        whole = tuple((name.get(x, x), d) for x, d in op.whole)
        return (*map(move, moved), replace(op, reads=reads, whole=whole))

    return rewrite(block, change, new)


def _copied(job: Request) -> int:
    """Key/value heads of all tp ranks, copies among them, that `ulysses` divides on each."""
    tp = job.plan.sizes["tp"]
    return tp * lcm(max(job.model.kv_heads // tp, 1), job.plan.sizes["ulysses"])


def _copies(dims: tuple[Dim, ...], copied: int) -> tuple[Dim, ...]:
    return tuple(replace(d, size=copied) if d.name == "kv_heads" else d for d in dims)


def _turn(dims: tuple[Dim, ...], copied: int) -> tuple[Dim, ...]:
    """Between the exchanges: seq is whole on the axis, heads are cut by it, kv heads are `copied`."""
    apart = tuple(replace(d, cut=tuple(a for a in d.cut if a != "ulysses")) for d in dims)
    return cut_tensor(Tensor("", _copies(apart, copied)), HEADS, "ulysses").dims


def _ulysses(block: Block, copied: int) -> Block:
    """From the first op that must see seq whole to the last, tensors are turned; what crosses goes by
    all_to_all. Kv heads that the ranks do not divide: as many copies of each are handed in as make
    `copied`."""
    ops, t = block.ops(), block.tensors
    core = [i for i, op in enumerate(ops) if _must_travel(block, op, "ulysses")]
    if not core:
        return block
    inner = ops[core[0] : core[-1] + 1]
    written = {op.writes for op in inner}
    left = {x for op in ops if op not in inner for x in op.reads}
    sent = {x: f"{x}>ulysses" for op in inner for x in op.reads if x not in written}
    back = {y: f"{y}~ulysses" for y in sorted(written & left)}
    moved = {**sent, **back}
    inside = {n for op in inner for n in (op.writes, *op.saves, *op.scratch) if n not in moved}
    new = {n: replace(t[n], dims=_turn(t[n].dims, copied)) for n in inside}
    new |= {y: replace(t[x], name=y, dims=_turn(t[x].dims, copied)) for x, y in moved.items()}
    for x in sent:
        new[f"{x}*"] = replace(t[x], name=f"{x}*", dims=_copies(t[x].dims, copied))
    writer = _writers(block)

    def exchange(made: str, x: str, y: str, handed: str) -> Op:
        events = (Event("F", "all_to_all", handed), Event("B", "all_to_all", y, gradient=True))
        return region(made, "exchange", ("ulysses",), (x, y), *events)

    def name(x: str) -> str:
        return moved.get(x, x)

    def change(op: Op) -> Iterable[Op]:
        if op not in inner:
            return (op,)
        first = [exchange(writer[x], x, y, f"{x}*") for x, y in sent.items() if op is inner[0]]
        last = [exchange(op.name, y, x, y) for x, y in back.items() if x == op.writes]
        turned = replace(
            op, reads=tuple(map(name, op.reads)), writes=name(op.writes), space=_turn(op.space, copied),
            saves=tuple(map(name, op.saves)), whole=tuple((name(x), d) for x, d in op.whole),
        )  # fmt: skip
        return (*first, turned, *last)

    block = rewrite(block, change, new)
    return replace(block, kept=frozenset(n for op in block.ops() for n in op.saves))
