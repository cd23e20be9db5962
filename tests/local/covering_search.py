"""Run, it looks for rows of fewer ranks that hold every pair, and writes covering.tsv when it found some.

python tests/local/covering_search.py [STEPS] [SEED]      (40 million steps, an hour or two)

Simulated annealing (Cohen, Gibbons, Mugridge, Colbourn 2003, of covering arrays) over as many rows as may be:
a step gives one or two features of a row other values; what is made smaller is the number of pairs that no
row holds, and, weighed by WEIGHT, the seconds that the rows take.
"""

from __future__ import annotations

import math
import random
import sys
from collections import Counter

import covering
from covering import FEATURES, FREE, Pair, Row

MOST_ROWS = 90
WEIGHT = 0.045  # pairs that a second of a run is worth
HOT, COLD = 0.12, 0.008  # temperatures, in pairs; hotter, what few rows may hold is never met again
SECONDS = {1: 0.3, 2: 0.5, 4: 1.0, 8: 1.9, 16: 3.6}  # of a row of so many thread ranks, about
DEARER = (  # features that take so many times as long, fitted to what 90 rows took (R^2 0.93)
    ("family", "moe mla", 1.5), ("family", "gpt2 dropout", 1.35), ("slices", "etp2", 1.4),
    ("trains", "lora", 1.4), ("context", "ring", 1.4), ("context", "all_gather", 1.15),
    ("heads", "ulysses", 1.15), ("tensor", "tp2+sp", 1.2), ("rounding", FEATURES["rounding"][1], 1.15),
    ("offload", FEATURES["offload"][1], 1.15), ("offload", FEATURES["offload"][2], 1.35),
)  # fmt: skip


def seconds(rows: list[Row]) -> float:
    """That all rows take."""
    return sum(
        SECONDS[covering.ranks(r)] * math.prod(k for f, v, k in DEARER if r[f] == v) for r in rows
    )


def held_by(row: Row, changed: list[str], known: dict[tuple[str, ...], list[Pair]]) -> list[Pair]:
    """The pairs that the changed features have a part in."""
    found = []
    for i, f in enumerate(changed):
        for n in FREE:
            if n == f or n in changed[:i]:
                continue
            a, b = (f, n) if FREE.index(f) < FREE.index(n) else (n, f)
            key = (a, row[a], b, row[b])
            if key not in known:
                known[key] = covering.pair(row, a, b)
            found += known[key]
    return found


def searched(rows: list[Row], steps: int, seed: int) -> list[Row]:
    """The cheapest rows met that hold every pair; those given where none were."""
    draw, known = random.Random(seed), {}
    wanted = covering.wanted().keys()
    rows = [dict(rows[i % len(rows)]) for i in range(MOST_ROWS)]
    held = Counter(p for r in rows for p in covering.pairs(r))
    missing, took = len(wanted - held.keys()), seconds(rows)
    best, least = list(rows), took if not missing else math.inf
    for step in range(steps):
        i = draw.randrange(len(rows))
        changed = draw.sample(FREE, draw.choice((1, 1, 1, 2)))
        new = rows[i] | {f: draw.choice(FEATURES[f]) for f in changed}
        if new == rows[i] or not covering.legal(new):
            continue
        gone, come = (held_by(r, changed, known) for r in (rows[i], new))
        held.subtract(gone)
        held.update(come)
        both = {*gone, *come} & wanted
        after = sum(not held[p] for p in both)
        before = sum(held[p] + gone.count(p) == come.count(p) for p in both)
        slower = seconds([new]) - seconds([rows[i]])
        worse = after - before + WEIGHT * slower
        if worse > 0 and draw.random() >= math.exp(-worse / (HOT * (COLD / HOT) ** (step / steps))):
            held.subtract(come)
            held.update(gone)
            continue
        rows[i], missing, took = new, missing + after - before, took + slower
        if not missing and took < least - 1e-9:
            best, least = list(rows), took
    return best


if __name__ == "__main__":
    steps, seed = (int(x) for x in (*sys.argv[1:], "40000000", "1")[:2])
    before = covering.rows()
    found = searched(before, steps, seed)
    print(f"about {seconds(before):.0f} s of {len(before)} rows, now {seconds(found):.0f} s")  # noqa: T201
    if len(before) > MOST_ROWS or seconds(found) < seconds(before):
        covering.keep(sorted(found, key=lambda r: (-covering.ranks(r), covering.name(r))))
