"""Layers that are alike are laid, priced and added up once: exactly what each one by itself comes to;
plans that are cut alike share what they are cut from."""

from dataclasses import replace

import pytest

from partita.cost.machine import machine_of
from partita.parallel.cp import rules as cp
from partita.parallel.dp import rules as dp
from partita.parallel.ep import rules as ep
from partita.parallel.laid import Laid, lay
from partita.parallel.laid_cut import cut
from partita.parallel.sp import rules as sp
from partita.parallel.split import rules as split
from partita.parallel.tp import rules as tp
from partita.planner.answers.remedy import remedies
from partita.simulate.memory import arena_ledger, stage_ledger
from partita.simulate.predict import request_of, simulate, timed, weigh
from partita.spec.families import program as family_program
from partita.spec.frozen import freeze
from partita.spec.job import Job
from partita.spec.program import distinct

PLANS = (
    "dp_shard4.zero1 tp2+sp 2mb",
    "dp_replicate2 dp_shard2.zero3 cp2:ring recompute:full 2mb",
    "pp4:1f1b/8mb dp_shard2.zero2 tp2+sp offload:cpu",
    "pp4:interleaved_1f1bx2/8mb dp_shard2.zero0 tp2+sp",
    "pp4:dualpipe/8mb dp_shard4.zero3 tp2+sp",
    "pp4:pipedream_2bw/8mb dp_shard2.zero1 tp2+sp fp32",
    "dp_shard8.zero3 4mb data.reshard_after_forward=false offload:nvme",
    "dp_shard4.zero3 tp2+sp 2mb offload:nvme offload.targets=activations,parameters,optimizer",
)


def job_of(line: str, layers: int, preset: str = "llama3-8b") -> Job:
    job = Job.of(preset, "32xh100", line, global_batch_size=64, seq_len=1024)
    return replace(job, model=replace(job.model, layers=layers))


def one_by_one(laid: Laid) -> Laid:
    """The same with each block an object of its own, so that nothing is read of two at once."""
    stages = (replace(s, blocks=tuple(replace(b) for b in s.blocks)) for s in laid.stages)
    return replace(laid, stages=tuple(stages))


@pytest.mark.parametrize("line", PLANS)
@pytest.mark.parametrize("preset", ["llama3-8b", "gpt2", "mixtral-8x7b"])
def test_equal_layers_count_as_often_as_they_are_there(line, preset):
    job = job_of(line, 19, preset)
    laid, machine = lay(request_of(job)), machine_of(job.cluster)
    apart = one_by_one(laid)
    assert all(n == 1 for s in apart.stages for _, n in distinct(s.blocks))
    for place in range(job.plan.mesh.pp):
        assert stage_ledger(laid, place, laid.schedule) == stage_ledger(
            apart, place, apart.schedule
        )
        for arena in ("host", "disk"):
            assert arena_ledger(laid, place, arena) == arena_ledger(apart, place, arena)
    ours, theirs = (timed(x, machine, job.plan.num_microbatches) for x in (laid, apart))
    assert ours.seconds == pytest.approx(theirs.seconds, rel=1e-12)
    assert ours.works.once == theirs.works.once
    for mine, other in zip(ours.works.stages, theirs.works.stages, strict=True):
        assert (mine.blocks, mine.states, mine.away) == (other.blocks, other.states, other.away)
    assert ours.step.comm_s == pytest.approx(theirs.step.comm_s, rel=1e-9)


@pytest.mark.parametrize("line", PLANS)
def test_more_layers_are_no_more_blocks(line):
    few, many = (
        {id(b) for s in lay(request_of(job_of(line, n))).stages for b in s.blocks}
        for n in (64, 640)
    )
    assert len(many) <= len(few) + 8  # where a bucket is full
    assert len(many) < 64


def test_a_job_of_many_layers_is_told_what_would_fit():
    job = job_of("dp_shard32.zero1 2mb bf16", 400)
    found = remedies(job)
    assert found and all(r.prediction.fits for r in found)
    for r in found:  # weighed as it is simulated
        held = weigh(job.with_plan(r.prediction.plan))
        assert held is not None and held.fits and held.ledgers == r.prediction.ledgers
    held = weigh(job)
    assert held is not None and not held.fits and held.ledgers == simulate(job).ledgers


@pytest.mark.parametrize("line", [*PLANS, "cp4:hybrid2x2 tp2+sp recompute:selective fp8 8mb"])
@pytest.mark.parametrize("preset", ["gpt2", "mixtral-8x7b"])
def test_what_cuts_a_program_reads_mesh_context_and_expert_alone(line, preset):
    request = request_of(job_of(line, 3, preset))
    batch = request.micro_batch_size * request.plan.data_parallel_size
    program = freeze(family_program(request.model, batch, request.seq_len), request.frozen)
    for room in (split, dp, cp, tp, sp, ep):
        program = room.lay(request, program)
    assert program == cut(request)
