"""Experts in exact arithmetic, for block.py.

Rows of an exchange are a sparse fold of (expert, sample, position). Here they are unfolded: a tensor of
rows lies on those dims and is zero where no row is. Between dispatch and combine a rank may hold rows of any
token, so samples and positions are whole there; an exchange puts what comes where it belongs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from partita.parallel.cp.halo import LANE
from partita.parallel.exact.algebra import (
    ExecuteError,
    Found,
    Get,
    Local,
    P,
    Place,
    contract,
    times,
    total,
)
from partita.spec.program import Block, Dim, Op, Tensor

NOBODY = -2  # whom a token chooses that fills a sequence up; a row that is dropped, -1
OUTSIDE = "slots"  # rows of the tokens that a rank holds; the other folds are rows of its experts


def unfold(block: Block) -> Mapping[str, Tensor]:
    """The block's tensors, those of rows on the dims they are folded from."""
    folds = (d.of for t in block.tensors.values() for d in t.dims)
    if not any(of and of != (LANE,) for of in folds):
        return block.tensors
    batch, seq, _ = block.tensors[block.input].dims
    expert = next(d for t in block.weights() for d in t.dims if d.name == "experts")

    def dims(d: Dim) -> tuple[Dim, ...]:
        if not d.of:
            return (d,)
        if d.name == OUTSIDE:
            return replace(expert, cut=()), batch, seq
        return expert, replace(batch, cut=()), replace(seq, cut=())

    return {
        n: replace(t, dims=tuple(x for d in t.dims for x in dims(d))) if t.role != "weight" else t
        for n, t in block.tensors.items()
    }


def exchange(parts: Sequence[Local], spans: tuple[range, ...]) -> Local:
    """Rows of all parts that belong into `spans`; a part may hold others, and the rest is zero."""
    values = np.zeros([len(s) for s in spans], np.int64)
    for x in parts:
        both = [
            range(max(a.start, b.start), min(a.stop, b.stop))
            for a, b in zip(x.spans, spans, strict=True)
        ]
        into = tuple(
            slice(b.start - s.start, b.stop - s.start) for b, s in zip(both, spans, strict=True)
        )
        out_of = tuple(
            slice(b.start - s.start, b.stop - s.start) for b, s in zip(both, x.spans, strict=True)
        )
        values[into] = (values[into] + x.values[out_of]) % P
    return Local(parts[0].dims, spans, values)


def _picked(chosen: Local, experts: int, dim: str) -> Local:
    """One where a token's pick is the expert: [batch, seq, picks, dim]."""
    hit = chosen.values[..., None] == np.arange(experts)
    return Local((*chosen.dims, dim), (*chosen.spans, range(experts)), hit.astype(np.int64))


def choose(op: Op, at: Place, get: Get) -> Found:
    """The picks with the largest scores, a bias added; their gates are score * sum of the picked scores."""
    scores = get(op.reads[0])
    biased = total(scores.dims, scores, *(get(w) for w in op.weights)).values
    picks = at.size(op.writes, "picks")
    order = np.argsort(-biased, axis=-1, kind="stable")[..., :picks]
    order = np.where(at.real(scores.span("seq"))[:, None] > 0, order, NOBODY)
    chosen = Local(at.dims("chosen"), (*scores.spans[:2], range(picks)), order)
    mine = _scores(scores, chosen)
    return {"chosen": chosen, op.writes: contract(mine.dims, mine, contract(mine.dims[:2], mine))}


def _scores(scores: Local, chosen: Local) -> Local:
    values = np.take_along_axis(scores.values, chosen.values, -1)
    return Local(chosen.dims, chosen.spans, values)


