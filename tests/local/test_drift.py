"""Program and torch must not drift: kept storages, FLOPs, weights and traffic, without tolerance."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
import verify_jobs
from torch.utils.flop_counter import FlopCounterMode
from turns import halves

from partita.comm.threads.local import local
from partita.model.core import Explicit
from partita.parallel.cp.halo import with_rows
from partita.parallel.cp.ulysses import Turned
from partita.parallel.ep.counts import rows as rows_of
from partita.parallel.laid import local_shape
from partita.parallel.read import kept_bytes, op_flops
from partita.record.transfer import summarise
from partita.train.build import assemble

CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
PLANS = ("2mb", "tp2", "tp2+sp", "tp4+sp", "dp2 tp2+sp", "pp2/2mb tp2+sp")
LONG = (
    "dp2", "dp4", "pp2:gpipe/4mb", "pp2:1f1b/4mb", "pp4:1f1b/8mb", "pp4:1f1b/2mb", "dp2 tp2", "dp2 pp2/4mb",
    "dp2 tp2+sp pp2:1f1b/4mb",
)  # fmt: skip
CONTEXT = ("cp2:ring", "cp2:ulysses tp2", "cp2:all_gather", "cp4:hybrid2x2", "cp2:ring tp2+sp")
LATENT = {**verify_jobs.MLA, "layers": 2}
CASES = [
    ("llama", {}),
    (
        "llama",
        {
            "tied": True,
            "qkv_bias": True,
            "qk_norm": True,
            "sliding_window": 3,
            "attention_pattern": "sfn",
            "local_rope_theta": 50.0,
        },
    ),
    ("gpt2", {}),
    ("gpt2", {"dropout": 0.1, "sliding_window": 3}),
]


def flash_flops(q, k, v, *rest, out_val=None, **more):
    """The full square, as the program counts it; torch has no formula for its CPU kernel."""
    batch, heads, seq, dim = q
    return 4 * batch * heads * seq * k[2] * dim


def seen_share(model, split):
    """What tiles compute of the square that the program counts: a ring skips what nobody sees."""
    if split is None or split.ring == 1:
        return 1
    mine, size = model.context.coords["cp"], split.share
    tiles = [t for other in range(split.ring) for t in split.tiles(mine, other)]
    area = sum((t.q.stop - t.q.start) * (t.k.stop - t.k.start) for t in tiles)
    return Fraction(area, size * size * split.ring)


def flops_of(model, op, split, sizes):
    """What one device's convention says of an op, of an attention kernel what its tiles see. Values
    narrower than keys are padded for the kernel, which then computes as many of them."""
    found = op_flops(op, sizes)
    if op.kind == "attention" and len(op.reads) == 3:
        window = op.window[0] if op.window else 0
        split = split and split.of_window(window)
        spec, found = model.laid.request.model, found * seen_share(model, split)
        found = Fraction(found) * Fraction(2 * spec.head_dim, spec.head_dim + spec.v_dim)
    return found


def constants(blocks):
    """Tables and masks that live for the whole run and belong to no microbatch."""
    found = set()
    for block in blocks:
        attention = getattr(block, "attention", None)
        if attention is not None:
            found |= {t.untyped_storage().data_ptr() for t in attention.rope or ()}
            core = attention.core
            core = core.inner if isinstance(core, Turned) else core
            if isinstance(core, Explicit):
                found.add(core.future.untyped_storage().data_ptr())
    return found


def routed(world, laid, block):
    """Numbers of rows that follow from what all ranks' routers chose; nothing in a dense block."""
    if getattr(block, "log", None) is None:
        return {}
    mine = torch.tensor(block.log.sent[-1])
    comm = world.make(range(world.size), axis="test", lane="test")
    every = dict(enumerate(comm.counts(mine, site="test")))
    return rows_of(laid.mesh, every, world.rank, laid.replicates_tokens)


