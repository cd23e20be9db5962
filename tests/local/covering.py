"""A covering array of plans: every legal pair of two features stands in at least one of them."""

from __future__ import annotations

import random
from itertools import combinations

FEATURES: dict[str, tuple[str, ...]] = {
    "data": (
        "", "dp_replicate2", "dp_shard2.zero0", "dp_shard2.zero1", "dp_shard2.zero2", "dp_shard2.zero3",
        "dp_replicate2 dp_shard2.zero3", "dp_shard2.zero3 data.reshard_after_forward=false",
    ),
    "tensor": ("", "tp2", "tp2+sp"),
    "context": ("", "cp2:ring", "cp2:ulysses", "cp4:hybrid2x2", "cp2:all_gather"),
    "pipeline": (
        "2mb", "pp2:1f1b/4mb", "pp2:gpipe/2mb pipeline.post_validation=true", "pp2:interleaved_1f1bx2/4mb",
        "pp2:zb_h1/4mb", "pp2:zb_v/4mb", "pp2:dualpipev/4mb", "pp2:dualpipe/4mb", "pp2:pipedream/4mb",
    ),
    "recompute": (
        "", "recompute:selective recompute.modules=core,norm,act", "recompute:full",
        "recompute:full recompute.collectives=keep", "recompute:full recompute.every=2",
    ),
    "offload": (
        "", "offload:cpu offload.targets=activations,optimizer",
        "offload:nvme offload.targets=activations,gradients,optimizer",
    ),
    "model": (
        "gpt_neox", "qwen tied", "bloom", "gpt2 dropout", "moe", "moe mla ep2",
        "moe ep2 etp2 expert.chunks=2", "alexnet split2",
    ),
    "sees": ("", "documents", "window"),
    "trains": ("all", "frozen", "lora"),
    "rounding": ("", "precision.rounding=stochastic"),
}  # fmt: skip
MOST_RANKS = 16  # of one plan: enough for every pair, and a plan takes seconds
SEED = 39  # of forty, the one of which came the fewest ranks in all
Row = dict[str, str]


def legal(row: Row) -> bool:
    """Whether the plan may be: the folded ranks hold the experts, tp with experts has sp unless they are
    cut too, images are cut by no tp or cp, and no gradients are sharded, nor (here) offloaded, where stages
    update on their own. Images have no LoRA, and nothing that is seen of a sequence."""
    experts = row["model"].startswith("moe")
    fold = (2 if "dp_shard2" in row["data"] else 1) * (2 if row["tensor"] else 1)
    fold *= {"": 1, "cp4:hybrid2x2": 4}.get(row["context"], 2)
    images = row["model"].startswith("alexnet")
    if images and (row["tensor"] or row["context"] or row["sees"]):
        return False
    world = (
        (2 if images else 1)
        * fold
        * (2 if "dp_replicate2" in row["data"] else 1)
        * (2 if row["pipeline"] != "2mb" else 1)
    )
    if world > MOST_RANKS:
        return False
    need = (2 if " ep2" in row["model"] else 1) * (2 if "etp2" in row["model"] else 1)
    shards = any(z in row["data"] for z in ("zero2", "zero3"))
    if "pipedream" in row["pipeline"] and (shards or "gradients" in row["offload"]):
        return False
    if images and row["trains"] == "lora":
        return False
    return not (fold % need or (experts and row["tensor"] == "tp2" and "etp2" not in row["model"]))


def pairs(row: Row) -> set[tuple[str, str, str, str]]:
    """Every two features of the row."""
    return {(a, row[a], b, row[b]) for a, b in combinations(FEATURES, 2)}


def wanted() -> set[tuple[str, str, str, str]]:
    """Every pair that some legal row holds."""
    found: set[tuple[str, str, str, str]] = set()
    for a, b in combinations(FEATURES, 2):
        for x in FEATURES[a]:
            for y in FEATURES[b]:
                if _completed({a: x, b: y}, random.Random(0)) is not None:
                    found.add((a, x, b, y))
    return found


def _completed(part: Row, draw: random.Random) -> Row | None:
    for _ in range(1000):
        row = {n: part.get(n) or draw.choice(v) for n, v in FEATURES.items()} | part
        if legal(row):
            return row
    return None


def rows() -> list[Row]:
    """Greedy, the same every time: each row is the best of some that hold a pair not yet covered."""
    draw, left, found = random.Random(SEED), wanted(), []
    while left:
        best: tuple[int, Row] | None = None
        for a, x, b, y in draw.sample(sorted(left), min(100, len(left))):
            row = _completed({a: x, b: y}, draw)
            assert row is not None
            gain = len(pairs(row) & left)
            if best is None or gain > best[0]:
                best = gain, row
        assert best is not None
        found.append(best[1])
        left -= pairs(best[1])
    return found


def line(row: Row) -> str:
    """The plan in one line, fp64. What lies elsewhere takes the shards of stage 3 along."""
    words = [row["data"], row["tensor"], row["context"], row["pipeline"], row["recompute"]]
    shards = bool(row["offload"]) and "zero3" in row["data"]
    words += [row["offload"] + shards * ",parameters", row["rounding"]]
    return " ".join(
        [w for w in words if w]
        + [w for w in row["model"].split() if w.startswith(("ep2", "etp2", "expert.", "split"))]
        + ["fp64"]
    )
