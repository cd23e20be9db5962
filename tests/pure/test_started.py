"""What programs of an era start: unfused kernels, casts, experts one by one, biases apart."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from partita.cost.empirical import HOST_S, OLD_UNITS
from partita.cost.kernels import Kernel, kernel_seconds
from partita.cost.machine import machine_of, software_of
from partita.cost.pieces import BACK
from partita.parallel.laid import lay
from partita.simulate.published.recipes import EAGER
from partita.simulate.published.rows import case
from partita.simulate.published.validate import predict, read_rows, score
from partita.simulate.published.works import case_works, lay_case
from partita.simulate.stage import Work, stage_time
from partita.simulate.started import (
    host_seconds,
    kernel_times,
    small_kernels,
    started_kernels,
    unfused_kernels,
)
from partita.simulate.work import block_work

FILE = Path(__file__).parents[2] / "validation" / "measurements.csv"


@pytest.fixture(scope="module")
def rows():
    return read_rows(FILE)


def test_two_heads_a_rank_fall_out_of_the_fused_softmax():
    fused, unfused = Kernel("softmax", 200.0, m=8), Kernel("softmax", 200.0, m=2)
    era = software_of("megatron-deepspeed")
    assert unfused_kernels(fused, "F", era) == (fused,)
    assert unfused_kernels(unfused, "F", software_of("xla")) == (unfused,)
    five = unfused_kernels(unfused, "again", era)
    assert [k.kind for k in five] == ["memory"] * 5
    assert sum(k.bytes for k in five) == 18 * 100  # 16-bit scores: 100 bytes
    back = unfused_kernels(Kernel("softmax", 300.0, m=2), "I", era)
    assert sum(k.bytes for k in back) == 20 * 100


def test_before_fused_kernels_no_softmax_is_one():
    scores = Kernel("softmax", 200.0, m=8)
    assert len(unfused_kernels(scores, "F", software_of("megatron-2019"))) == 5


def test_an_unfused_loss_passes_over_wide_logits():
    """Megatron-LM's mpu/cross_entropy.py: 32 bytes a logit beside maximum and sum, and 14 back."""
    loss = Kernel("loss", 600.0, m=100)
    assert unfused_kernels(loss, "F", software_of("current")) == (loss,)
    era = software_of("megatron-2021")
    assert sum(k.bytes for k in unfused_kernels(loss, "F", era)) == 32 * 100
    assert sum(k.bytes for k in unfused_kernels(loss, "I", era)) == 14 * 100


def test_a_gradient_that_its_matmul_does_not_add_is_a_kernel_more():
    """Megatron-LM of 2021 in 16 bits: two read, one written; DeepSpeed in bf16: a copy in 32 bits, added."""
    weight = Kernel("matmul", 1000.0, m=5, n=4, k=7, count=2, adds=True)
    assert unfused_kernels(weight, "W", software_of("megatron-2022")) == (weight,)
    again = replace(weight, adds=False)
    assert unfused_kernels(again, "W", software_of("megatron-2021")) == (again,)
    for era, moved in (("megatron-2021", 3 * 2), ("deepspeed-bf16", (2 + 4) + (4 + 4 + 4))):
        alone, added = unfused_kernels(weight, "W", software_of(era))
        assert alone.bytes == 1000 - (8 - 2) * 40  # it writes 16 bits, and reads nothing
        assert (added.kind, added.bytes) == ("memory", moved * 40)


def test_gradients_are_laid_for_the_reduction_that_fsdp_makes():
    """FSDP2: 6 bytes a gradient's element, and 4 each way as a gathered weight is laid whole."""
    weight = Kernel("matmul", 1000.0, m=5, n=4, k=7, adds=True)
    _, laid = unfused_kernels(weight, "W", software_of("torchtitan"))
    assert laid.bytes == (6 + 2 * 4) * 5 * 4
    _, laid = unfused_kernels(weight, "W", software_of("mosaic-2023"))
    assert laid.bytes == (4 + 6 + 8) * 5 * 4


def test_eager_programs_start_each_op_of_a_norm_a_rotation_and_a_gate():
    norm, rotation = (
        Kernel("memory", 400.0, pieces=((name, 100.0),)) for name in ("norm", "rotate")
    )
    compiled, eager = software_of("torchtitan"), replace(software_of("torchtitan"), eager=EAGER)
    assert unfused_kernels(norm, "F", compiled) == (norm,)
    assert [k.bytes for k in unfused_kernels(norm, "F", eager)] == [600.0] * 6
    back = replace(norm, pieces=(("norm" + BACK, 100.0),))
    assert sum(k.bytes for k in unfused_kernels(back, "I", eager)) == pytest.approx(7600)
    assert sum(k.bytes for k in unfused_kernels(rotation, "F", eager)) == pytest.approx(2000)
    own = replace(eager, eager=EAGER[1:])
    assert unfused_kernels(norm, "F", own) == (norm,)