def look(world, job):
    """For every block of this rank: bytes kept and FLOPs made, seen and declared."""
    built = assemble(job, world)
    model, batch = built.model, built.batch(0)
    (stage,) = model.laid.stages_of(model.place)
    own = {u.working.untyped_storage().data_ptr() for u in model.units} | constants(model.blocks)
    model.count(batch)
    x, rows = None, []
    if stage.index > 0:
        x = torch.randn(
            model.executor.activation(stage.index, batch.microbatches[0], "F").shape
        ).to(model.units[0].working.dtype)
        x.requires_grad_()
    for name, block, laid in zip(stage.names, model.blocks, stage.blocks, strict=True):
        seen = {}

        def pack(t, seen=seen):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own and storage.nbytes():
                seen[storage.data_ptr()] = (storage.nbytes(), t)
            return t

        counter = FlopCounterMode(display=False, custom_mapping={CPU_FLASH: flash_flops})
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), counter:
            x = block(x, batch.microbatches[0])
        kept = sum(size for size, _ in seen.values())
        sizes = model.laid.sizes | routed(world, model.laid, block)
        split = batch.microbatches[0].split
        declared = sum(flops_of(model, op, split, sizes) for op in laid.ops())
        rows.append((name, kept, kept_bytes(laid, sizes), counter.get_total_flops(), declared))
    return rows


LESS = (
    "recompute:selective", "recompute:selective recompute.modules=core,norm,act", "recompute:full",
    "recompute:full recompute.collectives=keep recompute.every=2",
)  # fmt: skip


LATENT_LESS = (f"tp2+sp 2mb bf16 {LESS[1]}", f"tp2 2mb bf16 {LESS[3]}")


@pytest.mark.parametrize("family, model", CASES[:1] + CASES[-1:])
@pytest.mark.parametrize("less", LESS)
def test_recomputing_keeps_what_is_declared(less, family, model, tmp_path):
    for plan in ("tp2+sp 2mb bf16", "tp2 2mb fp32"):
        job = verify_jobs.job(tmp_path, f"{plan} {less}", family, **model)
        with local(2, 20) as ranks:
            for rows in ranks.run(look, job):
                assert [(r[0], r[1]) for r in rows] == [(r[0], r[2]) for r in rows]


KEPT = [(p, *case) for p in (*PLANS, *CONTEXT, *LONG) for case in CASES]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=[pytest.mark.slow] * (case[0] in LONG))
        for case, dtype in halves(KEPT, ["fp32", "bf16"])
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(map(str, x)),
)
def test_kept_storages_and_flops_are_the_declared(case, dtype, tmp_path):
    plan, family, model = case
    layers = 5 if "pp4" in plan else 3  # equal ones are one object; of pp2 the stages are uneven
    job = verify_jobs.job(tmp_path, f"{plan} {dtype}", family, **{"layers": layers, **model})
    job = job if "pp" in plan or "mb" in plan else job.with_plan(f"{plan} 2mb {dtype}")
    with local(job.plan.world_size, 20) as ranks:
        found = ranks.run(look, job)
    for rows in found:
        for name, kept, declared_kept, flops, declared_flops in rows:
            assert kept == declared_kept, (name, kept, declared_kept)
            assert flops == declared_flops, (name, flops, declared_flops)


NEOX = {"parallel_residual": True, "rotary_pct": 0.5, "layers": 2}
FALLS = {"layers": 2}


@pytest.mark.parametrize(
    "plan, family, model",
    [
        ("tp2+sp 2mb bf16", "gpt_neox", NEOX), ("cp2:ring 2mb fp32", "gpt_neox", NEOX),
        ("tp2 2mb bf16", "bloom", FALLS), ("cp4:hybrid2x2 2mb fp32", "bloom", FALLS),
        (f"tp2+sp 2mb bf16 {LESS[1]}", "gpt_neox", NEOX),
    ],
)  # fmt: skip
def test_one_input_of_two_segments_and_scores_that_fall_off(plan, family, model, tmp_path):
    job = verify_jobs.job(tmp_path, plan, family, **model)
    with local(job.plan.world_size, 20) as ranks:
        for rows in ranks.run(look, job):
            for name, kept, declared_kept, flops, declared_flops in rows:
                assert kept == declared_kept, (name, kept, declared_kept)
                assert "recompute" in plan or flops == declared_flops, (name, flops, declared_flops)


@pytest.mark.parametrize(
    "plan", ["tp2+sp 2mb fp32", "cp2:ring tp2 2mb bf16", "cp2:ulysses 2mb bf16", *LATENT_LESS]
)
def test_latent_attention_keeps_and_computes_what_is_declared(plan, tmp_path):
    job = verify_jobs.job(tmp_path, plan, **LATENT)
    with local(job.plan.world_size, 20) as ranks:
        for rows in ranks.run(look, job):
            for name, kept, declared_kept, flops, declared_flops in rows:
                assert kept == declared_kept, (name, kept, declared_kept)
                assert "recompute" in plan or flops == declared_flops, (name, flops, declared_flops)


