"""A covering array of plans: every legal pair of two features stands in at least one of them.

A feature is an axis, a method of it, or a choice beside the axes; `hybrid` context parallelism is `ring` and
`ulysses` at once. Two kinds of pairs are not asked for, which would take a plan each: beside a schedule that
something else is *left out*, and of each family every schedule, which a plan each would be (seven families
beside eighteen schedules), nor beside halos; there it is every `kind` of schedule, and every schedule with
dense layers, experts and images.
"""

from __future__ import annotations

import csv
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations, product
from math import prod
from pathlib import Path
from typing import Any

FEATURES: dict[str, tuple[str, ...]] = {
    "pipeline": (
        "2mb", "pp2:1f1b/4mb", "pp2:gpipe/2mb pipeline.post_validation=true", "pp2:interleaved_1f1bx2/4mb",
        "pp2:looped_bfsx2/2mb", "pp2:zb_h1/4mb", "pp2:zb_h2/4mb", "pp2:zb_v/4mb", "pp2:v_half/4mb",
        "pp2:v_min/4mb", "pp2:v_2_3/4mb", "pp2:interleaved_zbx2/4mb", "pp2:dualpipev/4mb",
        "pp2:dualpipe/4mb", "pp2:chimera/4mb", "pp2:pipedream/4mb", "pp2:pipedream_2bw/2mb",
        "pp2:auto/4mb", "pp2:FILE/4mb",
    ),
    "replicas": ("", "dp_replicate2"),
    "shards": ("", "dp_shard2.zero0", "dp_shard2.zero1", "dp_shard2.zero2", "dp_shard2.zero3"),
    "gathers": ("", "data.reshard_after_forward=false"),
    "tensor": ("", "tp2", "tp2+sp"),
    "context": ("", "ring", "all_gather", "halo"),
    "heads": ("", "ulysses"),
    "experts": ("", "ep2"),
    "slices": ("", "etp2"),
    "chunks": ("", "expert.chunks=2"),
    "recompute": ("", "recompute:selective recompute.modules=core,norm,act", "recompute:full"),
    "brings": ("", "recompute.collectives=keep"),
    "every": ("", "recompute.every=2"),
    "offload": (
        "", "offload:cpu offload.targets=activations,optimizer",
        "offload:nvme offload.targets=activations,gradients,optimizer",
    ),
    "rounding": ("", "precision.rounding=stochastic"),
    "precision": (
        "fp32", "bf16", "fp16", "fp8", "fp8 precision.fp8_scaling=delayed",
        "fp8 precision.fp8_scaling=static",
    ),
    "family": ("gpt_neox", "qwen tied", "bloom", "gpt2 dropout", "moe", "moe mla", "alexnet"),
    "sees": ("", "documents", "window"),
    "trains": ("", "frozen", "lora"),
}  # fmt: skip
KINDS = {  # of schedules, by where stages lie and what they hold
    "line": ("1f1b", "gpipe", "zb_h1", "zb_h2"),
    "loop": ("interleaved_1f1bx2", "looped_bfsx2", "interleaved_zbx2"),
    "vee": ("zb_v", "v_half", "v_min", "v_2_3", "dualpipev"),
    "both ways": ("dualpipe", "chimera"),
    "versions": ("pipedream", "pipedream_2bw"),
    "lists": ("auto", "FILE"),
}
CHUNKS = ("loop", "vee", "lists")  # two stages a rank
MOST_RANKS = 16  # of one plan: enough for every pair, and a plan takes seconds
MOST_PROCESSES = 8  # at most so many where ranks are processes
SEED, TRIES, THRIFT = 26, 4, 0.05  # of those tried, what came to the fewest plans
FREE = tuple(FEATURES)
FILE = Path(__file__).with_name("covering.tsv")
Row = dict[str, str]
Pair = tuple[str, str, str, str]
UNSPELT = {  # two features of which no plan says both, or one is then as if it were not there: why
    ("shards", "gathers"): "parameters are gathered at stage 3 alone",
    (
        "pipeline",
        "gathers",
    ): "parameters are gathered at stage 3 alone, which goes with no versions",
    ("recompute", "brings"): "nothing is computed again, whose collectives it might keep",
    ("recompute", "every"): "nothing is computed again, in every k-th layer or in all",
    ("context", "heads"): "of ring and Ulysses a hybrid is made",
    ("family", "sees"): "an image has no sequence",
    ("context", "sees"): "an image has no sequence",
}


def kind(row: Row) -> str:
    """Of the row's schedule; '' without a pipeline."""
    return _kind(row["pipeline"])


@cache
def _kind(pipeline: str) -> str:
    name = pipeline.partition(":")[2].partition("/")[0]
    return next((k for k, names in KINDS.items() if name in names), "")


def layers(row: Row) -> str:
    """What layers are made of."""
    return {"moe": "experts", "alexnet": "images"}.get(row["family"].split()[0], "dense")


