"""LoRA as weights of the Program: layouts that follow the base, no new region, exact plans, FLOPs."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
from executed import BLOOM, GPT2, LLAMA, MLA, MLA_PLAIN, MOE, declared, request, unequal

from partita.base.errors import UsageError
from partita.cost.machine import software_of
from partita.parallel.exact.execute import Outcome, execute
from partita.parallel.laid import lay
from partita.parallel.read import flops, gradient_axes
from partita.parallel.room import Request
from partita.simulate.started import unfused_kernels
from partita.simulate.work import block_work
from partita.spec.families import program
from partita.spec.frozen import Frozen
from partita.spec.job import ADAPTERS, Job
from partita.spec.plan_text import parse

ALL = ("wq", "wk", "wv", "wo", "gate_up", "down")
LOW = replace(LLAMA, lora_rank=3, lora_targets=ALL)
LOW_GPT2 = replace(GPT2, lora_rank=2, lora_targets=("wo", "fc1", "fc2"))
LOW_BLOOM = replace(BLOOM, lora_rank=2, lora_targets=("wq", "wo", "fc2"))
LATENT = ("q_a", "kv_a", "k_pe", "wq", "wk", "wv", "wo")
LOW_MLA = replace(MLA, lora_rank=3, lora_targets=LATENT)
EXPERTS = ("wo", "gate_up", "expert_gate_up", "expert_down", "shared_gate_up", "shared_down")
LOW_MOE = replace(MOE, lora_rank=2, lora_targets=EXPERTS)
DROPS = replace(LOW, lora_dropout=0.1)
DROPS_MOE = replace(LOW_MOE, lora_dropout=0.1)
CASES = [
    (DROPS_MOE, "dp_shard2.zero3 tp2+sp ep2 etp2 expert.chunks=2", ADAPTERS),
    (DROPS_MOE, "cp2:ring tp2 etp2 ep2 recompute:full", ADAPTERS),
    (replace(DROPS_MOE, capacity_factor=0.75), "pp2:zb_h1/2mb dp_shard2.zero1 ep2", ADAPTERS),
    (DROPS_MOE, "dp_shard2.zero1 ep2 2mb", Frozen(("*expert*", "*.wq"))),
    (DROPS, "tp4+sp recompute:full", ADAPTERS), (DROPS, "cp4:hybrid2x2 pp2:zb_h1/2mb", ADAPTERS),
    (replace(LOW_GPT2, lora_dropout=0.1), "dp_shard2.zero1 tp2 2mb", ADAPTERS),
    (LOW_MLA, "tp4+sp", ADAPTERS), (LOW_MLA, "cp2:ring dp_shard2.zero3 tp2 2mb", ADAPTERS),
    (LOW_MOE, "dp_shard2.zero1 tp2+sp ep2", ADAPTERS), (LOW_MOE, "tp2 etp2 2mb recompute:full", ADAPTERS),
    (LOW_MOE, "pp2:zb_h1/2mb dp_shard2.zero3 tp2+sp ep2 etp2", ADAPTERS), (LOW_BLOOM, "tp4+sp", ADAPTERS),
    (LOW, "tp4+sp", ADAPTERS), (LOW, "dp_shard2.zero3 tp2+sp 2mb recompute:full", ADAPTERS),
    (LOW, "pp2:zb_h1/2mb dp_shard2.zero1 tp2", ADAPTERS), (LOW, "cp2:ulysses tp2 dp_shard2.zero2", ADAPTERS),
    (LOW, "dp_shard2.zero2 tp2", Frozen(("*.wq", "*down_lora_b", "*wo_lora_a"))),
    (LOW_GPT2, "pp2/2mb tp2+sp", ADAPTERS),
]  # fmt: skip


@cache
def one_device(spec, rule) -> Outcome:
    return execute(lay(replace(request(spec, "fp32"), frozen=rule)))


@pytest.mark.parametrize(
    ("spec", "line", "rule"), CASES, ids=lambda x: x if isinstance(x, str) else ""
)
def test_a_plan_equals_one_device(spec, line, rule) -> None:
    whole = lay(replace(request(spec, line), frozen=rule))
    got = execute(whole)
    want = one_device(spec, rule)
    for step in range(2):
        for what in ("losses", "norms"):
            assert set(getattr(got, what)[step].values()) == {getattr(want, what)[step][0]}, what
        assert unequal(got.gradients[step], want.gradients[step]) == ""
    assert unequal(got.weights, want.weights) == ""
    for rank in range(whole.mesh.world_size):
        assert got.traffic[rank] == declared(whole, got, rank)


def test_layouts_follow_the_base_and_no_region_is_added() -> None:
    plain = lay(Request(parse("tp2+sp"), LLAMA, 4, 4))
    whole = lay(Request(parse("tp2+sp"), LOW, 4, 4, frozen=ADAPTERS))
    layer = whole.stages[0].blocks[1]
    axes = {w.name: (w.axes(), gradient_axes(layer, w, whole.sizes)) for w in layer.weights()}
    for name in ("attention.wq", "attention.wk", "mlp.gate_up"):
        assert axes[f"{name}_lora_a"] == (set(), ("tp",)) and axes[f"{name}_lora_b"] == ({"tp"}, ())
    for name in ("attention.wo", "mlp.down"):
        assert axes[f"{name}_lora_a"] == ({"tp"}, ()) and axes[f"{name}_lora_b"] == (set(), ("tp",))

    def moved(laid):
        return [(op.name, op.axes) for op in laid.stages[0].blocks[1].ops() if op.is_region]

    assert moved(plain) == moved(whole)
    assert layer.kept == plain.stages[0].blocks[1].kept  # x is kept for A, and nothing for B


def test_flops_and_parameters_are_those_of_the_formulas() -> None:
    h, f, kv, r, tokens = 8, 5, 4, 3, 2 * 4
    elements = r * ((h + h) + 2 * (h + kv) + (h + h) + 2 * (h + f) + (f + h))
    assert LOW.parameters() - LLAMA.parameters() == 3 * elements
    assert program(LOW).parameters() == LOW.parameters()
    base, whole = (
        program(LLAMA, 2, 4).blocks[1],
        lay(Request(parse("1mb"), LOW, 4, 2, frozen=ADAPTERS)),
    )
    ours = flops(whole.stages[0].blocks[1], whole.sizes)
    assert ours["F"] - flops(base, {})["F"] == 2 * tokens * elements
    inputs = r * (h + 2 * h + h + 2 * h + f)  # A's: dx, h again, dA; B's: dh, dB
    weights = sum(w.numel() for w in base.weights() if len(w.dims) > 1)
    attention = flops(base, {})["B"] - 2 * 2 * tokens * weights
    back = 2 * tokens * (weights + 3 * inputs + 2 * (elements - inputs))
    assert ours["B"] == attention + back


@pytest.mark.parametrize(
    "spec", [LOW_MLA, LOW_MOE, replace(LOW_MLA, latent=MLA_PLAIN.latent, lora_targets=LATENT[1:])]
)
def test_parameters_of_latents_and_experts(spec) -> None:
    assert program(spec).parameters() == spec.parameters()


def test_rows_of_experts_are_counted_once() -> None:
    """A row meets one expert's A and B."""
    base, low = (
        lay(replace(request(spec, "1mb"), frozen=rule))
        for spec, rule in ((MOE, Frozen()), (LOW_MOE, ADAPTERS))
    )
    ours, plain = (flops(x.stages[0].blocks[-2], x.sizes)["F"] for x in (low, base))
    rows, tokens, r, h, f = 2 * 4 * 4, 4 * 4, 2, 8, 3
    each = r * (3 * (h + f))
    assert ours - plain == 2 * (rows * each + tokens * each + tokens * r * (h + h))


