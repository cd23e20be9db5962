"""AlexNet as numbers and as a Program; the split of its channels in exact arithmetic, and its traffic."""

from dataclasses import replace

import pytest
from executed import change_region, found_wrong, request
from executed import difference as difference_from_one

from partita.base.errors import UsageError
from partita.parallel.cp import halo
from partita.parallel.cp.halo import Window
from partita.parallel.exact.execute import execute
from partita.parallel.laid import Request, lay, problems
from partita.parallel.read import flops, gradient_axes
from partita.simulate.predict import simulate
from partita.simulate.work import block_work
from partita.spec.families import program
from partita.spec.job import Job
from partita.spec.model import ModelSpec
from partita.spec.plan import Plan

ALEXNET = ModelSpec.from_preset("alexnet")
SMALL = ModelSpec.from_toml(
    {
        "family": "alexnet", "hidden": 8, "vocab": 5, "dropout": 0.2,
        "image": {
            "size": 6, "colors": 2, "channels": [8, 8, 8, 8], "kernels": [3, 2, 2, 1], "strides": [1] * 4,
            "paddings": [1, 0, 0, 0], "joins": [3], "norms": [1, 2], "pools": [2], "groups": 4, "dense": 1,
        },
    }
)  # fmt: skip


def laid(line):
    return lay(replace(request(SMALL, line), seq_len=1))


def test_alexnet_has_the_published_size():
    """60,965,224 parameters with two groups, 62,378,344 with one (Caffe's), 724 M multiply-adds."""
    assert ALEXNET.parameters() == 60_965_224
    made = program(ALEXNET, 2)
    assert made.parameters() == 60_965_224
    assert ALEXNET.forward_flops_per_token(1) == 2 * 724_406_816
    assert sum(flops(b, {})["F"] for b in made.blocks) == 2 * 2 * 724_406_816
    alone = ModelSpec.from_toml({"preset": "alexnet", "image": {"groups": 1}})
    assert alone.parameters() == 62_378_344
    assert ModelSpec.from_toml(ALEXNET.to_toml()) == ALEXNET


PLANS = (
    "2mb", "split2", "split4", "split2 dp_replicate2", "split2 2mb recompute:full", "split2 dp_shard2.zero3",
    "split4 2mb recompute:full recompute.collectives=keep", "pp2/2mb split2",
    "pp2:zb_h1/2mb split2 dp_shard2.zero2",
    "pp2:dualpipe/4mb split2",
    "tp2", "2mb tp2 split2", "split4 tp2 dp_replicate2", "tp2 2mb recompute:full dp_shard2.zero3",
    "tp2 2mb recompute:full recompute.collectives=keep", "pp2:zb_h1/2mb tp2 split2 dp_shard2.zero2",
    "cp2:halo", "cp3:halo 2mb recompute:full dp_shard2.zero2", "cp2:halo tp2 split2 2mb", "cp8:halo",
    "cp2:halo 2mb recompute:full recompute.collectives=keep split2", "pp2:zb_h1/2mb cp4:halo dp_shard2.zero3",
)  # fmt: skip


@pytest.mark.parametrize("line", PLANS)
def test_a_split_equals_one_device_exactly(line):
    whole = laid(line)
    got = execute(whole)
    assert difference(got) == ""
    for rank in range(whole.mesh.world_size):
        assert got.traffic[rank] == whole.traffic(rank)


def difference(got):
    return difference_from_one(SMALL, got, 2)


@pytest.mark.parametrize("line, some", [
    (
        "split2 dp_replicate2 2mb",
        {"conv.join:gather_from", "dense.join:gather_from", "head.project:reduce_from"},
    ),
    ("cp3:halo", {"input:halo", "conv.response:halo", "conv.join:halo", "input:gather_map"}),
])  # fmt: skip
def test_no_region_can_be_left_out(line, some):
    whole = laid(line)
    blocks = [b for s in whole.stages for b in s.blocks]
    sites = {
        (b.name, op.name): (b.name, op)
        for b in blocks
        for op in (*b.ops(), *b.regions)
        if op.is_region
    }
    assert {op.name for _, op in sites.values()} >= some
    for site in sites.values():
        silent = replace(site[1], events=())
        assert found_wrong(SMALL, change_region(whole, site, (silent,))), site[1].name


def test_traffic_is_what_the_paper_moves():
    """Halves meet behind conv 2, before each fully connected layer, and at the classes; nowhere else."""
    line, batch = "split2 fp32", 128
    whole = lay(Request(Plan.parse(line), ALEXNET, 1, batch))
    lines = {(t.site, t.op, t.phase): t.bytes for t in whole.traffic(0) if t.phase in "FB"}
    conv2, conv5 = 13 * 13 * 256, 6 * 6 * 256
    met = {"blocks.1.conv.join": conv2, "blocks.4.dense.join": conv5, "blocks.5.dense.join": 4096}
    want = {}
    for site, whole_size in met.items():
        want[f"{site}:gather_from", "all_gather", "F"] = batch * whole_size // 2 * 4
        want[f"{site}:gather_from", "reduce_scatter", "B"] = batch * whole_size * 4
    want["head.project:reduce_from", "all_reduce", "F"] = batch * 1000 * 4
    assert lines == want


