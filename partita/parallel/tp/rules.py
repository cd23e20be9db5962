"""Tensor parallelism (Shoeybi et al. 2019): heads, ffn and vocab lie on tp.

The rules of room.py find every collective: copy_to before the column-parallel linears, reduce_from
behind the row-parallel ones, the embedding and the three small sums of the loss: one all-reduce a
sub-block and direction; forward one for both, where attention and mlp stand side by side. Fewer kv heads
than ranks: neighbours share one, and its gradient is partial over 'tp/share'. A vocabulary or an ffn that
does not divide is padded; padding belongs to no box, and an ffn's is zeros that stay: what they make is
zero, and so is their gradient.

A convolutional model (Krizhevsky 2014, sec. 4, where every rank sees the same images): each convolution and
each fully connected layer makes its share of the channels of every group, of all that it reads: its block's
input is gathered, and so is what a response norm looks around in; backward sums and scatters their gradient.
What leaves a block is a share. Classes are the vocabulary, and their loss is by parts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from partita.base.errors import Problem
from partita.parallel.room import (
    Request,
    copy_rule,
    cut,
    cut_everywhere,
    error,
    gather_from,
    sum_once,
    sum_rule,
)
from partita.spec.image import ImageSpec
from partita.spec.program import Block, Op, Program, Tensor, rewrite

DIMS = ("heads", "kv_heads", "ffn", "vocab")
OUTPUTS = ("filters", "units", "vocab")  # of a convolutional model, in the layer that makes them
CARRIED = ("channels", "units")  # the same between blocks


def problems(job: Request) -> list[Problem]:
    """tp divides heads, and kv heads divide tp or the other way round; or it divides every layer's channels
    of a group."""
    tp, m = job.plan.mesh.tp, job.model
    if tp == 1:
        return []
    if m.image is not None:
        sizes = channels(m.image, m.hidden)
        wrong = next((w for w, n in sizes.items() if n % tp), None)
        return [] if wrong is None else [_divides("channels", wrong, sizes[wrong], tp, job)]
    found = []
    if m.heads % tp:
        found.append(_divides("heads", "query heads", m.heads, tp, job))
    if m.kv_heads % tp and tp % m.kv_heads:
        found.append(_divides("kv_heads", "key/value heads", m.kv_heads, tp, job))
    return found


def channels(image: ImageSpec, hidden: int) -> dict[str, int]:
    """What tp has to divide of a convolutional model -> how many there are in a group."""
    convs = {
        f"channels a group of convolution {i}": c.filters for i, c in enumerate(image.convs, 1)
    }
    return {**convs, "units a group of a fully connected layer": hidden // image.groups}


def legal(job: Request, tp: int) -> bool:
    """Whether every dim of the model lies on tp ranks."""
    m = job.model
    if m.image is not None:
        return not any(n % tp for n in channels(m.image, m.hidden).values())
    shares = m.kv_heads % tp == 0 or tp % m.kv_heads == 0
    return m.heads % tp == 0 and shares


def _divides(rule: str, what: str, size: int, tp: int, job: Request) -> Problem:
    most = job.model.heads if job.model.image is None else job.model.hidden
    fits = [n for n in range(1, most + 1) if legal(job, n)]
    near = max((n for n in fits if n <= tp), default=1)
    nearest = str(job.plan.with_("mesh", tp=near, sp=job.plan.mesh.sp and near > 1))
    law = "one must divide the other" if rule == "kv_heads" else "tp must divide them"
    message = f"{size} {what} cannot lie on {tp} ranks: {law}; tp may be {_list(fits)}"
    return error(
        "tp", rule, message, asked=f"tp{tp}", limit=f"tp in {_list(fits)}", nearest=nearest
    )


def _list(values: list[int]) -> str:
    return ", ".join(map(str, values[:12])) + (", ..." if len(values) > 12 else "")


def lay(job: Request, program: Program) -> Program:
    """Cuts DIMS, or a convolutional model's OUTPUTS, by tp and inserts its regions. Nothing moves at tp 1."""
    if job.plan.mesh.tp == 1:
        return program

    def block(b: Block) -> Block:
        return sum_once(sum_rule(copy_rule(cut_everywhere(b, DIMS, "tp"), "tp"), "tp"), "tp")

    return program.map(block if job.model.image is None else _channels)


def _channels(block: Block) -> Block:
    """Weights make their share of what is no sum, and that leaves; a share that enters is gathered."""
    ops, before = block.ops(), block.tensors
    at = next(i for i, op in enumerate(ops) if op.weights)
    made = {
        d.name for op in ops for w in op.weights for d in before[w].dims if d.name not in op.sums
    }
    block = cut_everywhere(block, made.intersection(OUTPUTS), "tp")
    behind = {
        n for op in ops[at:] for n in (op.writes, *op.saves) if n == op.writes or _picks(before[n])
    }
    enters = {block.input} if before[block.input].role == "value" else set()
    block = cut(block, CARRIED, "tp", lambda t: t.name in behind | enters)
    block = _gathered(block, before[block.input])
    return sum_rule(block, "tp")


def _picks(t: Tensor) -> bool:
    return t.role == "route"


def _gathered(block: Block, entered: Tensor) -> Block:
    """Regions that bring what must be whole: the block's input, which enters as a share of it, and what a
    response norm looks around in."""
    tensors, x = dict(block.tensors), block.input
    first, writer = block.ops()[0], {op.writes: op.name for op in block.ops()}
    share, kept = f"{x}/tp", set(block.kept)
    enters = "tp" in tensors[x].axes()
    if enters:
        tensors |= {share: replace(tensors[x], name=share), x: entered}

    def change(op: Op) -> Iterable[Op]:
        if enters and op is first:
            yield gather_from("input", ("tp",), share, x, again=False)
        for r, dim in op.whole:
            cuts = next((d.cut for d in tensors[r].dims if d.name == dim), ())
            if "tp" not in cuts:
                continue
            y = f"{r}>tp"
            dims = (replace(d, cut=tuple(a for a in d.cut if a != "tp")) for d in tensors[r].dims)
            tensors[y] = replace(tensors[r], name=y, dims=tuple(dims))
            yield gather_from(writer[r], ("tp",), r, y, again=False)
            kept.update(y for t in op.saves if t == r)
            op = replace(
                op, reads=tuple(y if t == r else t for t in op.reads), whole=((y, dim),),
                saves=tuple(y if t == r else t for t in op.saves),
            )  # fmt: skip
        yield op

    block = rewrite(block, change, {})
    return replace(block, tensors=tensors, input=share if enters else x, kept=frozenset(kept))
