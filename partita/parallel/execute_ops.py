"""Exact arithmetic for execute.py: local tensors modulo a prime, and each kind of op on one rank.

A local tensor knows which *global* indices it holds, so using one that is not whole is an error and
never a number. The ops are rational functions that mix the same dims as the real ones (a norm multiplies
by a sum over hidden, attention normalises over keys), and whose slopes need what the real ones save: a
linear needs its input, a softmax its output, flash attention its log-sum-exp. What is proved is who must
see what and who must add what, not the exponential.

The whole file runs on one rank; nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from partita.base.errors import PartitaError
from partita.spec.program import Op, Tensor

P = 2**31 - 1  # a product of two fits in 64 bits
Values = NDArray[np.int64]


class ExecuteError(PartitaError):
    """A laid program that cannot be executed: a collective is missing, or a tensor was not kept."""


@dataclass(frozen=True, slots=True, eq=False)
class Local:
    """What one rank holds of a tensor: the global indices of every dim, and the values there."""

    dims: tuple[str, ...]
    spans: tuple[range, ...]
    values: Values

    def span(self, dim: str) -> range:
        """Global indices held along a dim."""
        return self.spans[self.dims.index(dim)]


Get = Callable[[str], Local]
Found = dict[str, Local]


@dataclass(frozen=True)
class Place:
    """Where an op runs: the block's tensors, which part of each its rank holds, and which samples:
    `first` is the step's sample at index 0 of the batch dim."""

    block: str
    tensors: Mapping[str, Tensor]
    share: Callable[[Tensor], tuple[range, ...]]
    step: int
    first: int

    def dims(self, name: str) -> tuple[str, ...]:
        """Names of a tensor's dims."""
        return tuple(d.name for d in self.tensors[name].dims)

    def size(self, name: str, dim: str) -> int:
        """Logical size of a tensor's dim."""
        return next(d.size for d in self.tensors[name].dims if d.name == dim)

    def filled(self, name: str, value: int = 0) -> Local:
        """A local part full of one value."""
        spans = self.share(self.tensors[name])
        return Local(self.dims(name), spans, np.full([len(s) for s in spans], value, np.int64))

    def drawn(self, name: str, key: str) -> Local:
        """A local part of random numbers that depend on the element's sample and place alone."""
        part = self.filled(name)
        shifted = [
            range(s.start + self.first, s.stop + self.first) if d == "batch" else s
            for d, s in zip(part.dims, part.spans, strict=True)
        ]
        return replace(part, values=noise(f"{key} {self.step}", shifted))


def noise(key: str, spans: Sequence[range]) -> Values:
    """Numbers modulo P that depend on the key and the global index alone."""
    found = np.array(crc32(key.encode()) % P, np.int64)
    for span in spans:
        index = np.arange(span.start, span.stop, dtype=np.int64)
        found = (found[..., None] * 48271 + (index + 1) * 1_664_525) % P
        found = (found * found + 12_345) % P
    return (found * found + found * 69_621) % P


def inverse(x: Values) -> Values:
    """1/x modulo P, element by element. Raises ExecuteError at 0, which data alone does not make."""
    if not x.all():
        raise ExecuteError("a division by zero: a sum is missing")
    return np.array([pow(v, -1, P) for v in x.ravel().tolist()], np.int64).reshape(x.shape)


def meet(xs: Sequence[Local]) -> None:
    """Tensors that meet in one op hold the same indices of the dims they share."""
    spans: dict[str, range] = {}
    for x in xs:
        for dim, span in zip(x.dims, x.spans, strict=True):
            if spans.setdefault(dim, span) != span:
                raise ExecuteError(f"{dim}: {spans[dim]} meets {span}: a collective is missing")


def _view(x: Local, order: Sequence[str]) -> Values:
    values = x.values.transpose([x.dims.index(d) for d in order if d in x.dims])
    return values.reshape([len(x.span(d)) if d in x.dims else 1 for d in order])


def contract(out: tuple[str, ...], *xs: Local) -> Local:
    """The product of all, summed over the dims that `out` leaves out."""
    meet(xs)
    spans = {d: s for x in xs for d, s in zip(x.dims, x.spans, strict=True)}
    order = (*out, *(d for d in spans if d not in out))
    value = reduce(lambda a, b: a * b % P, (_view(x, order) for x in xs))
    summed = value.sum(axis=tuple(range(len(out), len(order)))) % P
    return Local(out, tuple(spans[d] for d in out), summed)


def total(out: tuple[str, ...], *xs: Local) -> Local:
    """The sum of all, those with fewer dims repeated along the others."""
    meet(xs)
    spans = {d: s for x in xs for d, s in zip(x.dims, x.spans, strict=True)}
    value = sum((_view(x, out) for x in xs), np.zeros([len(spans[d]) for d in out], np.int64))
    return Local(out, tuple(spans[d] for d in out), value % P)


