"""Expert parallelism (GShard, Lepikhin et al. 2021): experts lie on ep, and each one's width on etp.

The ranks dp_shard * cp * tp of one replica and stage are seen twice: outside, tokens are cut over them;
between dispatch and combine they are efsdp * ep * etp, and hold the rows that came for their experts.

    dispatch  all_to_all over ep   (rows of tokens this rank holds) -> (rows for experts this rank holds)
    experts   on etp: rows of the peers are gathered first, what they made is added up and scattered
              where tokens are replicated over tp = etp: copy_to and reduce_from, as in tensor parallelism
              (where adapters drop elements of rows, the tokens they are of go the rows' way before them)
    combine   all_to_all over ep   back

With `expert.chunks=n` all of this happens for n parts of a rank's tokens, one after the other, so that the
rows of one travel while another's are computed on.

An expert's gradient is then partial over efsdp and dp_replicate, which is read off; never over ep. Shared
experts are dense and belong to tp. Tensor-expert-data parallelism (TED, Singh et al. 2023) is etp > 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from partita.base.errors import Problem
from partita.parallel.room import PRODUCT_ORDER, Request, copy_to, error, reduce_from, region
from partita.spec.mesh import FOLD
from partita.spec.program import Block, Dim, Event, Op, Program, Sizes, Tensor, rewrite


def problems(job: Request) -> list[Problem]:
    """Experts there are; ep divides them, ep and etp the ranks; tokens are not computed on twice."""
    mesh, m = job.plan.mesh, job.model
    asked = f"ep{mesh.ep} etp{mesh.etp}"
    if not m.experts:
        chunks = job.plan.expert.chunks
        if mesh.ep * mesh.etp == 1 and chunks == 1:
            return []
        asked += f" expert.chunks={chunks}" if chunks > 1 else ""
        nearest = str(job.plan.with_("mesh", ep=1, etp=1).with_("expert", chunks=1))
        text = f"{asked}: the model has no experts"
        return [error("ep", "dense", text, asked=asked, limit="ep1 etp1", nearest=nearest)]
    found = []
    if m.balance_loss and m.balance_over == "batch":
        text = (
            f"balance_over = 'batch' balances each of {job.plan.num_microbatches} microbatches: another "
            "number of them is another loss. balance_over = 'sequence' is the same under every plan"
        )
        asked_for = "model.balance_over=batch"
        found.append(
            Problem("ep", "balance", text, asked=asked_for, limit="sequence", severity="warning")
        )
    if over := m.experts % mesh.ep:
        near = max(n for n in range(1, mesh.ep) if m.experts % n == 0)
        text = f"{m.experts} experts cannot lie on ep {mesh.ep}: {m.experts} % {mesh.ep} = {over}"
        nearest = str(job.plan.with_("mesh", ep=near))
        limit = f"a divisor of {m.experts}"
        found.append(
            error("ep", "experts", text, asked=f"ep{mesh.ep}", limit=limit, nearest=nearest)
        )
    fold = mesh.dp_shard * mesh.cp * mesh.tp
    if fold % (mesh.ep * mesh.etp):
        text = (
            f"ep * etp = {mesh.ep * mesh.etp} must divide dp_shard * cp * tp = {mesh.dp_shard} * {mesh.cp} "
            f"* {mesh.tp} = {fold}"
        )
        nearest = str(job.plan.with_("mesh", ep=1, etp=1))
        found.append(
            error("ep", "fold", text, asked=asked, limit=f"a divisor of {fold}", nearest=nearest)
        )
    if mesh.tp > 1 and not mesh.sp and mesh.etp != mesh.tp:
        text = f"tokens are replicated over tp {mesh.tp}: experts would compute on them {mesh.tp} times"
        nearest = str(job.plan.with_("mesh", sp=True))
        limit = f"tp{mesh.tp}+sp, or etp{mesh.tp}"
        found.append(
            error("ep", "tp", text, asked=f"tp{mesh.tp} {asked}", limit=limit, nearest=nearest)
        )
    return found


def lay(job: Request, program: Program) -> Program:
    """Cuts experts and inserts the exchange. After every room that cuts tokens."""
    sizes, chunks = job.plan.sizes, job.plan.expert.chunks
    return program.map(
        lambda b: _chunked(_lay_block(b, sizes), chunks) if "sent" in b.tensors else b
    )


def _chunked(block: Block, chunks: int) -> Block:
    """Rows go to their experts and back chunk by chunk of a rank's tokens; their numbers go at once."""
    if chunks == 1:
        return block
    loads = block.tensors["loads"]
    each = replace(loads, name="chunk_loads", dims=(Dim("chunks", chunks), *loads.dims))

    def change(op: Op) -> Iterable[Op]:
        if op.kind == "counts":
            return (replace(op, events=tuple(replace(e, of=each.name) for e in op.events)),)
        if op.is_region and op.name.partition(".")[0] in ("dispatch", "experts"):
            parts = 1 if op.kind == "ahead" else chunks
            return (replace(op, events=tuple(replace(e, parts=parts) for e in op.events)),)
        return (op,)

    return rewrite(block, change, {each.name: each})