def bits(row: Row) -> str:
    """The dtype of what is computed, whatever its scales are of."""
    return row["precision"].split()[0]


def fold(row: Row) -> int:
    """Ranks that experts fold over."""
    return prod(2 for f in ("shards", "tensor", "context", "heads") if row[f])


def ranks(row: Row) -> int:
    """Of the plan."""
    others = (row["replicas"], kind(row), layers(row) == "images")
    return fold(row) * prod(2 for x in others if x)


def legal(row: Row) -> bool:
    """Whether the plan may be."""
    made = layers(row)
    experts = row["experts"] or row["slices"] or row["chunks"]
    needs = prod(2 for f in ("experts", "slices") if row[f])
    edges = row["context"] == "halo"
    cut = row["tensor"] == "tp2+sp" or (row["context"] and not edges) or row["heads"]
    versions = kind(row) == "versions"
    return not (
        ranks(row) > MOST_RANKS
        or (row["gathers"] and row["shards"] != "dp_shard2.zero3")
        or ((row["brings"] or row["every"]) and not row["recompute"])
        or (row["context"] == "all_gather" and row["heads"])
        or (made == "images" and (cut or row["sees"]))
        or (made != "images" and edges)
        or (made != "experts" and experts)
        or (made == "experts" and row["tensor"] == "tp2" and not row["slices"])
        or fold(row) % needs
        or (row["rounding"] and row["precision"] == "fp32")
        or (versions and (row["shards"][-1:] in ("2", "3") or row["precision"] == "fp16"))
    )


def pair(row: Row, a: str, b: str) -> list[Pair]:
    """What is asked for of two of the row's features, in the order of FEATURES."""
    x, y = row[a], row[b]
    if a == "pipeline" and b == "family":
        made = layers(row)
        return [(a, kind(row), b, y)] + [(a, x, "layers", made)] * (made != "dense")
    if a == "pipeline" and b == "precision" and bits(row) == "fp8":
        return [(a, kind(row), b, y), (a, x, "bits", "fp8")]
    if a == "pipeline" and y == "halo":
        return [(a, kind(row), b, y)]
    return [] if a == "pipeline" and kind(row) and not y else [(a, x, b, y)]


def pairs(row: Row) -> set[Pair]:
    """Every two features of the row."""
    return {p for a, b in combinations(FEATURES, 2) for p in pair(row, a, b)}


def wanted() -> dict[Pair, Row]:
    """Every pair that some legal row holds, and one of them."""
    found: dict[Pair, Row] = {}
    for a, b in combinations(FEATURES, 2):
        for x in FEATURES[a]:
            for y in FEATURES[b]:
                row = completed({a: x, b: y})
                if row is not None:
                    found |= {p: {a: x, b: y} for p in pair(row, a, b)}
    return found


def completed(part: Row) -> Row | None:
    """A legal row that holds the part and little else; None where there is none."""
    needed = {
        "shards": ("", "dp_shard2.zero3"), "tensor": ("", "tp2+sp"), "slices": ("", "etp2"),
        "recompute": ("", "recompute:full"), "family": FEATURES["family"], "precision": ("bf16",),
    }  # fmt: skip
    free = {n: needed.get(n, v[:1]) for n, v in FEATURES.items()}
    made = (dict(zip(free, v, strict=True)) | part for v in product(*free.values()))
    return next((row for row in made if legal(row)), None)


def left_out() -> list[Pair]:
    """Pairs that a plan can say and no row may hold."""
    return [
        (a, x, b, y)
        for a, b in combinations(FEATURES, 2)
        for x, y in product(FEATURES[a], FEATURES[b])
        if (a, b) not in UNSPELT and completed({a: x, b: y}) is None
    ]


def drawn(part: Row, draw: random.Random) -> Row:
    """A legal row that holds the part, the other features drawn one after the other."""
    row = completed(part)
    assert row is not None
    for f in draw.sample(FREE, len(FREE)):
        new = {**row, f: draw.choice(FEATURES[f])} | part
        row = new if legal(new) else row
    return row


def rows() -> list[Row]:
    """Those of the file that may be, and what they leave out: greedy, the same every time, each row the best
    of some that hold a pair not yet covered, of features that most is missing of."""
    draw, found = random.Random(SEED), kept()
    held = set().union(*map(pairs, found))
    left = {p: part for p, part in wanted().items() if p not in held}
    while left:
        missing = Counter(x for a, v, b, w in left for x in ((a, v), (b, w)))
        hardest = sorted(left, key=lambda p: (-missing[p[:2]] - missing[p[2:]], p))[:TRIES]
        made = [climbed(left[p], left, draw) for p in hardest]
        found.append(max(made, key=lambda m: m[0])[1])
        done = pairs(found[-1])
        left = {p: part for p, part in left.items() if p not in done}
    return found


