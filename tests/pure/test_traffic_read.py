"""What is read off a laid program beside published numbers: activations, traffic, states.

Korthikanti et al. 2022 (2205.05198): bytes a layer keeps, table 2; Megatron-LM (1909.08053): two
all-reduces a layer and direction, a loss that never gathers logits; ZeRO (1910.02054): 16 bytes a parameter.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from partita.parallel.laid import Laid, Request, lay
from partita.parallel.read import flops, kept_bytes, state_bytes, traffic
from partita.simulate.memory import lent_parts
from partita.spec.cluster import Cluster
from partita.spec.model import ModelSpec
from partita.spec.plan_text import parse

SEQ = 2048
SIZES = {6144: 64, 12288: 96, 20480: 128, 25600: 160}  # hidden -> heads, 22B to 1T


def lent_bytes(*of) -> int:
    """Whole units of a stage beyond what is stored."""
    return sum(lent_parts(*of).values())


def gpt(hidden: int, dropout: float = 0.1) -> ModelSpec:
    return ModelSpec(
        family="gpt2", layers=2, hidden=hidden, heads=SIZES[hidden], vocab=51200,
        max_seq_len=SEQ, dropout=dropout,
    )  # fmt: skip


LLAMA8 = ModelSpec(
    family="llama", layers=32, hidden=4096, heads=32, kv_heads=8, ffn_hidden=14336, vocab=128256,
    max_seq_len=8192,
)  # fmt: skip


def sent(whole: Laid, prefix: str, rank: int = 0) -> Counter:
    """(axis, op, phase) -> bytes, and with 'calls' behind it the number, of sites under a prefix."""
    found: Counter = Counter()
    for t in whole.traffic(rank):
        if t.site.startswith(prefix):
            found[t.axis, t.op, t.phase] += t.bytes
            found[t.axis, t.op, t.phase, "calls"] += t.count
    return found


KORTHIKANTI = {
    "bf16": lambda x, t: 34 + x,
    "tp8 bf16": lambda x, t: 10 + 24 / t + x / t,
    "tp8+sp bf16": lambda x, t: (34 + x) / t,
    "tp8 recompute:selective bf16": lambda x, t: 10 + 24 / t,
    "tp8+sp recompute:selective bf16": lambda x, t: 34 / t,
    "recompute:full bf16": lambda x, t: 2,
    "tp8 recompute:full bf16": lambda x, t: 2,
    "tp8+sp recompute:full bf16": lambda x, t: 2 / t,
}


@pytest.mark.parametrize("line", KORTHIKANTI)
@pytest.mark.parametrize("hidden", SIZES)
def test_korthikanti_activation_bytes(hidden, line) -> None:
    """Of s*b*h: 34 + 5as/h; /t by tensor and by sequence parallelism; 2 with full recompute."""
    whole = lay(Request(parse(line), gpt(hidden), SEQ, 4))
    got = kept_bytes(whole.program.blocks[1], whole.sizes) / (4 * SEQ * hidden)
    want = KORTHIKANTI[line](5 * SIZES[hidden] * SEQ / hidden, whole.sizes["tp"])
    assert got == pytest.approx(want, rel=1e-12)


def test_tp_is_two_all_reduces_a_layer_and_direction() -> None:
    x = 2 * SEQ * 6144  # bytes of one b*s*h tensor
    got = sent(lay(Request(parse("tp8 bf16"), gpt(6144), SEQ)), "blocks.1.")
    assert got == {
        ("tp", "all_reduce", phase, *more): 2 if more else 2 * x
        for phase in "FB"
        for more in ((), ("calls",))
    }


def test_sp_moves_the_same_and_gathers_again_for_weights() -> None:
    x, t = 2 * SEQ * 6144, 8
    line = "tp8+sp bf16 data.bucket_bytes=1"  # every block's small reduction by itself
    got = sent(lay(Request(parse(line), gpt(6144), SEQ)), "blocks.1.")
    assert got["tp", "reduce_scatter", "F"] == got["tp", "reduce_scatter", "B"] == 2 * x
    assert got["tp", "all_gather", "F"] == 2 * x / t
    assert got["tp", "all_gather", "B"] == 4 * x / t  # two of the four gather saved shards again
    assert got["tp", "all_reduce", "step"] == 4 * 6 * 6144  # two norms and two row biases, fp32
    assert sum(v for k, v in got.items() if "calls" in k) == 2 + 2 + 2 + 4 + 1


def test_full_recompute_moves_forward_again() -> None:
    """All but the last reduction of a layer: its sum is not needed again."""
    for line, again in (("tp8 bf16", 1), ("tp8+sp bf16", 3)):
        plain, full = (
            sent(lay(Request(parse(f"{line}{more}"), gpt(6144), SEQ)), "blocks.1.")
            for more in ("", " recompute:full")
        )
        calls = {p: sum(v for k, v in s.items() if k[2] == "B" and "calls" in k)
                 for p, s in (("plain", plain), ("full", full))}  # fmt: skip
        assert calls["full"] - calls["plain"] == again
        assert {k: v for k, v in plain.items() if k[2] == "F"} == {
            k: v for k, v in full.items() if k[2] == "F"
        }


def test_what_replayed_regions_brought_may_be_kept() -> None:
    """Memory for traffic: nothing is sent again, and each result is one more tensor."""
    for line in ("tp8 bf16", "tp8+sp bf16"):
        plain, kept = (
            lay(Request(parse(f"{line}{more}"), gpt(6144), SEQ))
            for more in ("", " recompute:full recompute.collectives=keep")
        )
        assert sent(plain, "blocks.1.") == sent(kept, "blocks.1.")
    experts = replace(LLAMA8, experts=8, top_k=2, expert_ffn_hidden=1024, capacity_factor=1.25)
    for line in (
        "cp4:ring",
        "cp4:ulysses tp2+sp",
        "cp8:hybrid4x2",
        "cp2:all_gather",
        "cp2 dp4 tp2+sp ep4 etp2",
    ):
        plain, again, held = (
            lay(Request(parse(f"{line} bf16{more}"), experts if "ep" in line else LLAMA8, SEQ))
            for more in ("", " recompute:full", " recompute:full recompute.collectives=keep")
        )
        assert sent(plain, "blocks.1.") == sent(held, "blocks.1.") != sent(again, "blocks.1."), line
    x = 2 * SEQ * 6144
    brought = kept_bytes(kept.program.blocks[1], kept.sizes) - x / 8
    assert brought == 2 * x + x / 8  # two gathered tensors, one scattered


def test_every_other_layer_is_made_again() -> None:
    whole = lay(Request(parse("recompute:full recompute.every=2"), LLAMA8, 8192))
    some = [b.kept == {b.input} for b in whole.program.blocks[1:-1]]
    assert some == [True, False] * 16


@pytest.mark.parametrize("line", ["tp8 bf16", "tp8+sp bf16"])
def test_vocab_parallel_loss(line) -> None:
    """Three reductions of 4 b s bytes, none in backward: logits never travel."""
    got = sent(lay(Request(parse(line), LLAMA8, 8192, 2)), "head.loss")
    small = 4 * 2 * 8192
    assert got == {("tp", "all_reduce", "F"): 3 * small, ("tp", "all_reduce", "F", "calls"): 3}


def test_data_parallel_reduces_each_gradient_once_a_step() -> None:
    for mb in (1, 4):
        whole = lay(Request(parse(f"dp_replicate8 pp1/{mb}mb bf16"), LLAMA8, 8192))
        got = sent(whole, "")
        assert got.pop(("dp_replicate", "all_reduce", "step")) == 4 * LLAMA8.parameters() + 2 * 8
        assert got.pop(("dp_replicate", "all_reduce", "step", "calls")) == 1 + 32 + 1 + 2
        assert not got


def test_neighbours_share_a_unit_as_long_as_its_gradient_fits_a_bucket() -> None:
    """Head and table, larger than a bucket, are alone; layers pair while two of them fit to the byte."""
    layer = 4 * (LLAMA8.parameters() - 2 * 128256 * 4096 - 4096) // 32
    for most, each in ((2 * layer, 2), (2 * layer - 1, 1), (layer // 2, 1)):
        whole = lay(Request(parse(f"dp_replicate8 bf16 data.bucket_bytes={most}"), LLAMA8, 8192))
        layers = [sum(n.endswith(".attention.wq") for n, *_ in u.weights) for u in whole.units(0)]
        assert layers == [0, *[each] * (32 // each), 0]


@pytest.mark.parametrize(("words", "phase", "count"), [
    ("zero3", "F", (2, 64, 2)), ("zero3", "B", (0, 64, 2)), ("zero1", "step", (1, 32, 1)),
    ("zero3 data.reshard_after_forward=false", "step", (1, 32, 1)),
])  # fmt: skip
def test_no_gather_is_needless(words, phase, count) -> None:
    """Of two microbatches: the table is looked up in forward alone, layers and head multiply in both."""
    whole = lay(Request(parse(f"dp_shard8.{words} bf16 2mb data.bucket_bytes=1"), LLAMA8, 8192))
    found = [t for t in whole.traffic(0) if t.site.endswith(":gather") and t.phase == phase]
    by_block = [
        sum(t.count for t in found if t.site.startswith(b)) for b in ("embedding", "blocks", "head")
    ]
    assert by_block == list(count)


def test_pipeline_sends_the_cut_activation() -> None:
    x = 2 * 8192 * 4096
    for line, size in (("pp4/8mb bf16", x), ("pp4/8mb tp2+sp bf16", x // 2)):
        whole = lay(Request(parse(line), LLAMA8, 8192))
        for stage in range(4):
            got = sent(whole, "", whole.mesh.rank_of({"pp": stage}))
            assert got["pp", "send", "F"] == (8 * size if stage < 3 else 0)
            assert got["pp", "send", "B"] == (8 * size if stage > 0 else 0)


def test_tied_stages_add_up_one_table() -> None:
    whole = lay(Request(parse("pp2/2mb tp2 bf16"), gpt(6144), SEQ))
    for rank in range(4):
        tied = [t for t in whole.traffic(rank) if t.axis == "tied"]
        assert [(t.op, t.phase, t.count, t.bytes) for t in tied] == [
            ("all_reduce", "step", 1, 4 * 51200 * 6144 // 2)
        ]


@pytest.mark.parametrize(("dtype", "words", "each"), [("fp32", 2, 16), ("bf16", 2, 18), ("fp64", 2, 32),
                                                      ("bf16", 1, 14), ("fp32", 0, 8)])  # fmt: skip
def test_bytes_a_parameter(dtype, words, each) -> None:
    for spec, line in ((LLAMA8, dtype), (gpt(6144), f"pp1 {dtype}"), (gpt(6144), f"tp8 {dtype}")):
        whole = lay(Request(parse(line), spec, 64, 1, words))
        blocks = [b for s in whole.stages for b in s.blocks]
        got = sum(sum(state_bytes(b, whole.sizes).values()) for b in blocks)
        held = sum(w.local(whole.sizes) for u in whole.units(0) for _, w, _ in u.weights)
        assert got == each * held
        assert held == spec.parameters() or "tp8" in line


def test_kv_heads_shared_by_ranks_cost_a_small_reduction() -> None:
    """8 kv heads on tp16: neighbours hold one head each, and add its gradient up."""
    whole = lay(Request(parse("tp16 bf16 data.bucket_bytes=1"), LLAMA8, 8192))
    got = sent(whole, "blocks.0.unit")
    head = 128 * 4096
    assert got["tp/share", "all_reduce", "step"] == 4 * 2 * head
    assert sent(lay(Request(parse("tp8 bf16"), LLAMA8, 8192)), "blocks.0.unit") == {}


def test_flops_follow_6nd() -> None:
    """6 a parameter and token, embedding's table left out, attention on top (Kaplan et al. 2020)."""
    whole = lay(Request(parse("bf16"), LLAMA8, 64))
    total = sum(sum(flops(b, whole.sizes).values()) for b in whole.program.blocks) / 64
    matmul = LLAMA8.parameters() - LLAMA8.vocab * LLAMA8.hidden - 65 * LLAMA8.hidden
    attention = 3.5 * 4 * 64 * 4096 * 32  # flash: 2 matmuls forward, 5 backward
    assert total == pytest.approx(6 * matmul + attention, rel=1e-12)