EXPERTS = ("2mb", "dp2 tp2+sp ep2 etp2 2mb", "tp2 etp2 2mb", "tp4+sp ep2 2mb")
FEW = ("", "recompute:selective recompute.modules=norm,act")


@pytest.mark.parametrize(
    ("case", "dtype"), halves([(p, r) for p in EXPERTS for r in FEW], ["fp32", "bf16"])
)
def test_experts_keep_and_compute_what_the_chosen_rows_say(case, dtype, tmp_path):
    """Dropless, and on tp4 with a capacity."""
    plan, less = case
    limit = {"capacity_factor": 0.75} if "tp4" in plan else {}
    job = verify_jobs.job(tmp_path, f"{plan} {less} {dtype}", **verify_jobs.EXPERTS, **limit)
    with local(job.plan.world_size, 20) as ranks:
        for rows in ranks.run(look, job):
            for name, kept, declared_kept, flops, declared_flops in rows:
                assert kept == declared_kept, (name, kept, declared_kept)
                assert less or flops == declared_flops, (name, flops, declared_flops)


def recorded_in_order(world, job):
    built = assemble(job, world)
    built.context.recorder.take()
    built.model.forward_backward(built.batch(0))
    built.update.step()
    transfers = built.context.recorder.take()
    laid = built.model.laid
    units = {n: w for u in built.model.units for n, w in u.weights().items()}
    shapes = {n: w.shape for n, w in units.items()}
    want = {
        n: local_shape(t, laid.sizes)
        for u in laid.units(built.model.place)
        for n, t, _ in u.weights
    }
    first = [(t.site, t.phase, t.op, t.bytes) for t in transfers if t.microbatch == 0]
    mine = with_rows(laid.sizes, job.model.image, built.context.coords["cp"])
    calls = [
        (site, c.phase, c.collective, c.bytes)
        for c, site in replace(laid, rows=mine).calls(built.model.place)
        if c.phase in "FB" and not laid._alone(c)
        for _ in range(c.times)
    ]
    return summarise(transfers) == laid.traffic(world.rank), shapes == want, first, calls


ZERO = (
    "dp_shard2.zero1 2mb", "dp_shard2.zero2 2mb tp2+sp", "dp_shard2.zero3 2mb tp2",
    "dp_replicate2 dp_shard2.zero3 2mb", "dp_shard2.zero3 2mb data.prefetch=3",
    "dp_shard2.zero3 2mb data.reshard_after_forward=false", "dp_shard4.zero2 2mb data.bucket_bytes=9000",
    "dp_shard2.zero3 2mb data.accumulate=whole",
)  # fmt: skip


@pytest.mark.parametrize(("plan", "tied"), halves(ZERO, [False, True]))
def test_sites_and_bytes_of_cut_states_are_the_declared(plan, tied, tmp_path):
    job = verify_jobs.job(tmp_path, f"{plan} bf16", "llama", tied=tied)
    with local(job.plan.world_size, 20) as ranks:
        for traffic, weights, first, calls in ranks.run(recorded_in_order, job):
            assert traffic and weights
            assert sorted(c for c in first if c[1] in "FB") == sorted(calls)


@pytest.mark.turns(2)
@pytest.mark.parametrize("recompute", ["", "recompute:full"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "plan",
    [
        *("tp2+sp dp2 2mb", "cp2:ring dp2 2mb", "cp4:hybrid2x2 2mb"),
        *(pytest.param(p, marks=pytest.mark.slow) for p in (*PLANS[1:4], *LONG, PLANS[5])),
    ],
)
def test_sites_bytes_order_names_and_shapes_are_the_declared(plan, family, recompute, tmp_path):
    job = verify_jobs.job(tmp_path, f"{plan} {recompute} bf16", family)
    job = job if "mb" in plan else job.with_plan(f"{plan} 2mb {recompute} bf16")
    with local(job.plan.world_size, 20) as ranks:
        for traffic, weights, first, calls in ranks.run(recorded_in_order, job):
            assert traffic and weights
            forward = [c for c in first if c[1] == "F"]
            assert forward == [c for c in calls if c[1] == "F"]
            assert sorted(c for c in first if c[1] == "B") == sorted(
                c for c in calls if c[1] == "B"
            )
