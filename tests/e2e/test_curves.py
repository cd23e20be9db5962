"""The same 200 steps under six plans: one loss curve."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "local"))
import verify_jobs

from partita.comm.local import local
from partita.train.build import assemble
from partita.train.step import StepBatch

PLANS = (
    "2mb", "dp2 tp2", "tp2+sp 2mb", "pp2:gpipe/4mb", "pp4:1f1b/8mb recompute:full",
    "dp2 tp2+sp pp2:1f1b/4mb",
)  # fmt: skip
STEPS = 200


def curve(world, job, reverse=False):
    built = assemble(job, world)
    losses = []
    for step in range(STEPS):
        batch = built.batch(step)
        if reverse:
            batch = StepBatch(batch.step, batch.microbatches[::-1])
        losses.append(built.model.forward_backward(batch))
        built.update.step()
    return losses


def of(plan, folder, dtype, reverse=False):
    job = verify_jobs.job(folder, f"{plan} {dtype}")
    job = replace(job, train=replace(job.train, lr=1e-3))
    with local(job.plan.world_size, 60) as ranks:
        return ranks.run(curve, job, reverse)[0]


def apart(a, b):
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_in_fp64_the_curves_agree_at_every_step(tmp_path):
    want = of("1mb", tmp_path, "fp64")
    assert want[-1] < want[0]
    for plan in PLANS:
        assert apart(of(plan, tmp_path, "fp64"), want) <= 1e-8, plan


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_in_fp32_no_plan_leaves_further_than_order_does(tmp_path):
    want = of("8mb", tmp_path, "fp32")
    chaos = apart(of("8mb", tmp_path, "fp32", reverse=True), want)
    assert chaos > 0
    ulp = max(want) * 2**-23  # a microbatch's loss is an fp32 number
    for plan in PLANS:
        assert apart(of(plan, tmp_path, "fp32"), want) <= 3 * chaos + ulp, plan