def test_side_by_side_attention_and_mlp_are_reduced_once() -> None:
    """GPT-NeoX's parallel residual: one sum of both forward; backward one a norm, whose weights' gradients
    are of whole ones. Under sp one scatter forward, one gather of its gradient backward."""
    for beside, want in ((False, (2, 2, 4, 6)), (True, (1, 2, 3, 5))):
        spec = ModelSpec(
            family="gpt_neox", layers=1, hidden=64, heads=4, vocab=256, max_seq_len=64,
            parallel_residual=beside,
        )  # fmt: skip
        found = []
        for plan in ("tp2", "tp2+sp"):
            laid = lay(Request(parse(plan), spec, 64))
            calls = traffic(laid.stages[0].blocks[1], laid.sizes)
            found += [sum(c.phase == phase for c in calls) for phase in "FB"]
        assert tuple(found) == want, beside


def test_zero_holds_whole_units_for_a_while() -> None:
    """Stage 3: 1 + prefetch blocks' bf16 weights and two fp32 gradients (one, where nothing is fetched
    ahead); without resharding all weights."""
    layer = (LLAMA8.parameters() - 2 * LLAMA8.vocab * LLAMA8.hidden - LLAMA8.hidden) // 32
    ends = LLAMA8.vocab * LLAMA8.hidden
    one, two = ends + LLAMA8.hidden, 2 * ends + LLAMA8.hidden
    for more, held, made in (
        ("", 2 * (one + layer), two), (" data.prefetch=0", 2 * one, one),
        (" data.reshard_after_forward=false", 2 * LLAMA8.parameters(), two),
    ):  # fmt: skip
        request = Request(parse(f"dp_shard8.zero3 bf16{more}"), LLAMA8, 64)
        laid = lay(request)
        assert lent_bytes(laid, laid.stages[0].blocks) == held + 4 * made
    request = Request(parse("dp_shard8.zero1 bf16"), LLAMA8, 64)
    laid = lay(request)
    assert lent_bytes(laid, laid.stages[0].blocks) == 0


def test_through_a_host_s_memory_nothing_is_lent_ahead() -> None:
    """CPU ranks of one host gather and reduce a block of more than a chunk when they must (Comm.moves); of
    two hosts, or where a rank hands in less, one is on its way."""
    laid = lay(Request(parse("dp_shard2.zero3"), LLAMA8, 64))
    blocks = laid.stages[0].blocks
    least = lay(Request(parse("dp_shard2.zero3 data.prefetch=0"), LLAMA8, 64))
    host = Cluster.load({"preset": "laptop", "devices": 2})
    hosts = Cluster.load({"preset": "laptop", "devices": 2, "devices_per_node": 1})
    assert lent_bytes(laid, blocks, host) == lent_bytes(least, least.stages[0].blocks)
    assert (
        lent_bytes(laid, blocks, hosts) == lent_bytes(laid, blocks) > lent_bytes(laid, blocks, host)
    )
    tiny = lay(Request(parse("dp_shard2.zero3"), ModelSpec.load({"preset": "tiny"}), 64))
    assert lent_bytes(tiny, tiny.stages[0].blocks, host) == lent_bytes(tiny, tiny.stages[0].blocks)