def test_a_rows_notes_say_that_nothing_compiles_it(rows):
    """Three rows of torchtitan on A100, whose norm was a kernel of its own; with a compiler it is sooner."""
    row = next(r for r in rows if r["group"] == "titan-2024a100")
    found = case(row)
    assert found.machine().software.eager == EAGER[1:]
    compiled = {**row, "notes": "FSDP2; compile"}
    assert case(compiled).machine().software.eager == ()
    assert predict(case(compiled)) < predict(found)
    told, skipped = score([row, {**compiled, "id": "another"}])
    assert len(told) == 2 and not skipped


def test_every_second_matmul_of_a_layer_is_run_again(rows):
    """selective(op): keys, what attention hands on, and half of the gate's pair (torchtitan's rule)."""
    found = case(next(r for r in rows if r["recompute"] == "selective(op)"))
    works = case_works(found, lay_case(found, found.plan))
    layer = max(works.stages[0].parts, key=lambda p: p.times)
    again = [k for k in layer.work.again if k.kind == "matmul"]
    model = found.model
    assert sorted(k.n for k in again) == sorted((1024, model.hidden, model.ffn_hidden))
    assert not any(k.kind == "attention" for k in layer.work.again)


def test_attention_of_amperes_instructions_is_slow_on_hopper(rows):
    ampere, hopper = (
        case(next(r for r in rows if r["group"] == g)).cluster for g in ("titan-2024a100", "llama3")
    )
    for cluster, share in ((ampere, 1), (hopper, OLD_UNITS)):
        old, new = (machine_of(cluster, era) for era in ("mosaic-2023", "current"))
        assert old.attention_rate == pytest.approx(share * new.attention_rate)
        assert old.rate("bf16") == new.rate("bf16")


def test_what_matmuls_of_8_bits_read_is_cast(rows):
    """Each linear's input forward, what its output is handed backward; as often as its scales need."""
    found = case(next(r for r in rows if r["model_name"] == "LLAMA2-7B"))
    laid, tokens = lay(found.request(found.plan)), found.seq_len
    block, sizes = laid.stages[0].blocks[1], laid.sizes
    work = block_work(block, sizes, "fp8")
    h, f = found.model.hidden, found.model.ffn_hidden
    assert found.model.kv_heads == found.model.heads
    assert sum(k.m for k in work.forward if k.kind == "cast") == tokens * (3 * h + f)
    assert sum(k.m for k in work.input if k.kind == "cast") == tokens * (5 * h + 2 * f)
    assert not any(k.kind == "cast" for k in block_work(block, sizes).forward)
    one = Kernel("cast", 4.0 * 10, m=10)
    assert [k.bytes for k in unfused_kernels(one, "F", software_of("torchtitan"))] == [60]
    by = {(r["precision"], r["gpu_type"]): case(r).machine().software.cast_bytes for r in rows
          if r["group"] == "bridge-26.06" and r["mlp"]}  # fmt: skip
    assert by["fp8-cs", "H100"] == 6
    assert by["fp8-cs", "GB200"] == by["nvfp4", "GB300"] == 5
    assert by["mxfp8", "GB200"] == 4


def test_experts_are_started_one_by_one_where_no_kernel_is_grouped(rows):
    found = case(next(r for r in rows if r["model_name"] == "GPT OSS 120B"))
    one = Kernel("matmul", m=256, n=256, k=256, count=8, each=8)
    old = machine_of(found.cluster, "bridge-2025")
    new = replace(old, software=replace(old.software, starts_each_expert=False))
    assert kernel_seconds(one, old) - kernel_seconds(one, new) == pytest.approx(
        7 * old.constants.launch_s
    )
    laid = lay_case(found, found.plan)
    (part,) = [p for p in case_works(found, laid).stages[0].parts if p.has_experts]
    work = part.work
    halves = work.forward, (*work.input, *work.weight, *work.again)
    more = [old.constants.launch_s * sum(k.each - 1 for k in ks) for ks in halves]
    slow = replace(old.software, host_s=1e-5)
    each, grouped = (
        stage_time(
            Work((replace(part, times=1.0),), (), Counter()), laid, replace(old, software=era)
        )
        for era in (slow, replace(slow, starts_each_expert=False))
    )
    starts = [a - b for a, b in zip(each.calls_s, grouped.calls_s, strict=True)]
    assert starts == pytest.approx(more) and min(more) > 0  # the host starts them too, once each