def choose_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs the scores and the choice. What stands for a bias's gradient are its experts' rows."""
    scores, chosen = get(op.reads[0]), get("chosen")
    mine, rows = _scores(scores, chosen), chosen.dims[:2]
    slope = total(g.dims, contract(g.dims, g, contract(rows, mine)), contract(rows, g, mine))
    picked = _picked(chosen, at.size(op.reads[0], "choices"), "choices")
    found = {op.reads[0]: contract(scores.dims, slope, picked)}
    return found | {w: contract(("choices",), picked) for w in op.weights}


def count(op: Op, at: Place, get: Get) -> Found:
    """Rows of each expert, of a sequence or of all tokens held."""
    out = at.dims(op.writes)
    return {
        op.writes: contract(
            out, _picked(get(op.reads[0]), at.size(op.writes, "choices"), "choices")
        )
    }


def limit(op: Op, at: Place, get: Get) -> Found:
    """Picks of each sequence up to an expert's capacity, by position; -1 where a row is dropped."""
    chosen, every = map(get, op.reads)
    if len(every.span("seq")) != at.size(op.reads[1], "seq"):
        raise ExecuteError(f"{op.name} sees {every.span('seq')} of seq")
    picked = _picked(every, at.size("loads", "choices"), "choices").values.sum(-2)
    places = np.argsort(at.positions(every.span("seq")))  # by position
    taken = np.empty_like(picked)
    taken[:, places] = picked[:, places].cumsum(1)
    here = chosen.span("seq")
    mine = np.take_along_axis(taken[:, here.start : here.stop], chosen.values, -1)
    kept = np.where(mine <= at.tensors["capacity"].dims[0].size, chosen.values, -1)
    return {op.writes: replace(chosen, values=kept)}


def balance(op: Op, at: Place, get: Get) -> Found:
    """Sum of counts times scores."""
    counts, scores = map(get, op.reads)
    return {op.writes: contract((), counts, scores, _real(at, scores))}


def balance_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs the counts."""
    counts, scores = op.reads
    real = _real(at, at.filled(scores, 1))
    return {scores: contract(at.dims(scores), at.filled(scores, 1), real, get(counts), g)}


def _real(at: Place, x: Local) -> Local:
    """Along x's seq, 0 where a token fills a sequence up."""
    seq = x.span("seq")
    return Local(("seq",), (seq,), at.real(seq))


def squares(op: Op, at: Place, get: Get) -> Found:
    """Sum of squares, for the z-loss."""
    x = get(op.reads[0])
    return {op.writes: contract((), x, x, _real(at, x))}


def squares_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs its input."""
    x = get(op.reads[0])
    return {op.reads[0]: times(contract(x.dims, x, g, _real(at, x)), 2)}


def mark(op: Op, at: Place, get: Get) -> Found:
    """The number of each row's token; 0 where no row is."""
    picked = _picked(get(op.reads[0]), at.size(op.writes, "experts"), "experts")
    rows = contract(at.dims(op.writes), picked)
    return {op.writes: times(rows, numbers(at, op.writes))}


def numbers(at: Place, name: str) -> NDArray[np.int64]:
    """Of every token that rows [experts, batch, seq] may be of, from 1."""
    _, batch, seq = at.share(at.tensors[name])
    samples = np.arange(batch.start, batch.stop) + at.first
    return (samples[:, None] * len(at.order) + at.positions(seq) + 1)[None]


def dispatch(op: Op, at: Place, get: Get) -> Found:
    """A token's row at each of its experts."""
    x, chosen = map(get, op.reads)
    picked = _picked(chosen, at.size(op.writes, "experts"), "experts")
    return {op.writes: contract(at.dims(op.writes), x, picked), "order": chosen}


def dispatch_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs the order."""
    picked = _picked(get("order"), at.size(op.writes, "experts"), "experts")
    return {op.reads[0]: contract(at.dims(op.reads[0]), g, picked)}


def combine(op: Op, at: Place, get: Get) -> Found:
    """A token's rows, weighed by its gates."""
    rows, gates, order = map(get, op.reads)
    picked = _picked(order, at.size(op.reads[0], "experts"), "experts")
    return {op.writes: contract(at.dims(op.writes), rows, gates, picked)}


def combine_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs rows, gates and order."""
    rows, gates, order = map(get, op.reads)
    picked = _picked(order, at.size(op.reads[0], "experts"), "experts")
    return {
        op.reads[0]: contract(rows.dims, g, gates, picked),
        op.reads[1]: contract(gates.dims, g, rows, picked),
    }
