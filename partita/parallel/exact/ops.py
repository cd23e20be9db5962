"""Each kind of op on one rank in exact arithmetic, for execute.py.

The ops are rational functions that mix the same dims as the real ones (a norm multiplies by a sum over
hidden, attention normalises over keys), and whose slopes need what the real ones save: a linear needs its
input, a softmax its output, flash attention its log-sum-exp. What is proved is who must see what and who
must add what, not the exponential. Nothing here communicates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from partita.parallel.exact import image as image
from partita.parallel.exact import moe as moe
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
    meet,
    times,
    total,
)
from partita.parallel.exact.attention import attention, attention_back
from partita.spec.program import Op

# Each kind: forward(op, at, get) -> what it writes; backward(op, at, get, g) -> gradients of what it read.


def linear(op: Op, at: Place, get: Get) -> Found:
    """Needs its input for the weight's gradient; LoRA's B A x is added."""
    out, x = at.dims(op.writes), _read(op, get)
    y = contract(out, x, get(op.weights[0]))
    low = [contract(out, x, *_masks(op, at, get), *map(get, op.weights[1:]))] if op.extra else []
    return {op.writes: total(out, y, *low)}


def _read(op: Op, get: Get) -> Local:
    """What a linear reads; its last dim may be the summed one by another name."""
    x = get(op.reads[0])
    return x if op.sums[0] in x.dims else replace(x, dims=(*x.dims[:-1], op.sums[0]))


def _masks(op: Op, at: Place, get: Get) -> list[Local]:
    """What an adapter's input is dropped by, the same wherever and whenever it is drawn; of experts' rows by
    their marks."""
    if not at.drops:
        return []
    found = [at.drawn(op.reads[0], f"{at.block} {op.name} lora")]
    for name in op.reads[1:]:
        marks = get(name)
        known = (marks.values == moe.numbers(at, name)).astype(np.int64)
        found.append(replace(marks, values=known))
    return found


def linear_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Two contractions; of frozen weights one."""
    x, w = op.reads[0], op.weights[0]
    like = at.dims(x) if op.sums[0] in at.dims(x) else (*at.dims(x)[:-1], op.sums[0])
    dx = replace(contract(like, g, get(w)), dims=at.dims(x))
    found: Found = {} if op.frozen else {w: contract(at.dims(w), g, _read(op, get))}
    if op.extra:
        (a, b), masks = op.weights[1:], _masks(op, at, get)
        dx = total(at.dims(x), dx, contract(at.dims(x), g, *masks, get(a), get(b)))
        if any(at.tensors[n].role != "route" for n in op.saves):
            found[a] = contract(at.dims(a), g, get(x), *masks, get(b))
            found[b] = contract(at.dims(b), g, get(x), *masks, get(a))
    return found | {x: dx}


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
    for w in op.weights:
        table = get(w)
        first = replace(table, dims=table.dims[1:], spans=table.spans[1:], values=table.values[0])
        typed = table.dims[0] == "types"  # of which all tokens have the first
        parts.append(first if typed else _rows(table, at, parts[0].span("seq")))
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
        typed = whole.dims[0] == "types"
        places = np.minimum(at.positions(seq), 0 if typed else at.tokens - 1)
        np.add.at(whole.values, places, rows.values)
        found[w] = whole
    return found


def gated(op: Op, at: Place, get: Get) -> Found:
    """x times a number a token."""
    x, gate = map(get, op.reads)
    return {op.writes: contract(at.dims(op.writes), x, gate)}


def gated_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs both."""
    x, gate = op.reads
    one = at.filled(gate, 1)
    return {x: contract(at.dims(x), g, get(gate)), gate: contract(one.dims, g, get(x), one)}


def append(op: Op, at: Place, get: Get) -> Found:
    """Each head's own part, and behind it the part that all share."""
    own, shared = map(get, op.reads)
    spread = np.broadcast_to(
        shared.values[:, :, None], (*own.values.shape[:3], shared.values.shape[2])
    )
    values = np.concatenate([own.values, spread], -1)
    meet([own, shared])
    return {op.writes: Local(at.dims(op.writes), (*own.spans[:3], range(values.shape[-1])), values)}


def append_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs nothing; the shared part adds up over the heads that are here."""
    own, shared = op.reads
    width = at.size(own, at.dims(own)[-1])
    first, rest = g.values[..., :width], g.values[..., width:].sum(2) % P
    spans = (*g.spans[:3], range(width))
    return {
        own: Local(at.dims(own), spans, first),
        shared: Local(at.dims(shared), (*g.spans[:2], range(rest.shape[-1])), rest),
    }


def _rows(table: Local, at: Place, seq: range) -> Local:
    """Rows of a position table at global positions."""
    dims, spans = ("seq", *table.dims[1:]), (seq, *table.spans[1:])
    places = np.minimum(at.positions(seq), at.tokens - 1)  # what fills up takes the last one
    return Local(dims, spans, table.values[places])


def lookup(op: Op, at: Place, get: Get) -> Found:
    """Rows of the table this rank holds; zero where another rank holds the row."""
    tokens, inside = _tokens(op, at, get)
    table = get(op.weights[0])
    rows = np.zeros((*tokens.shape, len(table.spans[1])), np.int64)
    rows[inside] = table.values[tokens[inside] - table.spans[0].start]
    return {op.writes: Local(at.dims(op.writes), (*get(op.reads[0]).spans, table.spans[1]), rows)}


def lookup_back(op: Op, at: Place, get: Get, g: Local) -> Found:
    """Needs the ids, where the table is trained."""
    if op.frozen:
        return {}
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
    "linear": linear, "bias": bias, "norm": norm, "map": elementwise, "gated": gated, "append": append,
    "lookup": lookup, "mask": mask, "attention": attention, "exp": exp, "reduce": summing,
    "scores": exp, "choose": moe.choose, "count": moe.count, "load": moe.count, "limit": moe.limit,
    "balance": moe.balance, "z": moe.squares,
    "mark": moe.mark, "dispatch": moe.dispatch, "combine": moe.combine,
    "conv": image.conv, "relu": image.relu, "response": image.response, "pool": image.pool,
    "join": image.join, "crop": image.crop,
}  # fmt: skip
BACKWARD: dict[str, Callable[[Op, Place, Get, Local], Found]] = {
    "linear": linear_back, "bias": bias_back, "norm": norm_back, "map": elementwise_back, "gated": gated_back,
    "append": append_back,
    "lookup": lookup_back, "attention": attention_back, "exp": exp_back, "reduce": summing_back,
    "scores": exp_back, "choose": moe.choose_back, "balance": moe.balance_back, "z": moe.squares_back,
    "dispatch": moe.dispatch_back, "combine": moe.combine_back,
    "conv": image.conv_back, "relu": image.relu_back, "response": image.response_back,
    "pool": image.pool_back, "join": image.join_back,
    "crop": image.crop_back,
}  # fmt: skip
