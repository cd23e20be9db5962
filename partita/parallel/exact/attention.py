"""Attention in exact arithmetic, for execute.py: flash, or explicit probabilities, with shared kv heads.

Probabilities are s^2 / sum of s^2, so that backward needs what the real ones save: flash its output and
its log-sum-exp, the explicit form its probabilities.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from partita.parallel.exact.algebra import (
    ExecuteError,
    Found,
    Get,
    Local,
    P,
    Place,
    Values,
    contract,
    inverse,
    times,
    total,
)
from partita.spec.program import Op


def _spread(x: Local, heads: range, group: int) -> Local:
    """Keys or values for every query head this rank holds, seq renamed to keys."""
    kv = x.span("kv_heads")
    if not all(h // group in kv for h in heads):
        raise ExecuteError(f"query heads {heads} need other kv heads than {kv}")
    values = x.values[:, :, [h // group - kv.start for h in heads]]
    return Local(("batch", "keys", "heads", x.dims[3]), (*x.spans[:2], heads, x.spans[3]), values)


def _collapse(g: Local, like: Local, group: int) -> Local:
    """Gradients of _spread, added up by kv head."""
    values, kv = np.zeros_like(like.values), like.span("kv_heads")
    for i, h in enumerate(g.span("heads")):
        values[:, :, h // group - kv.start] += g.values[:, :, i]
    return replace(like, values=values % P)


@dataclass(frozen=True)
class Heads:
    """One attention op's view of heads: `group` query heads share a kv head."""

    op: Op
    at: Place
    get: Get

    GRID = ("batch", "heads", "seq", "keys")
    ROWS = ("batch", "heads", "seq")

    @property
    def group(self) -> int:
        """Query heads of one kv head."""
        q, kv = self.op.reads[0], self.op.reads[1]
        return self.at.size(q, "heads") // self.at.size(kv, "kv_heads")

    def kv(self, name: str) -> Local:
        """Keys or values by query head; all positions must be here."""
        x, heads = self.get(name), self.at.share(self.at.tensors[self.op.writes])
        keys = next(d.size for d in self.op.space if d.name == "keys")
        if len(x.span("seq")) != keys:
            raise ExecuteError(f"{self.op.name} sees {x.span('seq')} of {keys} keys")
        return _spread(x, heads[self.at.dims(self.op.writes).index("heads")], self.group)

    def scores(self) -> Local:
        """q . k, zero for keys that the query does not see."""
        q, k = self.get(self.op.reads[0]), self.kv(self.op.reads[1])
        s = contract(self.GRID, q, k)
        seq, keys = (self.at.positions(s.span(d)) for d in ("seq", "keys"))
        if self.op.causal:
            seen = keys[None, :] <= seq[:, None]
        else:  # what fills a sequence up sees all, and is seen by none but its like
            seen = (keys[None, :] < self.at.tokens) | (seq[:, None] >= self.at.tokens)
        return times(s, seen.astype(np.int64) * self.falling(s, seq, keys))

    def falling(self, s: Local, seq: Values, keys: Values) -> Values | int:
        """ALiBi as a factor that each head and distance has of its own."""
        if not self.at.falls:
            return 1
        slopes = np.asarray(s.span("heads"), np.int64)[:, None, None] + 2
        return 1 + slopes * (seq[:, None] - keys[None, :])

    def scores_back(self, ds: Local) -> Found:
        """Gradients of q and k."""
        q, k = self.op.reads[:2]
        seq, keys = (self.at.positions(ds.span(d)) for d in ("seq", "keys"))
        ds = times(ds, self.falling(ds, seq, keys))
        dk = contract(("batch", "keys", "heads", "head_dim"), ds, self.get(q))
        dq = contract(self.at.dims(q), ds, self.kv(k))
        return {q: dq, k: _collapse(dk, self.get(k), self.group)}

    def values_back(self, weights: Local, g: Local, v: str) -> Found:
        """Gradient of v."""
        dv = contract(("batch", "keys", "heads", self.at.dims(v)[3]), weights, g)
        return {v: _collapse(dv, self.get(v), self.group)}


def _normaliser(s: Local) -> Local:
    rows = contract(Heads.ROWS, s, s)
    return replace(rows, values=inverse(rows.values))


def attention(op: Op, at: Place, get: Get) -> Found:
    """Flash (q k v), probabilities (q k), or their use (p v); p = s^2 / sum of s^2."""
    h, out = Heads(op, at, get), at.dims(op.writes)
    if "keys" in op.sums:
        return {op.writes: contract(out, get(op.reads[0]), h.kv(op.reads[1]))}
    s = h.scores()
    scale = _normaliser(s)
    if len(op.reads) == 2:
        return {op.writes: contract(out, s, s, scale)}
    lse = next(n for n in op.saves if at.tensors[n].role == "stat")
    return {
        op.writes: contract(out, s, s, scale, h.kv(op.reads[2])),
        lse: contract(at.dims(lse), scale),
    }


def attention_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """As flash attention's: scores are made again, the normaliser and the output are saved."""
    h = Heads(op, at, get)
    if "keys" in op.sums:
        dp = contract(at.dims(op.reads[0]), g, h.kv(op.reads[1]))
        return {op.reads[0]: dp} | h.values_back(get(op.reads[0]), g, op.reads[1])
    s = h.scores()
    if len(op.reads) == 2:
        scale, dp = _normaliser(s), g
        delta, found = contract(h.ROWS, g, get(op.writes)), {}
    else:
        lse = next(n for n in op.saves if at.tensors[n].role == "stat")
        scale, dp = contract(h.ROWS, get(lse)), contract(h.GRID, g, h.kv(op.reads[2]))
        delta = contract(h.ROWS, g, get(op.writes))
        found = h.values_back(contract(h.GRID, s, s, scale), g, op.reads[2])
    slope = total(h.GRID, dp, times(delta, -1))
    return found | h.scores_back(times(contract(h.GRID, s, scale, slope), 2))