OUTSIDE = ("sent", "back", "marks")  # on this rank's own tokens


def _row_dim(name: str, slots: Dim, sizes: Sizes, etp: bool) -> Dim:
    """Rows in the experts' view: the token axes of the fold become efsdp, ep and, before etp gathers, etp."""
    outer = tuple(a for a in slots.cut if a not in FOLD)
    inner = tuple(a for a in ("efsdp", "ep", *(("etp",) if etp else ())) if sizes[a] > 1)
    return replace(slots, name=name, cut=(*outer, *inner))


def _join_sums(block: Block, writer: str) -> Block:
    """The sums behind `writer`, one for each axis that cuts seq, as one over their product."""
    name = f"{writer}:reduce_from"
    chain = [op for op in block.ops() if op.name == name]
    if len(chain) < 2:
        return block
    axes = sorted((a for op in chain for a in op.axes), key=PRODUCT_ORDER.index)
    one = reduce_from(writer, tuple(axes), chain[0].reads[0], chain[-1].writes)
    return rewrite(block, lambda op: (op,) if op.name != name else (one,) if op is chain[0] else ())


def _lay_block(block: Block, sizes: Sizes) -> Block:
    block = _join_sums(block, "router.count")
    t = block.tensors
    slots = t["sent"].dims[0]
    replicated = sizes["tp"] > 1 and "tp" not in slots.cut
    inside = _row_dim("gathered", slots, sizes, etp=False)
    outside = _row_dim("arrivals", slots, sizes, etp=not replicated)

    def view(dims: tuple[Dim, ...], rows: Dim = inside) -> tuple[Dim, ...]:
        def one(d: Dim) -> Dim:
            axis = {"experts": "ep", "expert_ffn": "etp"}.get(d.name, "")
            cut = (axis,) if axis and sizes[axis] > 1 else ()
            return rows if d.name == "slots" else replace(d, cut=cut) if axis else d

        return tuple(map(one, dims))

    new = {n: x.with_dims(view(x.dims)) for n, x in t.items() if n not in OUTSIDE}
    for name, like, rows in (
        ("arrived", "sent", outside), ("inside", "sent", inside), ("made", "back", inside),
        ("leaving", "back", outside), ("padded_in", "sent", replace(inside, name="padded", cut=outside.cut)),
        ("spread_out", "back", replace(inside, name="spread")), ("marks", "marks", slots),
        ("marks_arrived", "marks", outside), ("marks_inside", "marks", inside),
        ("padded_marks", "marks", replace(inside, name="padded", cut=outside.cut)),
    ):  # fmt: skip
        if like not in t:
            continue
        new[name] = replace(t[like], name=name, dims=view(t[like].dims, rows))
    etp = sizes["etp"] > 1
    if etp:
        new["made"] = replace(new["made"], partial=("etp",))
    names = {} if etp else {"inside": "arrived", "made": "leaving"}
    for gone in names:
        del new[gone]
    names["marks"] = "marks_inside" if etp and not replicated else "marks_arrived"
    seq = next(d.cut for d in t["chosen"].dims if d.name == "seq") or ("cp",)
    if "admitted" in t:
        whole = (replace(d, cut=()) if d.name == "seq" else d for d in t["chosen"].dims)
        new["every"] = replace(t["chosen"], name="every", dims=tuple(whole))
    members = Dim("members", sizes["ep"] * (1 if replicated else sizes["etp"]))
    new["table"] = Tensor("table", (members, *t["loads"].dims), "told")

    block = rewrite(block, lambda op: (op.over(view),))
    block = rewrite(block, _Exchange(etp, replicated, names, seq), new)
    here = {"sent": names.get("inside", "inside"), "marks": names["marks"]}
    kept = frozenset(here.get(n, n) for n in block.kept)
    return _drop_idle(replace(block, kept=kept), sizes)