def times(x: Local, factor: Values | int) -> Local:
    """x with its values multiplied, element by element."""
    return replace(x, values=x.values * factor % P)


# Each kind: forward(op, at, get) -> what it writes; backward(op, at, get, g) -> gradients of what it read.


def linear(op: Op, at: Place, get: Get) -> Found:
    """Needs its input for the weight's gradient."""
    return {op.writes: contract(at.dims(op.writes), get(op.reads[0]), get(op.weights[0]))}


def linear_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Two contractions."""
    x, w = op.reads[0], op.weights[0]
    return {x: contract(at.dims(x), g, get(w)), w: contract(at.dims(w), g, get(x))}


def bias(op: Op, at: Place, get: Get) -> Found:
    """Needs nothing."""
    return {op.writes: total(at.dims(op.writes), get(op.reads[0]), get(op.weights[0]))}


def bias_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Passes on, and sums."""
    return {op.reads[0]: g, op.weights[0]: contract(at.dims(op.weights[0]), g)}


def norm(op: Op, at: Place, get: Get) -> Found:
    """x * weight * sum of squares, which must be entire; + bias."""
    x, w = get(op.reads[0]), get(op.weights[0])
    dim = op.whole[0][1]
    if len(x.span(dim)) != at.size(op.reads[0], dim):
        raise ExecuteError(f"{op.name} sees {x.span(dim)} of {dim}")
    out = at.dims(op.writes)
    y = contract(out, x, w, contract(tuple(d for d in out if d != dim), x, x))
    return {op.writes: total(out, y, *(get(b) for b in op.weights[1:]))}


def norm_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs its input."""
    name, weight = op.reads[0], op.weights[0]
    x, w, dim = get(name), get(weight), op.whole[0][1]
    out, rows = at.dims(name), tuple(d for d in at.dims(name) if d != dim)
    squares, inner = contract(rows, x, x), contract(rows, g, w, x)
    dx = total(out, contract(out, g, w, squares), times(contract(out, x, inner), 2))
    dw = contract(at.dims(weight), g, x, squares)
    return {name: dx, weight: dw} | {b: contract(at.dims(b), g) for b in op.weights[1:]}


def _terms(op: Op, at: Place) -> list[tuple[str, tuple[str, ...]]]:
    """Values an op adds up, each with the masks that follow it."""
    found: list[tuple[str, tuple[str, ...]]] = []
    for name in op.reads:
        if at.tensors[name].role == "mask":
            found[-1] = (found[-1][0], (*found[-1][1], name))
        else:
            found.append((name, ()))
    return found


def _extra(op: Op, at: Place, name: str) -> list[Local]:
    """Unlike factors along the dims that the output lacks: gate and up must not be mistaken."""
    out, dims, spans = at.dims(op.writes), at.dims(name), at.share(at.tensors[name])
    gone = [(d, s) for d, s in zip(dims, spans, strict=True) if d not in out]
    return [Local((d,), (s,), np.arange(s.start + 2, s.stop + 2)) for d, s in gone]


def elementwise(op: Op, at: Place, get: Get) -> Found:
    """Sum of its reads times their masks; what it saves enters as x^2 + x, the rest must be linear."""
    out, parts = at.dims(op.writes), []
    for name, masks in _terms(op, at):
        x = get(name)
        x = times(x, x.values + 1) if name in op.saves else x
        parts.append(contract(out, x, *_extra(op, at, name), *map(get, masks)))
    parts += [_rows(get(w), parts[0].span("seq")) for w in op.weights]
    return {op.writes: total(out, *parts)}


def elementwise_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs what is not linear: masks and what it saved."""
    found = {}
    for name, masks in _terms(op, at):
        dx = contract(at.dims(name), g, *_extra(op, at, name), *map(get, masks))
        found[name] = times(dx, 2 * get(name).values + 1) if name in op.saves else dx
    for w in op.weights:
        whole, seq = at.filled(w), g.span("seq")
        rows = contract(("seq", *whole.dims[1:]), g)
        whole.values[seq.start : seq.stop] = rows.values
        found[w] = whole
    return found


def _rows(table: Local, seq: range) -> Local:
    """Rows of a position table at global positions."""
    return Local(
        ("seq", *table.dims[1:]), (seq, *table.spans[1:]), table.values[seq.start : seq.stop]
    )


def lookup(op: Op, at: Place, get: Get) -> Found:
    """Rows of the table this rank holds; zero where another rank holds the row."""
    tokens, inside = _tokens(op, at, get)
    table = get(op.weights[0])
    rows = np.zeros((*tokens.shape, len(table.spans[1])), np.int64)
    rows[inside] = table.values[tokens[inside] - table.spans[0].start]
    return {op.writes: Local(at.dims(op.writes), (*get(op.reads[0]).spans, table.spans[1]), rows)}


