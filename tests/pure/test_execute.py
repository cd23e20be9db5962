"""Every laid plan computes what one device computes: loss, norm, every gradient, the weights after two
steps; and sends what it declares."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from executed import (
    BERT,
    BLOOM,
    DROPS,
    GPT2,
    LLAMA,
    MLA,
    MLA_PLAIN,
    NEOX,
    QWEN,
    TIED,
    difference,
    laid,
    model,
    request,
)
from turns import halves

from partita.parallel.cp.rules import laid_order
from partita.parallel.exact.execute import Execution, execute
from partita.parallel.laid import lay

PLANS = [
    "tp2", "tp4", "tp2+sp", "tp4+sp", "dp_replicate2", "dp_shard2.zero0", "pp2/1mb", "pp2/2mb",
    "dp_replicate2 tp2", "dp_replicate2 pp2/2mb", "pp2/2mb tp2+sp",
    "dp_replicate2 pp2/2mb tp2+sp", "dp_replicate2 dp_shard2.zero0 tp2",
]  # fmt: skip
ZERO = [
    "dp_shard2.zero1", "dp_shard2.zero2 2mb", "dp_shard2.zero3 2mb", "dp_shard4.zero3 tp2",
    "dp_shard2.zero3 2mb data.reshard_after_forward=false", "dp_replicate2 dp_shard2.zero1",
    "dp_replicate2 dp_shard2.zero2", "dp_replicate2 dp_shard2.zero3", "pp2/2mb dp_shard2.zero1",
    "pp2/2mb dp_shard2.zero2", "pp2/2mb dp_shard2.zero3", "dp_shard2.zero1 tp4+sp 2mb",
    "pp2/2mb dp_shard2.zero3 data.reshard_after_forward=false", "dp_shard2.zero3 tp2+sp 2mb",
    "dp_shard4.zero2 data.bucket_bytes=300", "dp_shard2.zero3 2mb data.accumulate=whole",
    "pp2/2mb dp_shard2.zero3 data.accumulate=whole data.reshard_after_forward=false",
]  # fmt: skip
MODELS = {
    "llama": LLAMA,
    "tied": TIED,
    "gpt2": GPT2,
    "drops": DROPS,
    "qwen": QWEN,
    "mla": MLA,
    "mla plain": MLA_PLAIN,
    "neox": NEOX,
    "bloom": BLOOM,
    "bert": BERT,
    "encoder": replace(LLAMA, causal=False),
    "drops both ways": replace(DROPS, causal=False),
    "few words": replace(LLAMA, vocab=3),
    "shared": replace(LLAMA, hidden=24, heads=12, kv_heads=6, head_dim=2),
}
FULL = " recompute:full"


CASES = [(m, p) for p, m in halves([*PLANS, *ZERO], list(MODELS)[:4])]
LATENT = (
    "tp2", "tp4+sp", "cp2:ring tp2+sp", "cp2:ulysses tp2", "cp4:hybrid2x2", "dp_shard2.zero3 tp2+sp 2mb",
    "pp2:zb_h1/4mb tp2+sp", "tp2+sp recompute:full recompute.collectives=keep",
    "pp2/2mb tp2 recompute:selective recompute.modules=core,norm,act",
)  # fmt: skip
CASES += [("mla", p) for p in LATENT] + [("mla plain", p) for p in LATENT[:3]]
CASES += [("shared", p) for p in ("cp4:ulysses", "cp2:ulysses tp2+sp", "cp4:hybrid2x2 tp2+sp")]
CASES += [
    ("qwen", p)
    for p in ("tp4", "tp4+sp", "cp4:hybrid2x2", "cp2:ulysses tp2+sp", "dp_shard2.zero3 2mb")
]
CASES += [
    ("drops", "dp_shard2.zero3 tp2+sp 2mb recompute:full"),
    ("few words", "tp4+sp dp_shard2.zero3"),
]
SELECTIVE = "recompute:selective recompute.modules=core,norm,act"
CASES += [
    ("neox", p)
    for p in (
        "tp4+sp", "dp_shard2.zero3 tp2 2mb", f"cp2:ring tp2+sp {SELECTIVE}", "pp2:zb_h1/4mb tp2+sp",
        "tp2+sp recompute:full recompute.collectives=keep",
    )
]  # fmt: skip
CASES += [
    ("bloom", p)
    for p in (
        "tp4+sp", "cp2:ulysses tp2", "cp4:hybrid2x2", "cp2:ring tp2+sp recompute:full",
        "dp_shard2.zero3 pp2/2mb", f"cp2:all_gather {SELECTIVE}",
    )
]  # fmt: skip
CASES += [
    ("bert", p)
    for p in (
        "tp4+sp dp_shard2.zero3", "cp4:hybrid2x2" + FULL, f"cp2:ring tp2+sp {SELECTIVE}", "pp2:zb_h1/4mb tp2",
        "tp2+sp recompute:full recompute.collectives=keep",
    )
]  # fmt: skip
CASES += [
    ("encoder", p)
    for p in ("cp2:ring tp2+sp", "cp4:hybrid2x2", "cp2:all_gather pp2/2mb", "cp2:ulysses" + FULL)
] + [("drops both ways", "cp2:ring")]
CASES += [(m, p + FULL) for p, m in halves(PLANS, ["llama", "drops"])]
CONTEXT = [
    "cp2:ring", "cp4:all_gather", "cp2:ulysses", "cp4:ulysses", "cp4:hybrid2x2", "cp2:ring tp2",
    "cp2:ulysses tp2", "cp2:ring tp2+sp", "cp2:ulysses tp2+sp", "cp2:all_gather tp2+sp",
    "dp_shard2.zero0 cp2:ring pp2/2mb", "dp_replicate2 cp2:ulysses pp2/2mb",
]  # fmt: skip
CASES += [(m, p) for p, m in halves(CONTEXT, ["llama", "gpt2", "drops"])]
CASES += [(m, p + FULL) for p, m in halves(CONTEXT, ["llama", "drops"])]
LESS = (
    "recompute:selective",
    "recompute:selective recompute.modules=core,norm,act",
    "recompute:selective recompute.modules=norm recompute.every=2",
    "recompute:full recompute.every=2",
    "recompute:full recompute.collectives=keep",
)
FOR = [f"{p} {r}" for r in LESS for p in ("tp2+sp", "pp2/2mb tp2")]
CASES += [(m, p) for p, m in halves(FOR, ["llama", "drops"])]
CASES += [(m, f"cp4:hybrid2x2 tp2+sp {LESS[-1]}") for m in ("llama", "qwen")]
CASES += [("drops", f"{p} {r}") for r in LESS for p in ("cp2:ring", "cp4:hybrid2x2")]


@pytest.mark.parametrize(("name", "line"), CASES)
def test_plan_equals_one_device(name, line) -> None:
    whole = laid(MODELS[name], line)
    got = execute(whole)
    assert difference(MODELS[name], got, 2) == ""
    for rank in range(whole.mesh.world_size):
        assert got.traffic[rank] == whole.traffic(rank)


def test_more_stages_and_a_stated_split() -> None:
    """A stage of embedding or head alone, more stages than microbatches, other orders of the mesh."""
    for line in (
        "pp3/2mb",
        "pp2/4mb pipeline.split=1,2",
        "dp_replicate2 pp2/1mb tp2 order:pp,dp_replicate,cp,dp_shard,tp",
    ):
        assert difference(TIED, execute(laid(TIED, line)), 2) == "", line


STAGES = [
    "pp2:interleaved_1f1bx2/2mb tp2+sp", "pp2:looped_bfsx2/2mb recompute:full", "pp2:zb_h1/4mb tp2+sp",
    "pp2:zb_v/4mb", "pp2:dualpipev/4mb tp2+sp", "pp2:dualpipe/4mb tp2",
    "pp2:gpipe/4mb tp2+sp offload:nvme offload.targets=activations",
    "pp2:zb_h1/4mb recompute:full offload:cpu offload.targets=activations",
    "dp_replicate2 pp2:zb_h1/2mb", "dp_shard2.zero2 pp2:chimera/2mb", "dp_shard2.zero3 pp2:chimera/2mb",
    "tp2 pp2:auto/4mb pipeline.copies=2 pipeline.costs=12_12_12,10_10_10x2,15_15_15",
]  # fmt: skip


@pytest.mark.parametrize(("line", "name"), halves(STAGES, ["tied", "gpt2"]))
def test_stages_on_any_rank(line, name) -> None:
    """Several stages a rank, V, both ways; backward in halves: the same numbers, the declared traffic."""
    spec = model("gpt2" if name == "gpt2" else "llama", layers=4, tied=True)
    whole = lay(request(spec, line))
    got = execute(whole)
    assert difference(spec, got, 2) == ""
    for rank in range(whole.mesh.world_size):
        assert got.traffic[rank] == whole.traffic(rank)


def test_last_ranks_hold_fewer_rows() -> None:
    """A vocabulary of 5 on 4 ranks: 2, 2, 1, 0 rows; one of 127: 32, 32, 32, 31."""
    for vocab in (5, 127):
        spec = model(vocab=vocab, layers=1)
        whole = laid(spec, "tp4+sp")
        held = [execute(whole, 1).weights[r, "head.table"] for r in range(4)]
        rows = [sum(len(x.spans[0]) for x in boxes) for boxes in held]
        assert rows == ([2, 2, 1, 0] if vocab == 5 else [32, 32, 32, 31])
        assert difference(spec, execute(whole), 2) == ""


def test_samples_may_move() -> None:
    """However four samples are spread over ranks and microbatches, some without a valid token."""
    for line in ("pp1/2mb", "pp1/4mb", "dp_replicate4", "dp_replicate2 pp1/2mb"):
        assert difference(LLAMA, execute(laid(LLAMA, line), 1), 1) == "", line


def test_the_order_of_the_sequence_is_the_rings() -> None:
    """A zig-zag that everybody shares changes no number; one rank's own does."""
    whole = laid(GPT2, "cp2:ring")
    assert laid_order(whole.request).rows == ((0, 3, 1, 2),)
    run = Execution(whole)
    run.world.order = run.world.order[::-1].copy()
    run.train_step(0)
    assert difference(GPT2, run.outcome, 1) == ""
    run = Execution(whole)
    place = run.world.place
    run.world.place = lambda *given: replace(
        place(*given), order=np.arange(4) if given[2] else place(*given).order
    )
    run.train_step(0)
    assert difference(GPT2, run.outcome, 1) != ""