def test_a_kernel_of_experts_that_activates_writes_what_the_next_one_reads(rows):
    """TransformerEngine's fused grouped MLP: neither the activation nor the cast of what it made is left,
    forward and backward; what is no expert's stays."""
    found = case(next(r for r in rows if r["group"] == "bridge-26.08" and r["experts"]))
    era, work = found.machine().software, block_of_experts(found)
    apart = replace(era, fuses_experts=False)
    for part, kernels in (("F", work.forward), ("I", work.input)):
        fused, each = (started_kernels(kernels, part, e) for e in (era, apart))
        assert [k for k in fused if not k.routed] == [k for k in each if not k.routed]
        gone = [k.kind for k in each if k.routed and k not in fused]
        casts = [[k.kind for k in ks if k.routed].count("cast") for ks in (fused, each)]
        assert gone == ["memory", "cast"] and casts == [1, 2]
    assert started_kernels(work.weight, "W", era) == started_kernels(work.weight, "W", apart)


def block_of_experts(found):
    works = case_works(found, lay_case(found, found.plan))
    return next(p.work for s in works.stages for p in s.parts if p.has_experts)


def test_a_graph_of_layers_leaves_what_lies_between_router_and_sum_to_the_host(rows):
    """Megatron-Bridge's cuda_graph_scope attn, moe_router, moe_preprocess; full_iteration in mxfp8
    from 26.06 on."""
    eras = {
        (r["group"], r["gpu_type"]): case(r).machine()
        for r in rows
        if r["model_name"] == "Qwen3_30B_a3B" and r["mlp"] and r["group"] != "bridge-skill"
    }
    for old in (("bridge-26.04", "GB300"), ("bridge-26.06", "H100")):
        assert eras[old].software.starts_experts and eras[old].software.starts_each_expert
    new = eras["bridge-26.08", "GB300"].software
    assert not (new.starts_experts or new.starts_each_expert)
    machine = eras["bridge-26.06", "H100"]
    inside, outside = Kernel("memory", routed=True), Kernel("memory")
    assert host_seconds(inside, machine) == HOST_S and host_seconds(outside, machine) == 0
    eight = replace(inside, kind="matmul", each=8)
    assert host_seconds(eight, machine) == pytest.approx(HOST_S + 7 * machine.constants.launch_s)
    era = replace(machine.software, experts=2.0)
    assert (kernel_times(inside, era), kernel_times(eight, era), kernel_times(outside, era)) == (
        2,
        1,
        1,
    )


def test_experts_with_biases_hand_back_more_slowly(rows):
    """68 bytes an element of what experts hand back: each of 4 tokens' 4 rows, 36 layers."""
    row = next(r for r in rows if r["model_name"] == "GPT OSS 120B" and r["precision"] == "bf16")
    found = case(row)
    laid = lay_case(found, found.plan)
    plain, with_ = (
        case_works(replace(found, biased=b), laid).stages[0].parts for b in (False, True)
    )
    moved = 0.0
    for a, b in zip(plain, with_, strict=True):
        kernels = [(*p.work.forward, *p.work.input) for p in (a, b)]
        moved += a.times * (sum(k.bytes for k in kernels[1]) - sum(k.bytes for k in kernels[0]))
    elements = found.seq_len * found.micro_batch_size * found.model.top_k * found.model.hidden
    assert moved == pytest.approx(68 * elements * found.model.layers)
    assert found.biased and predict(found) > predict(replace(found, biased=False))


def test_kernels_of_megatron_core_that_nothing_captures_take_the_host(rows):
    """Counted for experts and latent attention alone; a recipe's graph takes them and every other start."""
    moonlight = next(r for r in rows if r["model_name"].startswith("Moonlight"))
    found = case(moonlight)
    era = found.machine().software
    assert era.small_kernels and era.host_s == HOST_S
    laid = lay(found.request(found.plan))
    _, dense, sparse, *_ = laid.stages[0].blocks  # the first layer has no experts
    assert small_kernels(dense) == (25, 25)  # latent, without experts
    assert small_kernels(sparse) == (97, 62)
    slow = predict(found)
    row = {**moonlight, "group": "nemo-grok-25.05", "model_name": "Grok", "gpu_type": "GB200"}
    captured = case(row).machine().software
    assert (captured.small_kernels, captured.host_s) == (False, 0.0)
    assert slow > 27 * (97 + 62) * HOST_S  # of its layers, all but one have experts