@pytest.mark.parametrize(
    "rule", [ADAPTERS, Frozen(("*.wq", "*down_lora_b", "*wo_lora_a")), Frozen()]
)
@pytest.mark.parametrize(("spec", "plain"), [(LOW, LLAMA), (LOW_MOE, MOE)], ids=["dense", "moe"])
def test_matmuls_of_low_rank_are_those_that_run(spec, plain, rule) -> None:
    """Forward, their inputs' and their weights' are as many FLOPs as the ops say; a gradient that is added by
    another kernel has its weight's size, whatever the rows."""
    counted: list[tuple[float, float]] = []
    for one in (plain, spec):
        laid = lay(replace(request(one, "1mb"), frozen=rule))
        block = laid.stages[0].blocks[-2]
        work, says = block_work(block, laid.sizes), flops(block, laid.sizes)
        for part, kernels in (("F", work.forward), ("B", (*work.input, *work.weight))):
            ran = sum(2 * k.m * k.n * k.k * k.count for k in kernels if k.kind == "matmul")
            counted.append((ran, says[part]))
    for base, ours in zip(counted[:2], counted[2:], strict=True):
        assert ours[0] - base[0] == ours[1] - base[1]
    grows = [k for k in work.weight if k.adds]
    trained = [w for w in block.weights() if not w.frozen and len(w.dims) > 1]
    assert sum(k.m * k.n * k.count for k in grows) == sum(w.numel() for w in trained)
    era = software_of("megatron-2021")
    added = [x for k in work.weight for x in unfused_kernels(k, "W", era) if x.kind == "memory"]
    biases = [k for k in work.weight if k.kind == "memory"]
    assert sum(k.bytes for k in added if k not in biases) == 6 * sum(w.numel() for w in trained)


def test_a_job_trains_adapters_alone_unless_it_says_otherwise() -> None:
    table = {"global_batch_size": 4, "seq_len": 4, "micro_batch_size": 1}
    model = {"preset": "tiny", "lora_rank": 4}
    job = Job.load({"model": model, "train": table})
    assert job.model.lora_targets == ("wq", "wv") and job.model.lora_scale == 1.0
    errors = [p for p in job.problems() if p.severity == "error"]
    assert job.frozen == ADAPTERS and not errors and Job.load(job.to_table()) == job
    both = Job.load({"model": model, "train": {**table, "frozen": ["embedding.*"]}})
    assert not both.frozen.holds("blocks.0.mlp.down")


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"lora_targets": ["wq"]}, "lora_targets"), ({"lora_rank": 4, "lora_alpha": -1.0}, "lora_alpha"),
        ({"lora_rank": 4, "lora_targets": ["q_proj"]}, "lora_targets"),
        ({"lora_rank": 4, "lora_targets": ["q_a"]}, "lora_targets"),
        ({"lora_dropout": 0.1}, "lora_dropout"),
        ({"lora_rank": 4, "lora_dropout": 1.0}, "lora_dropout"),
        ({"lora_rank": 4, "lora_targets": ["expert_down"]}, "lora_targets"), ({"lora_rank": -1}, "lora_rank"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(fields, key) -> None:
    with pytest.raises(UsageError) as caught:
        replace(LLAMA, **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    assert caught.value.key == key