def test_traffic_of_tp_is_what_the_page_says():
    """Every layer's input, and what norms look around in; the loss's three numbers an image."""
    batch, found = 128, {}
    whole = lay(Request(Plan.parse("tp2 fp32"), ALEXNET, 1, batch))
    for t in (t for t in whole.traffic(0) if t.phase in "FB"):
        site, _, kind = t.site.rpartition(":")
        found[site, kind, t.op] = t.bytes // batch // 4
    inputs = [96 * 27**2, 256 * 13**2, 384 * 13**2, 384 * 13**2, 256 * 6**2, 4096, 4096]
    at = [
        *(f"blocks.{i}.input" for i in range(6)),
        "head.input",
        "embedding.relu",
        "blocks.0.conv.relu",
    ]
    want = {}
    for site, size in zip(at, [*inputs, 96 * 55**2, 256 * 27**2], strict=True):
        want[site, "gather_from", "all_gather"] = size // 2
        want[site, "gather_from", "reduce_scatter"] = size
    want |= {(f"head.loss.{x}", "reduce_from", "all_reduce"): 1 for x in ("max", "sum", "pick")}
    assert found == want
    assert sum(n for (_, _, op), n in found.items() if op == "reduce_scatter") == 737_472


def test_a_plan_is_judged_and_refused_in_words():
    job = Job.of("alexnet", "laptop", "split2 2mb", global_batch_size=8, seq_len=1)
    found = simulate(job)
    assert found.step_time_s and found.ledgers[0].peak_bytes > 60e6 * 16 / 2
    blocks = [block_work(b, found.laid.sizes) for b in found.laid.program.blocks]
    matmuls = [k for w in blocks for k in w.forward if k.kind == "matmul"]
    assert (
        sum(2 * k.m * k.n * k.k * k.count for k in matmuls) == 4 * 724_406_816
    )  # half of 8 images
    assert 0 < found.mfu < 1
    wrong = problems(Request(Plan.parse("split4 cp2:ring ep2"), ALEXNET, 1))
    assert {p.rule for p in wrong} >= {"groups", "axes", "method"}
    assert next(p for p in wrong if p.room == "cp").nearest == "cp2:halo ep2 split4"
    (wide,) = problems(Request(Plan.parse("tp3 split2"), ALEXNET, 1))
    assert (wide.room, wide.rule, wide.nearest) == ("tp", "channels", "tp2 split2")
    assert "128 channels a group of convolution 2" in wide.message
    for line, nearest in (("tp2+sp", "tp2"), ("tp2+sp cp2:halo", "cp2:halo tp2")):
        (tokens,) = problems(Request(Plan.parse(line), ALEXNET, 1))
        assert tokens.room == "sp" and "one place" in tokens.message and tokens.nearest == nearest
    llama = problems(Request(Plan.parse("split2"), ModelSpec.from_preset("tiny"), 8))
    assert llama[0].nearest == "1mb" and "channels" in llama[0].message
    long = Job.of("alexnet", "laptop", "split2", global_batch_size=8, seq_len=2)
    assert "one label" in simulate(long).verdict


@pytest.mark.parametrize(
    "changed",
    [
        {"channels": [6, 8, 8, 8]}, {"joins": [5]}, {"size": 2}, {"kernels": [3]}, {"groups": 3},
    ],
)  # fmt: skip
def test_sizes_that_cannot_be_are_refused(changed):
    table = SMALL.to_toml()
    with pytest.raises(UsageError, match="image"):
        ModelSpec.from_toml({**table, "image": {**table["image"], **changed}})


LOW = replace(SMALL, lora_rank=2, lora_targets=("linear",), lora_dropout=0.5)
BOTH = replace(LOW, lora_targets=("linear", "kernel"))


@pytest.mark.parametrize("line, model", [
    ("split2 2mb", LOW), ("tp2 dp_shard2.zero3", LOW), ("pp2:zb_h1/2mb tp2 split4", LOW),
    ("tp2 split2", BOTH), ("cp3:halo dp_shard2.zero2", BOTH), ("pp2:zb_h1/2mb cp2:halo split2", BOTH),
])  # fmt: skip
def test_lora_equals_one_device_exactly(line, model):
    whole = lay(replace(request(model, line), seq_len=1))
    got = execute(whole)
    assert difference_from_one(model, got, 2) == ""
    for rank in range(whole.mesh.world_size):
        assert got.traffic[rank] == whole.traffic(rank)