class _Exchange:
    """What each op of a block with experts becomes: regions around the experts."""

    def __init__(
        self, etp: bool, replicated: bool, names: dict[str, str], seq: tuple[str, ...]
    ) -> None:
        self.etp, self.replicated, self.names, self.seq = etp, replicated, names, seq

    def __call__(self, op: Op) -> Iterable[Op]:
        """The op and its regions."""
        inside = self.names.get("inside", "inside")
        if op.name == "dispatch.limit":
            event = Event("F", "all_gather", "chosen")
            picks = region("router.choose", "gather_picks", self.seq, ("chosen", "every"), event)
            return (picks, replace(op, reads=("chosen", "every")))
        if op.name == "dispatch.count":
            event = Event("F", "all_gather", "loads")
            peers = ("ep",) if self.replicated else ("ep", "etp")
            counts = region(op.name, "counts", peers, ("loads", "table"), event)
            return (op, replace(counts, lane="ep"))
        if op.name == "dispatch.mark":
            return (op, *self._marks(op.name))
        if op.name == "dispatch.send":
            return (op, self._all_to_all(op.name, "sent", "arrived"), *self._enter())
        here = {"sent": inside, "marks": self.names["marks"]}
        reads, saves = (tuple(here.get(n, n) for n in names) for names in (op.reads, op.saves))
        if op.name == "experts.gate_up":
            return (replace(op, reads=reads, saves=saves),)
        if op.name == "experts.down":
            made = replace(op, reads=reads, saves=saves, writes=self.names.get("made", "made"))
            return (made, *self._leave(), self._all_to_all("experts.back", "leaving", "back"))
        return (op,)

    def _all_to_all(self, writer: str, x: str, y: str) -> Op:
        """Rows to the ranks that hold their experts, or back; backward the other way."""
        op = region(
            writer, "all_to_all", ("ep",), (x, y),
            Event("F", "all_to_all", x),
            Event("B", "all_to_all", y, gradient=True),
        )  # fmt: skip
        return replace(op, reads=(x, "table"))

    def _marks(self, writer: str) -> tuple[Op, ...]:
        """Which token each row is of, brought where rows will be."""
        x, y = "marks", "marks_arrived"
        op = region(writer, "all_to_all", ("ep",), (x, y), Event("F", "all_to_all", x))
        found = (replace(op, reads=(x, "table")),)
        if self.names["marks"] == y:
            return found
        event, move = Event("F", "all_gather", "padded_marks"), (y, "marks_inside")
        op = region("dispatch.marked", "gather_rows", ("etp",), move, event)
        return (*found, replace(op, reads=(y, "table")))

    def _enter(self) -> tuple[Op, ...]:
        if not self.etp:
            return ()
        if self.replicated:
            return (copy_to("dispatch.receive", ("etp",), "arrived", "inside"),)
        op = region(
            "dispatch.receive", "gather_rows", ("etp",), ("arrived", "inside"),
            Event("F", "all_gather", "padded_in"),
            Event("B", "reduce_scatter", "spread_out", gradient=True),
        )  # fmt: skip
        return (replace(op, reads=("arrived", "table")),)

    def _leave(self) -> tuple[Op, ...]:
        if not self.etp:
            return ()
        if self.replicated:
            return (reduce_from("experts.down", ("etp",), "made", "leaving"),)
        op = region(
            "experts.down", "scatter_rows", ("etp",), ("made", "leaving"),
            Event("F", "reduce_scatter", "spread_out"),
            Event("B", "all_gather", "padded_in", gradient=True),
        )  # fmt: skip
        return (replace(op, reads=("made", "table")),)


def _drop_idle(block: Block, sizes: Sizes) -> Block:
    """An exchange over axes of size 1 moves nothing: it only changes the view."""

    def change(op: Op) -> Iterable[Op]:
        idle = op.is_region and all(sizes.get(a, 2) == 1 for a in op.axes)
        return (replace(op, events=()),) if idle else (op,)

    return rewrite(block, change)
