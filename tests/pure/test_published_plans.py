"""Every preset at a plan that it was, or can be, trained with: legal, and three ranks read in a second."""

from __future__ import annotations

import pytest
from took import least_seconds

from partita.parallel.laid import Request, lay, problems
from partita.parallel.read import flops, kept_bytes, state_bytes
from partita.spec.model import ModelSpec
from partita.spec.plan_text import parse

ONE_BOX = "dp_shard8.zero3 bf16"
PUBLISHED = {
    "llama3-405b": "pp16:interleaved_1f1bx4/16mb tp8+sp dp_shard128.zero1 bf16",  # 16,384 H100
    "llama3-70b": "pp4/16mb tp8+sp dp_shard8.zero1 bf16",
    "llama3-8b": ONE_BOX,
    "llama2-70b": "pp4/16mb tp8+sp dp_shard8.zero1 bf16",
    "gpt3-175b": "pp8:interleaved_1f1bx12/64mb tp8+sp recompute:selective bf16",  # 2205.05198
    "megatron-8.3b": "tp8 dp_replicate64 fp16",  # 1909.08053: 512 V100
    "mt-nlg-530b": "pp35/30mb tp8 dp_replicate8 recompute:full bf16",  # 2201.11990: 2,240 A100
    "gpt-neox-20b": "pp4/32mb tp2 dp_shard12.zero1 fp16",  # 2204.06745: 96 A100
    "bloom-176b": "pp12/64mb tp4 dp_shard8.zero1 bf16",  # 2211.05100: 384 A100
    "switch-base-128": "dp_shard32.zero0 ep32 bf16",  # 2101.03961: experts over data parallelism alone
    "switch-large-128": "dp_shard32.zero0 ep32 bf16",
    "switch-xxl-128": "dp_shard64.zero1 tp8+sp ep64 bf16",
    "switch-c-2048": "dp_shard2048.zero1 ep2048 bf16",
    "mixtral-8x7b": "tp2+sp dp_shard16.zero1 ep8 bf16",
    "deepseek-v2": "pp16:zb_h1/32mb dp_shard8.zero1 ep8 bf16",  # 2405.04434
    "deepseek-v3": "pp16:dualpipe/32mb dp_shard128.zero1 ep64 fp8",  # 2412.19437: 2,048 H800
    "qwen3-235b-a22b": "pp8/32mb tp4+sp dp_shard16.zero1 ep16 bf16",
    "qwen3-30b-a3b": "dp_shard16.zero1 ep8 bf16",
    "qwen2-72b": "pp4/16mb tp8+sp dp_shard8.zero1 bf16",
    "alexnet": "split2",  # 2012: two GTX 580
    "tiny": "2mb",
    "quickstart": "pp2:1f1b/16mb tp2+sp",
}


@pytest.mark.parametrize("name", ModelSpec.preset_names())
def test_a_preset_at_its_plan(name: str) -> None:
    assert least_seconds(lambda: laid_and_read(name), 1) < 1


def laid_and_read(name: str) -> None:
    model = ModelSpec.from_preset(name)
    seq_len = 1 if model.image is not None else min(model.max_seq_len, 4096)
    asked = Request(parse(PUBLISHED.get(name, ONE_BOX)), model, seq_len)
    assert [p for p in problems(asked) if p.severity == "error"] == []
    laid = lay(asked)
    for rank in {0, laid.mesh.world_size // 2, laid.mesh.world_size - 1}:
        assert all(line.bytes > 0 for line in laid.traffic(rank))
        stages = laid.stages_of(laid.mesh.coords(rank)["pp"])
        blocks = {id(b): b for s in stages for b in s.blocks}.values()
        assert sum(sum(flops(b, laid.sizes).values()) for b in blocks) > 0
        assert sum(
            kept_bytes(b, laid.sizes) + sum(state_bytes(b, laid.sizes).values()) for b in blocks
        )
    assert laid.program.parameters() == model.parameters()


def test_every_published_plan_is_of_a_preset() -> None:
    assert set(PUBLISHED) <= set(ModelSpec.preset_names())
