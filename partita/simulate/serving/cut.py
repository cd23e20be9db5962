"""The laid program at a step's tokens: blocks whose rows are those of one step, not of a whole sequence.

A step is one row [1, tokens] of all its sequences' tokens. Rooms ask nothing of a sequence's length, so a
block that is laid once is resized; what serving does otherwise than training is said here:

    head        only tokens whose logits are wanted; the loss is left out, the shares of a row of logits join
    experts     where dp_shard holds their places all its ranks have the same tokens: each sends its share,
                and what becomes of the shares is gathered
    messages    a stage hands its output on, as the laid program says
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from partita.parallel.laid import Laid
from partita.parallel.read import BYTES, Call, traffic
from partita.parallel.room import axis_name, axis_size
from partita.record.transfer import TrafficLine, joined
from partita.spec.program import Block, Dim, Op, distinct, segments_of

LANE = "serve"


@dataclass(frozen=True)
class Shape:
    """What a step runs: `decode` sequences that write a token each, with `context` tokens before it in the
    mean; `chunk` tokens of so many `prompts`, with `before` tokens before each; logits of `wanted` tokens."""

    decode: int = 0
    context: float = 0.0
    chunk: int = 0
    before: float = 0.0
    wanted: int = 0
    prompts: int = 1

    @property
    def tokens(self) -> int:
        """All that run."""
        return self.decode + self.chunk


@dataclass(frozen=True)
class Piece:
    """Equal blocks of a stage, or halves of them, at a step's rows: `times` of them, under their names, and
    calls that are no region of theirs."""

    block: Block
    names: tuple[str, ...]
    calls: tuple[Call, ...] = ()

    @property
    def times(self) -> int:
        """How many."""
        return len(self.names)


def pieces(laid: Laid, stage: int, tokens: int, wanted: int) -> list[Piece]:
    """What a stage runs in a step of so many tokens, of which logits of `wanted` are asked for."""
    own, found = laid.stages[stage], list[Piece]()
    for block, _ in distinct(own.blocks):
        names = tuple(n for n, b in zip(own.names, own.blocks, strict=True) if b is block)
        found += pieces_of(block, names, laid, tokens, wanted)
    return found


def pieces_of(
    block: Block, names: tuple[str, ...], laid: Laid, tokens: int, wanted: int
) -> list[Piece]:
    """The same of equal blocks alone, under their names."""
    ways = laid.sizes["tp"] if laid.request.plan.mesh.sp else 1
    row = -(-tokens // ways) * ways
    if block.name == "head":
        return _head(block, laid, row, wanted)
    if "sent" in block.tensors and laid.sizes["dp_shard"] > 1:
        return _spread(block, names, laid, row)
    return [Piece(_at(block, block.ops(), laid, row), names)]


def _head(block: Block, laid: Laid, row: int, wanted: int) -> list[Piece]:
    """The norm, its region and the product with the table. Where the norm's rows are gathered all are, since
    wanted tokens may be another rank's."""
    ops = [op for op in block.ops() if not op.name.startswith(("loss.", "head.loss"))]
    at = next(i for i, op in enumerate(ops) if op.kind == "linear")
    logits = block.tensors[ops[at].writes]
    each = logits.dims[-1].local(laid.sizes) * BYTES[laid.request.plan.precision.dtype]
    whole = ("tp",), "all_gather", "head.logits", "F", wanted * each, LANE
    calls = (Call(*whole),) if laid.sizes["tp"] > 1 else ()
    gathers = any(op.kind == "gather_from" for op in ops)
    first = _at(block, ops[:at], laid, row if gathers else wanted)
    return [Piece(first, ("head",)), Piece(_at(block, ops[at:], laid, wanted), ("head",), calls)]


def _spread(block: Block, names: tuple[str, ...], laid: Laid, row: int) -> list[Piece]:
    """Attention on all tokens, experts on a share of them."""
    ops, ways = block.ops(), laid.sizes["dp_shard"]
    inside = [op.segment == "attention" for op in ops]
    each = ceil(row / ways)
    size = each * laid.request.model.hidden * BYTES[laid.request.plan.precision.dtype]
    gather = Call(("dp_shard",), "all_gather", "combine:gather", "F", size, LANE)
    attention = [op for op, here in zip(ops, inside, strict=True) if here]
    rest = [op for op, here in zip(ops, inside, strict=True) if not here]
    return [
        Piece(_at(block, attention, laid, row), names),
        Piece(_at(block, rest, laid, each), names, (gather,)),
    ]


def _at(block: Block, ops: Sequence[Op], laid: Laid, row: int) -> Block:
    """Some ops of a block, with so many places of the laid sequence, and the tensors of their forward."""
    whole = laid.request.laid_len

    def dims(of: tuple[Dim, ...]) -> tuple[Dim, ...]:
        return _resized(of, whole, row)

    moved = (n for op in ops for e in op.events if e.phase == "F" for n in (e.of, *e.beside))
    named = {n for op in ops for n in (*op.reads, op.writes, *op.weights)}
    names = {block.input, block.output, *named, *moved} & block.tensors.keys()
    tensors = {n: block.tensors[n].with_dims(dims(block.tensors[n].dims)) for n in names}
    kept = segments_of(op.over(dims) for op in ops)
    return replace(block, segments=kept, tensors=tensors, regions=(), kept=frozenset())


@lru_cache(maxsize=65_536)
def _resized(of: tuple[Dim, ...], whole: int, row: int) -> tuple[Dim, ...]:
    return tuple(
        replace(d, size=d.size // whole * row) if d.name == "seq" or "seq" in d.of else d
        for d in of
    )


def calls_of(piece: Piece, laid: Laid) -> list[Call]:
    """What one block of a piece sends in a step."""
    own = [c for c in traffic(piece.block, laid.sizes) if c.phase == "F" and c.axes != ("pp",)]
    return [c for c in (*own, *piece.calls) if not _alone(c, laid)]


def _alone(call: Call, laid: Laid) -> bool:
    kv = laid.request.model.kv_heads
    return all(axis_size(a, laid.sizes, kv) == 1 for a in call.axes)


def message(laid: Laid, stage: int, tokens: int) -> Call | None:
    """What a stage hands to the next: its share of the row."""
    if stage == len(laid.stages) - 1:
        return None
    ways = laid.sizes["tp"] if laid.request.plan.mesh.sp else 1
    each = laid.request.model.hidden * BYTES[laid.request.plan.precision.dtype]
    return Call(("pp",), "send", f"stage {stage}:send", "F", -(-tokens // ways) * each, LANE)


def traffic_of(laid: Laid, rank: int, steps: Iterable[Shape]) -> list[TrafficLine]:
    """What a rank sends in some steps, exactly; rows of experts as if every expert got its even share."""
    stage = laid.mesh.coords(rank)["pp"]
    return joined(line for shape in steps for line in _sent(laid, rank, stage, shape))


def _sent(laid: Laid, rank: int, stage: int, shape: Shape) -> Iterator[TrafficLine]:
    for piece in pieces(laid, stage, shape.tokens, shape.wanted):
        for call in calls_of(piece, laid):
            for name in piece.names:
                yield _line(
                    rank, call, call.site if call.lane == LANE else laid.site(name, call.site)
                )
    sent = message(laid, stage, shape.tokens)
    if sent is not None:
        yield _line(rank, sent, sent.site)


def _line(rank: int, call: Call, site: str) -> TrafficLine:
    count = call.times * call.parts
    return TrafficLine(
        rank, axis_name(call.axes), call.collective, site, "F", count, call.times * call.bytes
    )
