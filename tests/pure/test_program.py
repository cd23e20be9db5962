"""Programs: exact parameters, well-formed blocks, work that no plan loses or repeats."""

from __future__ import annotations

from dataclasses import replace

import pytest
from executed import DROPS, GPT2, LLAMA, TIED, laid, model, request

from partita.parallel.laid import Request, lay
from partita.parallel.read import flops
from partita.spec.families import program
from partita.spec.model import ModelSpec
from partita.spec.plan_text import parse
from partita.spec.program import Op, Program, rewrite, well_formed

LLAMA3 = {"family": "llama", "kv_heads": 8, "vocab": 128256, "max_seq_len": 8192}
PUBLISHED = {
    "llama3-8b": (
        ModelSpec(layers=32, hidden=4096, heads=32, ffn_hidden=14336, **LLAMA3), 8_030_261_248,
    ),
    "llama3-70b": (
        ModelSpec(layers=80, hidden=8192, heads=64, ffn_hidden=28672, **LLAMA3), 70_553_706_496,
    ),
    "llama3-405b": (
        ModelSpec(layers=126, hidden=16384, heads=128, ffn_hidden=53248, **LLAMA3), 405_853_388_800,
    ),
}  # fmt: skip
GPT3 = ModelSpec(family="gpt2", layers=96, hidden=12288, heads=96, vocab=50257, max_seq_len=2048)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name) -> None:
    spec, count = PUBLISHED[name]
    assert program(spec).parameters() == spec.parameters() == count


def test_experts_as_a_program() -> None:
    """Every weight once, work of the chosen experts alone, and the auxiliary losses as further outputs."""
    spec = model(
        experts=4,
        top_k=2,
        shared_experts=1,
        dense_layers=1,
        router_bias=True,
        balance_loss=0.01,
        z_loss=0.1,
    )
    made = program(spec, 2)
    assert made.parameters() == spec.parameters()
    assert len({id(b) for b in made.blocks}) == 4
    assert [w for b in made.blocks for w in well_formed(b)] == []
    tokens = 2 * spec.max_seq_len
    work = sum(flops(b, {})["F"] for b in made.blocks)
    assert work == tokens * spec.forward_flops_per_token(spec.max_seq_len, "model_full")
    layer = made.blocks[2]
    assert [s.name for s in layer.segments] == [
        "attention", "mlp", "shared", "router", "dispatch", "experts", "combine",
    ]  # fmt: skip
    assert {t.name for t in layer.tensors.values() if t.role == "aux"} == {"balance", "z"}


def test_gpt3_counts_174604_million() -> None:
    """Brown et al. 2020 print 174,600M (table 2.1)."""
    assert program(GPT3).parameters() == GPT3.parameters()
    assert round(program(GPT3).parameters() / 1e6) == 174_604


MODELS = {"llama": LLAMA, "tied": TIED, "gpt2": GPT2, "drops": DROPS}
PLANS = ["fp32", "tp4+sp", "dp_replicate2 tp2 recompute:full", "pp2/2mb tp2+sp bf16"]


@pytest.mark.parametrize("line", PLANS)
@pytest.mark.parametrize("name", MODELS)
def test_laid_blocks_are_programs_again(name, line) -> None:
    whole = laid(MODELS[name], line)
    assert whole.program.parameters() == MODELS[name].parameters()
    for stage in whole.stages:
        for block in stage.blocks:
            assert well_formed(block) == []
            dtypes = {t.dtype for t in block.tensors.values() if t.role != "buffer"}
            assert "" not in dtypes
            assert block.kept <= set(block.tensors)


def test_equal_layers_are_one_object() -> None:
    assert len({id(b) for b in laid(LLAMA, "tp2+sp").program.blocks}) == 3


def test_weight_names_are_the_maps() -> None:
    names = set(laid(LLAMA, "fp32").layouts)
    layer = ["norm", "wq", "wk", "wv", "wo"]
    want = {f"blocks.{i}.attention.{w}" for i in range(3) for w in layer}
    want |= {f"blocks.{i}.mlp.{w}" for i in range(3) for w in ("norm", "gate_up", "down")}
    assert names == want | {"embedding.table", "head.norm", "head.table"}
    assert set(laid(TIED, "fp32").layouts) == names - {"head.table"}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"reads": ("nowhere",)}, "reads nowhere, which nothing before it writes"),
        ({"writes": "n1"}, "writes n1 a second time"),
        ({"name": "attention.norm"}, "two ops are named attention.norm"),
        ({"saves": ("ghost",)}, "names ghost, which is no tensor"),
    ],
)
def test_what_is_not_well_formed(change, complaint) -> None:
    layer = program(LLAMA).blocks[1]

    def spoil(op: Op) -> tuple[Op, ...]:
        return (replace(op, **change) if op.name == "attention.wq" else op,)

    assert any(complaint in p for p in well_formed(rewrite(layer, spoil)))


WORK = [
    "tp2",
    "tp4+sp",
    "dp_replicate2",
    "dp_replicate2 tp2+sp",
    "pp2/2mb",
    "dp_replicate2 pp2/1mb tp2",
]


def total_flops(spec: ModelSpec, line: str) -> float:
    """F and B of all ranks for one step; a vocabulary that divides."""
    asked = request(spec, line)
    whole: Program = lay(asked).program
    ranks = asked.plan.world_size // asked.plan.mesh.pp
    found = [sum(flops(b, asked.plan.sizes)[k] for k in "FB") for b in whole.blocks]
    return sum(found) * ranks * asked.plan.num_microbatches


@pytest.mark.parametrize("line", WORK)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_work_is_conserved(family, line) -> None:
    spec = model(family, vocab=8, ffn_hidden=4)
    assert total_flops(spec, line) == total_flops(spec, "fp32") > 0


def test_flops_are_the_models_convention() -> None:
    """Every matrix product twice its multiply-adds, attention the full square (model_full)."""
    spec = PUBLISHED["llama3-8b"][0]
    whole = lay(Request(parse("bf16"), spec, 8192))
    forward = sum(flops(b, whole.sizes)["F"] for b in whole.program.blocks)
    assert forward / 8192 == spec.forward_flops_per_token(8192, "model_full")


def test_replay_is_what_recompute_adds() -> None:
    """All of a layer's products but the last, which nothing saves after (2205.05198, sec. 5)."""
    layer = laid(LLAMA, "recompute:full").program.blocks[1]
    work = flops(layer, laid(LLAMA, "fp32").sizes)
    down = next(op for op in layer.ops() if op.name == "mlp.down")
    last = 2 * 4 * 4 * 8 * 5  # 4 samples, 4 tokens, hidden 8, ffn 5
    assert down.flops_per_point == 2
    assert work["replay"] == work["F"] - last
    assert flops(laid(LLAMA, "fp32").program.blocks[1], laid(LLAMA, "fp32").sizes)["replay"] == 0