def test_adapters_are_counted_and_lie_as_their_linears():
    """A of 4 features of conv 4 a group, B of 8 units: both times the rank; A is whole on split and on tp."""
    assert LOW.parameters() - SMALL.parameters() == 2 * (LOW.image.features + 8)
    assert program(LOW, 1).parameters() == LOW.parameters()
    whole = lay(replace(request(LOW, "tp2 split2"), seq_len=1))
    layer = next(b for b in whole.program.blocks if "dense.linear" in b.tensors)
    a, b = (layer.tensors[f"dense.linear_lora_{x}"] for x in "ab")
    assert a.axes() == set() and b.axes() == {"tp", "split"}


def test_adapters_of_convolutions_are_counted_and_lie_as_their_kernels():
    """A of 2 colors and 9 places for all groups; of a group's own 2 channels and 4 places; of all groups' at
    the join. B is a number for each filter. Rows on cp make each gradient a partial sum; of A that groups
    share split and tp do too, of a group's own only tp."""
    sizes = 2 * 9 + 8, 4 * 2 * 4 + 8, 4 * 2 * 4 + 8, 4 * 2 + 8
    assert BOTH.parameters() - LOW.parameters() == 2 * sum(sizes)
    whole = lay(replace(request(BOTH, "tp2 split2 cp2:halo"), seq_len=1))
    own, shared = (b.tensors for b in whole.program.blocks[1:3])
    for tensors, axes in ((own, {"split"}), (shared, set())):
        a, b = (tensors[f"conv.kernel_lora_{x}"] for x in "ab")
        assert a.axes() == axes and b.axes() == {"tp", "split"}
    partial = [
        {n: gradient_axes(b, t, whole.sizes) for n, t in b.tensors.items() if "lora" in n}
        for b in whole.program.blocks[1:3]
    ]
    assert set(partial[0]["conv.kernel_lora_a"]) == {"cp", "tp"}
    assert set(partial[1]["conv.kernel_lora_a"]) == {"cp", "tp", "split"}
    assert set(partial[1]["conv.kernel_lora_b"]) == {"cp"}


def test_halos_of_alexnet_are_what_the_page_says():
    """Two ranks: 55, 27 and 13 rows lie 28 + 27, 14 + 13 and 7 + 6. Pooling 1 makes 14 + 13 rows of 29 + 27,
    pooling 2 7 + 6 of 15 + 13, pooling 5 3 + 3 of 7 + 7; conv 2 sees two rows beyond the seam, conv 3 to 5
    one."""
    whole = lay(Request(Plan.parse("cp2:halo fp32"), ALEXNET, 1, 1))
    rows = {
        "embedding.response": (96 * 55, 0, 1), "blocks.0.input": (96 * 27, 2, 2),
        "blocks.0.conv.response": (256 * 27, 0, 1), "blocks.1.conv.join": (256 * 13, 1, 1),
        "blocks.2.input": (384 * 13, 1, 1), "blocks.3.input": (384 * 13, 1, 1),
        "blocks.3.conv.relu": (256 * 13, 1, 0),
    }  # fmt: skip
    for rank in (0, 1):
        found = {
            (t.site.rpartition(":")[0], t.phase): t.bytes
            for t in whole.traffic(rank) if t.op == "all_to_all"
        }  # fmt: skip
        want = {}
        for site, (row, down, up) in rows.items():
            sends = (down, up) if rank == 0 else (up, down)
            want |= {(site, p): row * n * 4 for p, n in zip("FB", sends, strict=True)}
        assert found == want
        (whole_map,) = (t for t in whole.traffic(rank) if t.op == "all_gather")
        assert (whole_map.site, whole_map.bytes) == ("blocks.4.input:gather_map", 3 * 6 * 256 * 4)


@pytest.mark.parametrize(
    "size, kernel, stride, padding", [(27, 3, 2, 0), (9, 5, 2, 3), (2, 3, 1, 2)]
)
@pytest.mark.parametrize("ways", [2, 5, 4096])
def test_rows_moved_are_counted_in_steps_as_many_as_rows(
    size, kernel, stride, padding, ways, monkeypatch
):
    """What every pair of ranks exchanges, added up; however wide cp is, pairs without rows are not asked."""
    w = Window(size, (size + 2 * padding - kernel) // stride + 1, kernel, stride, padding, ways)
    near = range(min(ways, 40))  # beyond the image nobody holds or makes a row
    pairs = {(a, b): len(w.sends(a, b)) for a in near for b in near}
    asked, sends = [], Window.sends
    monkeypatch.setattr(Window, "sends", lambda *at: asked.append(at) or sends(*at))
    halo._moved.cache_clear()
    assert [w.sent(r) for r in near] == [sum(pairs[r, b] for b in near) for r in near]
    assert [w.received(r) for r in near] == [sum(pairs[a, r] for a in near) for r in near]
    assert w.sent(ways) == w.received(ways) == 0
    assert len(asked) <= (size + 2 * padding) * kernel
