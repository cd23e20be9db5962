"""Frozen weights as a fact of the Program: exact plans, declared memory, traffic and FLOPs, and its rules."""

from __future__ import annotations

from dataclasses import replace

import pytest
from executed import DROPS, LLAMA, MOE, TIED, declared, request, unequal

from partita.parallel.exact.execute import execute
from partita.parallel.laid import lay
from partita.parallel.read import flops, state_bytes
from partita.parallel.room import Request
from partita.spec.families import program
from partita.spec.frozen import Frozen, freeze
from partita.spec.job import Job
from partita.spec.plan_text import parse

PARTS = Frozen(("blocks.*.attention.w[qv]*", "blocks.1.*", "*mlp.down", "*experts.down", "*norm"))
BODY = Frozen(trainable=("head.*",))
TABLES = Frozen(("embedding.*", "*router*", "*fc1"))
CASES = [
    (LLAMA, "dp_shard2.zero1 tp2+sp", PARTS), (LLAMA, "dp_shard2.zero2 2mb", PARTS),
    (LLAMA, "dp_shard2.zero3 tp2+sp 2mb recompute:full", PARTS),
    (LLAMA, "dp_shard4.zero3 data.reshard_after_forward=false", BODY),
    (DROPS, "tp4+sp recompute:selective recompute.modules=core,norm,act", PARTS),
    (DROPS, "pp2/2mb dp_shard2.zero2", TABLES), (TIED, "pp2/2mb dp_shard2.zero3", TABLES),
    (LLAMA, "cp2:ulysses tp2+sp", PARTS), (LLAMA, "pp2:zb_h1/2mb dp_shard2.zero1", PARTS),
    (MOE, "dp_shard2.zero3 tp2+sp ep2 2mb", PARTS), (MOE, "dp_shard2.zero1 tp2+sp ep2 etp2", TABLES),
]  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "line", "rule"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_plan_equals_one_device(spec, line, rule) -> None:
    whole = lay(replace(request(spec, line), frozen=rule))
    alone = lay(replace(request(spec, "fp32"), frozen=rule))
    got, want = execute(whole), execute(alone)
    names = {n for _, n in want.gradients[0]}
    assert names and not any(map(rule.holds, names))
    for step in range(2):
        for what in ("losses", "auxiliary", "norms"):
            one = getattr(want, what)[step][0]
            assert set(getattr(got, what)[step].values()) == {one}, what
        assert unequal(got.gradients[step], want.gradients[step]) == ""
    assert unequal(got.weights, want.weights) == ""
    for rank in range(whole.mesh.world_size):
        assert got.traffic[rank] == declared(whole, got, rank)


def states(line: str, rule: Frozen) -> dict[str, float]:
    """Bytes a parameter by category, of all blocks of rank 0."""
    whole = lay(Request(parse(line), LLAMA, 4, 4, frozen=rule))
    blocks = whole.stages[0].blocks
    found = {}
    for b in blocks:
        for name, n in state_bytes(b, whole.sizes).items():
            found[name] = found.get(name, 0) + n / LLAMA.parameters()
    return found


def test_a_frozen_weight_is_two_bytes_of_bf16() -> None:
    whole, body = states("bf16", Frozen()), states("bf16", BODY)
    assert sum(whole.values()) == 18 and body["parameters"] == 2
    head = (7 * 8 + 8) / LLAMA.parameters()
    assert body["gradients"] == pytest.approx(4 * head)
    assert body["optimizer"] == pytest.approx(12 * head)
    cut = states("dp_shard4.zero3 bf16", BODY)
    cast = 2 * head / 4  # what is trained is rounded as it is gathered, and not stored
    assert cut["parameters"] == pytest.approx(2 / 4 - cast, rel=0.01)
    assert states("dp_shard4.zero2 bf16", BODY)["parameters"] == 2


def test_frozen_linears_have_half_a_backward_and_keep_nothing() -> None:
    for spec in (LLAMA, DROPS):
        plain = program(spec, 2, 4)
        rule = Frozen(("*attention.w*", "*mlp.[!n]*"))
        layer, less = plain.blocks[1], freeze(plain, rule).blocks[1]
        ours, theirs = flops(less, {}), flops(layer, {})
        assert ours["F"] == theirs["F"]
        linears = (
            2
            * 2
            * 4
            * sum(w.numel() for w in layer.weights() if rule.holds(w.name) and "bias" not in w.name)
        )
        assert theirs["B"] - ours["B"] == linears
        assert {"n1", "n2"} & layer.kept and not {"n1", "n2", "act"} & less.kept


def test_what_is_frozen_is_neither_reduced_nor_gathered_again() -> None:
    def sent(line: str, rule: Frozen) -> dict[tuple[str, str, str], int]:
        whole = lay(Request(parse(line), LLAMA, 4, 1, frozen=rule))
        return {(t.site, t.op, t.phase): t.bytes for t in whole.traffic(0)}

    layers = Frozen(("blocks.*",))
    for zero in ("dp_replicate2", "dp_shard2.zero1", "dp_shard2.zero2"):
        assert any("blocks.0" in s for s, *_ in sent(f"{zero} tp2+sp", Frozen()) if "unit" in s)
        assert not any("blocks" in s for s, *_ in sent(f"{zero} tp2+sp", layers) if "unit" in s)
        assert not any("frozen" in s for s, *_ in sent(zero, layers))
    cut = sent("dp_shard2.zero3", layers)
    assert {(o, p) for (s, o, p) in cut if "blocks" in s} == {
        ("all_gather", "F"),
        ("all_gather", "B"),
    }
    second = ("blocks.0.attention.norm:gather_from", "all_gather", "B")
    assert second in sent("tp2+sp", Frozen()) and second not in sent("tp2+sp", layers)
    assert second in sent("tp2+sp", Frozen(("*.wq", "*.wk")))


def job(**train: object) -> Job:
    table = {"global_batch_size": 4, "seq_len": 4, "micro_batch_size": 1, **train}
    return Job.load({"model": {"preset": "tiny"}, "train": table})


def test_patterns_must_name_weights_and_leave_some() -> None:
    assert job(frozen=["blocks.0.*"]).problems() == job().problems()
    (wrong,) = [p for p in job(frozen=["block.0.*", "head.*"]).problems() if p.rule == "frozen"]
    assert wrong.asked == "block.0.*" and "matches no weight" in wrong.message
    (all_,) = [p for p in job(frozen=["*"]).problems() if p.rule == "trainable"]
    assert "nothing is left to train" in all_.message
    few = job(frozen=["*.wq"], trainable=["*.w[qk]"])
    assert not few.frozen.holds("blocks.0.attention.wk") and few.frozen.holds(
        "blocks.0.attention.wq"
    )
    assert Job.load(few.to_table()) == few
