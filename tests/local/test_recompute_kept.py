"""What `recompute.collectives=keep` keeps of every axis: equal to one device, and nothing moved, kept or
computed but what is declared."""

import pytest
import torch
import verify_jobs
from test_drift import CPU_FLASH, LATENT, look
from torch.utils.flop_counter import FlopCounterMode
from verify_jobs import EXPERTS, QWEN

from partita.comm.threads.local import local
from partita.parallel.ep.counts import Routing
from partita.parallel.read import backward_flops, op_flops, replayed
from partita.train.build import assemble
from partita.verify.parity import verify

KEEP = "recompute:full recompute.collectives=keep"
SMALL = {**EXPERTS, "layers": 2}
DROPS = {"layers": 2, "dropout": 0.2}
CASES = [
    ("llama", {**QWEN, "layers": 2}, 2, f"cp2:ulysses {KEEP}"),
    ("llama", {**SMALL, "capacity_factor": 0.75}, 4, f"cp2:ring tp2+sp ep2 etp2 expert.chunks=2 {KEEP}"),
]  # fmt: skip
MORE = [
    ("llama", LATENT, 2, f"cp2:ring {KEEP}"), ("gpt2", DROPS, 2, f"cp2:ring {KEEP}"),
    ("llama", SMALL, 2, f"dp2 ep2 {KEEP}"),
    ("gpt2", DROPS, 4, "cp4:hybrid2x2 recompute:selective recompute.collectives=keep"),
]  # fmt: skip
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE]


def rows_of(world, laid, block):
    """Rows that every rank has of the first microbatch; nothing in a dense block."""
    if getattr(block, "log", None) is None:
        return {}
    mine = torch.tensor(next(iter(block.log.sent.values()))).flatten()
    every = world.make(range(world.size), axis="test", lane="test").counts(mine, site="test")
    chunks = laid.request.plan.expert.chunks
    told = Routing(laid.mesh, laid.replicates_tokens, {("", 0): dict(enumerate(every))}, chunks)
    return told.rows("", 0, world.rank)


def step_flops(world, job):
    """FLOPs of a step's matmuls but for attention's, seen and declared."""
    built, aten = assemble(job, world), torch.ops.aten
    model, batch = built.model, built.batch(0)
    model.begin(batch)
    model.count(batch)
    flash = CPU_FLASH, aten._scaled_dot_product_flash_attention_for_cpu_backward
    ours = dict.fromkeys(flash, lambda *_, **__: 0)
    ours[aten.addmm_] = lambda _, a, b, **__: 2 * a[0] * a[1] * b[1]
    with FlopCounterMode(display=False, custom_mapping=ours) as counter:
        model.executor.run(batch.microbatches)
    declared = 0.0
    for made, block in zip(model.blocks, model.laid.stages[0].blocks, strict=True):
        sizes = model.laid.sizes | rows_of(world, model.laid, made)
        for op in (*block.ops(), *replayed(block)):
            declared += op_flops(op, sizes) if op.kind != "attention" else 0
        declared += sum(backward_flops(op, sizes) for op in block.ops() if op.kind != "attention")
    return counter.get_total_flops(), declared


@pytest.mark.parametrize("family, model, size, plan", CASES, ids=lambda x: str(x)[:40])
def test_kept_results_are_not_brought_again(family, model, size, plan, tmp_path):
    found = verify(verify_jobs.job(tmp_path, f"{plan} 2mb fp64", family, 4, **model), brief=True)
    assert found.equal, str(found)
    job = verify_jobs.job(tmp_path, f"{plan} 1mb fp32", family, 2, **model)
    dense = "capacity_factor" not in model
    with local(size, 20) as ranks:
        for rows in ranks.run(look, job) if dense else ():
            assert [(r[0], r[1]) for r in rows] == [(r[0], r[2]) for r in rows]
        if "dropout" in model:
            return
        for seen, declared in ranks.run(step_flops, job):
            assert seen == declared


@pytest.mark.slow
def test_rows_that_travel_while_others_are_computed_are_kept(tmp_path):
    plan = f"dp2 ep2 pp2:dualpipe/4mb {KEEP} fp64"
    found = verify(verify_jobs.job(tmp_path, plan, **{**EXPERTS, "layers": 4}))
    assert found.equal, str(found)