def kept() -> list[Row]:
    """The legal rows of the file: one a line, each feature's value under its name."""
    with FILE.open(newline="") as lines:
        read = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    known = [r for r in read if all(r.get(f) in values for f, values in FEATURES.items())]
    return [r for r in known if legal(r)]


def keep(of: Sequence[Row]) -> None:
    """Writes the file."""
    lines = ["\t".join(FEATURES), *("\t".join(r[f] for f in FEATURES) for r in of)]
    FILE.write_text("\n".join(lines) + "\n")


def climbed(part: Row, left: Mapping[Pair, Row], draw: random.Random) -> tuple[float, Row]:
    """A row that holds the part, changed feature by feature while it gets better, and how good it is: pairs
    that are missing, over its ranks to the power of THRIFT."""
    row = drawn(part, draw)
    gain = sum(p in left for p in pairs(row))
    best, better = gain / ranks(row) ** THRIFT, True
    while better:
        better = False
        for f in draw.sample(FREE, len(FREE)):
            before = _share(row, f, left)
            for new in ({**row, f: v} for v in FEATURES[f] if v != row[f] and f not in part):
                if not legal(new):
                    continue
                more = gain - before + _share(new, f, left)
                if more / ranks(new) ** THRIFT > best + 1e-9:
                    row, gain, before, better = new, more, _share(new, f, left), True
                    best = gain / ranks(row) ** THRIFT
    return best, row


def _share(row: Row, feature: str, left: Mapping[Pair, Row]) -> int:
    """Missing pairs that a feature has a part in."""
    of = (n for n in FREE if n != feature)
    both = ((feature, n) if FREE.index(feature) < FREE.index(n) else (n, feature) for n in of)
    return sum(p in left for a, b in both for p in pair(row, a, b))


def third(of: Sequence[Any], part: int) -> list[Any]:
    """A third of them, another one with each commit, for part 0, which `make test` runs; the rest for part 1,
    which `make test-slow` does."""
    # pytest's path has it, not that of the script which writes the page
    from turns import turn

    parts = [1, 2] if part else [0]
    return [r for i, r in enumerate(of) if (i - turn(3)) % 3 in parts]


def fewer(row: Row) -> Row:
    """The row without replicas, slices, tensor or context ranks, one after the other, until it is small."""
    for f in ("replicas", "slices", "tensor", "heads", "context", "experts"):
        new = {**row, f: ""}
        row = new if ranks(row) > MOST_PROCESSES and legal(new) else row
    return row


def on_processes(of: Sequence[Row]) -> list[tuple[Row, str]]:
    """A third of the rows, and the backend of each: in turn for shm and gloo the plan of at most
    MOST_PROCESSES that brings most features which run on neither, then on that one, then of fewest ranks.
    A feature that no such row has brings its rows made smaller."""
    small = [r for r in of if ranks(r) <= MOST_PROCESSES]
    known = {x for r in small for x in r.items()}
    small += [s for s in (fewer(r) for r in of if not known >= set(r.items())) if s not in small]
    left = [(r, {(f, v) for f, v in r.items() if v}) for r in small if ranks(r) <= MOST_PROCESSES]
    seen: dict[str, set[tuple[str, str]]] = {"shm": set(), "gloo": set()}
    found = []
    for i in range(len(of) // 3):
        backend, other = ("shm", "gloo") if i % 2 == 0 else ("gloo", "shm")
        here = seen[backend]
        new = [(len(has - here - seen[other]), len(has - here), -ranks(r)) for r, has in left]
        best, has = left.pop(new.index(max(new)))
        here |= has
        found.append((best, backend))
    return found


def line(row: Row, given: str = "") -> str:
    """The plan in one line; `given` is the path of a schedule's lists. What lies elsewhere takes the shards
    of stage 3 along (fp8's not into files)."""
    context = {"": "", "ring": "cp2:ring", "all_gather": "cp2:all_gather", "halo": "cp2:halo"}[
        row["context"]
    ]
    if row["heads"]:
        context = "cp4:hybrid2x2" if context else "cp2:ulysses"
    filed = bits(row) == "fp8" and "nvme" in row["offload"]
    shards = row["offload"] and "zero3" in row["shards"] and not filed
    words = [row[f] for f in ("replicas", "shards", "gathers", "tensor")]
    words += [context, row["pipeline"].replace("FILE", f'"file:{given}"')]
    words += [row[f] for f in ("experts", "slices", "chunks", "recompute", "brings", "every")]
    words += [row["offload"] + (",parameters" if shards else ""), row["rounding"]]
    words += ["split2" if layers(row) == "images" else "", row["precision"]]
    return " ".join(w for w in words if w)


def name(row: Row) -> str:
    """The plan, and of what model."""
    return ", ".join(x for x in (row["family"], row["trains"], row["sees"]) if x) + f": {line(row)}"
