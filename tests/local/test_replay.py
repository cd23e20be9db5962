"""A bit that flips while a step is computed, or in one of several copies of a weight, ends the run before
the update and names rank and tensor; of healthy ranks every plan computes a step twice alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import verify_jobs

from partita.base.errors import CorruptError
from partita.comm.threads.local import local
from partita.spec.job_check import problems_of_job
from partita.train.build import assemble
from partita.train.replay import Replay

WEIGHT = "attention.wo"
HEALTHY = ("pp2:zb_h1/4mb dp_shard2.zero1 bf16",)
MORE = (
    "dp_replicate2", "tp2+sp",
    "dp_shard2.zero2 fp8 precision.fp8_scaling=delayed", "dp_shard2.zero3 tp2", "cp2:ring", "cp2:ulysses tp2",
    "pp2:1f1b/2mb fp16", "pp2:interleaved_1f1bx2/4mb tp2", "dp_replicate2 recompute:full",
    "dp_shard2.zero3 offload:cpu", "dp_shard2.zero2 offload:cpu offload.targets=gradients",
    "tp4",
    "pp2:dualpipe/4mb dp_replicate2", "dp_shard2.zero1 bf16 precision.rounding=stochastic",
)  # fmt: skip


def flip(x: torch.Tensor) -> None:
    """The lowest bit of a float's exponent: it doubles, or halves."""
    x.view(torch.uint8)[2] ^= 0x80


def train(world, job, struck: int = -1, how: str = "") -> list[float]:
    """Losses of steps that are all computed twice; in the second one, a bit flips on one rank."""
    built = assemble(job, world)
    model, losses = built.model, []
    replay = Replay(built, 1, one_clock=True)
    for step in range(3):
        hurts = step == 1 and built.context.rank == struck
        places = ((u, at) for u in model.units for name, at, _ in u.places if WEIGHT in name)
        unit, at = next(places)
        if hurts and how == "weight":
            flip(unit.master[at:])
            unit.round_working()
        replay.rehearse(built.batch(step))
        kept = unit.working.clone()
        if hurts and how == "pass":
            flip(unit.working[at:])
        losses.append(model.forward_backward(built.batch(step)))
        unit.working.copy_(kept)
        if hurts and how == "gradient":
            flip(unit.gradient[at:])
        replay.compare(losses[-1])
        built.update.step()
    return losses


def plain(world, job) -> list[float]:
    """The same, each step computed once."""
    built = assemble(job, world)
    losses = []
    for step in range(3):
        losses.append(built.model.forward_backward(built.batch(step)))
        built.update.step()
    return losses


@pytest.mark.parametrize(
    "plan", [*HEALTHY, *(pytest.param(p, marks=pytest.mark.slow) for p in MORE)]
)
def test_healthy_ranks_compute_alike_and_train_as_without(plan, tmp_path):
    job = verify_jobs.job(tmp_path, plan)
    with local(job.plan.world_size, 30) as ranks:
        assert ranks.run(train, job) == ranks.run(plain, job)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["ep2 dp_shard2.zero1", "ep2 tp2+sp dp_shard2"])
def test_healthy_experts_compute_alike(plan, tmp_path):
    job = verify_jobs.job(tmp_path, plan, **verify_jobs.EXPERTS)
    with local(job.plan.world_size, 30) as ranks:
        assert ranks.run(train, job) == ranks.run(plain, job)


FLIPS = (
    ("dp_replicate4", 1, "pass", "hands in at "),
    ("pp3:1f1b/4mb", 1, "pass", "hands in at "),
    ("dp_replicate4", 2, "weight", "rank 2, unlike the others, holds wrong bits of "),
)
MORE_FLIPS = (
    ("tp2", 1, "pass", "hands in at "),
    ("dp_replicate1", 0, "pass", "has as "),
    ("dp_replicate2", 1, "gradient", "has as gradient of "),
    ("dp_replicate2", 1, "weight", "one of rank 0 and rank 1 holds wrong bits of "),
)


@pytest.mark.parametrize(
    ("plan", "struck", "how", "told"),
    [*FLIPS, *(pytest.param(*x, marks=pytest.mark.slow) for x in MORE_FLIPS)],
)
def test_a_flipped_bit_is_found_and_its_rank_named(plan, struck, how, told, tmp_path):
    job = verify_jobs.job(tmp_path, plan)
    job = replace(job, train=replace(job.train, replay_every=1))
    assert all(p.severity == "warning" for p in problems_of_job(job))
    with local(job.plan.world_size, 30) as ranks, pytest.raises(CorruptError) as caught:
        ranks.run(train, job, struck, how)
    error = caught.value
    assert told in error.message and "nothing was updated" in error.message
    assert error.rank == (0 if told.startswith("one of") else struck)
    assert f"rank {struck}" in error.message and " step 2" in f" {error.message}"
    assert error.key and ("." in error.key or error.key == "loss") and error.exit_code == 74


@pytest.mark.parametrize(
    "plan", ["pp2:pipedream_2bw/4mb", "pp2:1f1b/4mb pipeline.post_validation=true"]
)
def test_a_plan_that_updates_within_a_step_is_refused(plan, tmp_path):
    job = verify_jobs.job(tmp_path, plan)
    job = replace(job, train=replace(job.train, replay_every=1, clip_grad_norm=0.0))
    assert [p.rule for p in problems_of_job(job) if p.severity == "error"] == ["replay_every"]