def lookup_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs the ids."""
    tokens, inside = _tokens(op, at, get)
    whole = at.filled(op.weights[0])
    np.add.at(whole.values, tokens[inside] - whole.spans[0].start, g.values[inside])
    return {op.weights[0]: times(whole, 1)}


def _tokens(op: Op, at: Place, get: Get) -> tuple[Values, NDArray[np.bool_]]:
    tokens = get(op.reads[0]).values % at.size(op.weights[0], "vocab")
    rows = at.share(at.tensors[op.weights[0]])[0]
    return tokens, (tokens >= rows.start) & (tokens < rows.stop)


def mask(op: Op, at: Place, get: Get) -> Found:
    """The same numbers for an element wherever and whenever it is drawn."""
    return {op.writes: at.drawn(op.writes, f"{at.block} {op.name}")}


def _spread(x: Local, heads: range, group: int) -> Local:
    """Keys or values for every query head this rank holds, seq renamed to keys."""
    kv = x.span("kv_heads")
    if not all(h // group in kv for h in heads):
        raise ExecuteError(f"query heads {heads} need other kv heads than {kv}")
    values = x.values[:, :, [h // group - kv.start for h in heads]]
    return Local(("batch", "keys", "heads", "head_dim"), (*x.spans[:2], heads, x.spans[3]), values)


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
        """q . k, zero for keys behind the query."""
        q, k = self.get(self.op.reads[0]), self.kv(self.op.reads[1])
        s = contract(self.GRID, q, k)
        seq, keys = np.array(s.span("seq")), np.array(s.span("keys"))
        return times(s, (keys[None, :] <= seq[:, None]).astype(np.int64))

    def scores_back(self, ds: Local) -> Found:
        """Gradients of q and k."""
        q, k = self.op.reads[:2]
        dk = contract(("batch", "keys", "heads", "head_dim"), ds, self.get(q))
        dq = contract(self.at.dims(q), ds, self.kv(k))
        return {q: dq, k: _collapse(dk, self.get(k), self.group)}

    def values_back(self, weights: Local, g: Local, v: str) -> Found:
        """Gradient of v."""
        dv = contract(("batch", "keys", "heads", "head_dim"), weights, g)
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


def exp(op: Op, at: Place, get: Get) -> Found:
    """1 / (logits + maximum): like the exponential its slope is known from its output."""
    x = total(at.dims(op.writes), *map(get, op.reads))
    return {op.writes: replace(x, values=inverse(x.values))}


def exp_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs its output."""
    y = get(op.writes)
    return {op.reads[0]: times(g, -(y.values * y.values % P))}


def summing(op: Op, at: Place, get: Get) -> Found:
    """A plain sum; the target's logit; or the loss, (max * sum^2 + target) * valid."""
    out = at.dims(op.writes)
    if len(op.reads) == 1:
        return {op.writes: contract(out, get(op.reads[0]))}
    if len(op.reads) == 2:
        return {op.writes: contract(out, get(op.reads[0]), _one_hot(op, at, get))}
    top, exps, target, valid = map(get, op.reads)
    token = total(valid.dims, contract(valid.dims, top, exps, exps), target)
    return {op.writes: contract(out, token, valid)}


def summing_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs targets, and for the loss all but the target's logit."""
    x = op.reads[0]
    if len(op.reads) == 1:
        return {x: contract(at.dims(x), g, at.filled(x, 1))}
    if len(op.reads) == 2:
        return {x: contract(at.dims(x), g, _one_hot(op, at, get))}
    top, exps, valid = get(x), get(op.reads[1]), get(op.reads[3])
    d_exps = times(contract(valid.dims, g, top, exps, valid), 2)
    return {op.reads[1]: d_exps, op.reads[2]: contract(valid.dims, g, valid)}


def _one_hot(op: Op, at: Place, get: Get) -> Local:
    """One where the vocabulary row is the target, among the rows this rank holds."""
    targets, name = get(op.reads[1]), op.reads[0]
    rows = at.share(at.tensors[name])[at.dims(name).index("vocab")]
    hit = (targets.values % at.size(name, "vocab"))[..., None] == np.array(rows, np.int64)
    return Local((*targets.dims, "vocab"), (*targets.spans, rows), hit.astype(np.int64))


FORWARD: dict[str, Callable[[Op, Place, Get], Found]] = {
    "linear": linear, "bias": bias, "norm": norm, "map": elementwise, "lookup": lookup, "mask": mask,
    "attention": attention, "exp": exp, "reduce": summing,
}  # fmt: skip
BACKWARD: dict[str, Callable[[Op, Place, Get, Local], Found]] = {
    "linear": linear_back, "bias": bias_back, "norm": norm_back, "map": elementwise_back,
    "lookup": lookup_back, "attention": attention_back, "exp": exp_back, "reduce": summing_back,
}  # fmt: skip
