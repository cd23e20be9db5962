"""Updates before the norm is known, undone where it was wrong: bit for bit the steps that wait for it."""

import math
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch
import verify_jobs

from partita.base.errors import NonFiniteError
from partita.comm.threads.local import local
from partita.parallel.laid import lay, problems
from partita.parallel.offload import cpu
from partita.parallel.precision.rules import is_before
from partita.parallel.read import tensor_bytes
from partita.record.transfer import summarise
from partita.schedule.passes import warm_up
from partita.simulate.predict import request_of, simulate
from partita.spec.job import Job
from partita.train.build import assemble
from partita.train.step import StepBatch
from partita.verify import parity, runs
from partita.verify.batches import open_data
from partita.verify.bisect import traffic_difference
from partita.verify.parity import run_ranks, verify

AFTER = "pipeline.post_validation=true"
STEPS = 4


def job(folder, plan, clip=1.0, **model):
    made = verify_jobs.job(folder, plan, **model)
    return replace(made, train=replace(made.train, clip_grad_norm=clip, steps=STEPS, lr=1e-2))


def train(world, job, spoil=lambda model, step: None):
    """(losses, norms, weights, counts and loss scale, whether each guess held, transfers of each step)."""
    built = assemble(job, world)
    model, update, losses, norms, held, sent = built.model, built.update, [], [], [], []
    for step in range(job.train.steps):
        last = step + 1 == job.train.steps
        built.context.recorder.take()
        loss = model.forward_backward(built.batch(step, last))
        if model.guess is not None and step:
            found = model.guess.found
            assert found is not None and found.step == step - 1
            losses.append(found.loss)
            norms.append(found.norm)
            held.append(found.held)
        spoil(model, step)
        norm = update.step()
        sent.append(summarise(built.context.recorder.take()))
        if model.guess is None or last:
            losses.append(loss)
            norms.append(norm)
    losses.append(model.evaluate(StepBatch(0, built.batch(0).microbatches[:1])))
    weights = [u.master.clone() for u in model.units]
    states = [x.clone() for s in update.optimizer.state.values() for x in s.values()]
    scale = None if model.scaler is None else model.scaler.state()
    return losses, norms, [*weights, *states], (update.updates, update.lr, scale), held, sent


def both(made, spoil=lambda model, step: None):
    waits = replace(made, plan=made.plan.with_("pipeline", post_validation=False))
    with local(made.plan.world_size, 30) as ranks:
        return ranks.run(train, made, spoil), ranks.run(train, waits, spoil)


def assert_same(found, want):
    for a, b in zip(found, want, strict=True):
        assert a[0] == b[0] and str(a[1]) == str(b[1]) and a[3] == b[3]
        assert len(a[2]) == len(b[2])
        assert all(torch.equal(x, y) for x, y in zip(a[2], b[2], strict=True))


RANDOM = "precision.rounding=stochastic"
GIVEN = "offload:cpu offload.targets=gradients"
PLANS = (
    "pp4:zb_h2/8mb fp64",
    "pp2:zb_v/4mb dp_shard2.zero1 bf16",
    f"pp2:zb_h1/4mb dp_shard2.zero1 bf16 {RANDOM}",
    "pp2:zb_h1/4mb dp_shard2.zero1 bf16 offload:cpu",
)
MORE = (
    f"pp2:1f1b/4mb bf16 {RANDOM} offload:nvme",
    "pp2:1f1b/4mb dp_shard2.zero3 offload:nvme offload.targets=parameters,optimizer",
    "pp2:1f1b/4mb fp64", "pp2:dualpipe/4mb dp_replicate2 fp64",
    "pp2:zb_h1/4mb tp2+sp fp64", "pp4:1f1b/4mb dp_shard2.zero1", "pp2:interleaved_1f1bx2/4mb tp2",
    "pp2:zb_h1/4mb dp_shard2.zero3 data.reshard_after_forward=false", "pp2:gpipe/4mb dp_shard2.zero2",
    "pp2:1f1b/4mb offload:nvme", "pp2:zb_h1/4mb dp_shard2.zero3 offload:cpu offload.targets=parameters",
    f"pp2:1f1b/4mb dp_shard2.zero3 bf16 offload:nvme offload.targets=parameters {RANDOM}",
    "pp2:1f1b/2mb fp8 precision.fp8_scaling=delayed", "pp2:zb_h1/4mb fp16 offload:cpu",
    f"pp2:1f1b/4mb dp_shard2.zero3 bf16 offload:cpu offload.targets=parameters,optimizer {RANDOM}",
    f"pp2:1f1b/4mb dp_shard2.zero3 bf16 offload:nvme offload.targets=parameters,gradients,optimizer {RANDOM}",
    "pp2:v_half/4mb", "pp4:zb_h2/8mb recompute:full", "pp2:gpipe/4mb offload:cpu offload.targets=activations",
    f"pp2:zb_h1/4mb fp16 {GIVEN}", f"pp2:1f1b/4mb dp_shard2.zero3 bf16 {GIVEN},parameters {RANDOM}",
)  # fmt: skip


@pytest.mark.parametrize("plan", [*PLANS, *(pytest.param(p, marks=pytest.mark.slow) for p in MORE)])
def test_it_equals_steps_that_wait(plan, tmp_path, monkeypatch):
    """Without a clip every guess holds; with one between the norms of steps some are undone."""
    monkeypatch.setattr(cpu, "CHUNK", 1024)
    made = job(tmp_path, f"{plan} {AFTER}", clip=0.0)
    found, want = both(made)
    assert_same(found, want)
    assert all(rank[4] == [True] * (STEPS - 1) for rank in found)
    for rank, seen in enumerate(found):
        assert seen[5][1] == lay(request_of(made)).traffic(rank)
    limit = sorted(want[0][1][:-1])[1] * (1 - 1e-9)
    found, want = both(replace(made, train=replace(made.train, clip_grad_norm=limit)))
    assert_same(found, want)
    assert set(found[0][4]) == {True, False} or found[0][4].count(False) >= 2
    for rank, seen in enumerate(found if ".zero3" not in plan else ()):
        for step in range(1, STEPS):
            want = undone(lay(request_of(made)), rank, forwards=not seen[4][step - 1])
            assert on_the_wire(seen[5][step]) == want


def on_the_wire(lines):
    """What does not stay on the host."""
    return [t for t in lines if t.axis not in ("host", "disk")]


def undone(laid, rank, forwards):
    """A step's declared traffic; where the guess before was wrong its first forwards go twice, and what is
    updated is gathered as it should have been, besides; or as it was before, where it is skipped."""
    lines, place = on_the_wire(laid.traffic(rank)), laid.mesh.coords(rank)["pp"]
    if not forwards:
        return lines
    program = laid.actions[place]
    every, first = (
        Counter(a.stage for a in x if a.kind == "F") for x in (program, warm_up(program))
    )
    stages = {name: s for s in laid.schedule.stages_of(place) for name in laid.stages[s].names}
    out = []
    for t in lines:
        count = t.count
        if t.phase == "F":
            block = next(b for b in stages if t.site.startswith((f"{b}:", f"{b}.")))
            count += t.count * first[stages[block]] // every[stages[block]]
        elif (t.phase, t.op) == ("step", "all_gather"):
            count *= 2
        out.append(replace(t, count=count, bytes=t.bytes * count // t.count))
    return out


def kept(world, made):
    """Bytes kept to undo an update by arena, and those declared; elsewhere there is one."""
    update = assemble(made, world).update
    guess, places = update.model.guess, update.places
    assert guess is not None and places is not None
    laid, place = update.model.laid, update.model.place
    declared = Counter()
    for block in (b for s in laid.stages_of(place) for b in s.blocks):
        for name, t in block.tensors.items():
            declared[t.arena == "device"] += tensor_bytes(t, laid.sizes) * is_before(name)
    here = sum(x.nbytes for x in guess.copies())
    return {True: here, False: sum(x.nbytes for x in places.seconds())}, dict(declared)


@pytest.mark.parametrize(
    "plan",
    [
        "pp2:1f1b/2mb fp16", "pp2:1f1b/2mb fp16 offload:cpu", f"pp2:1f1b/2mb fp16 {GIVEN}",
        "pp2:1f1b/2mb dp_shard2.zero1 bf16 offload:nvme",
        f"pp2:1f1b/2mb dp_shard2.zero1 bf16 {RANDOM} offload:cpu offload.targets=optimizer",
        f"pp2:1f1b/2mb dp_shard2.zero3 bf16 {RANDOM} offload:cpu offload.targets=parameters",
    ],
)  # fmt: skip
def test_what_is_kept_to_undo_is_the_declared(plan, tmp_path):
    made = job(tmp_path, f"{plan} {AFTER}")
    with local(made.plan.world_size, 30) as ranks:
        for held, declared in ranks.run(kept, made):
            few = 8 * 2 * 4 * 2 * 8  # biases that no optimizer moves, padding
            assert all(0 <= declared.get(a, 0) - held[a] <= few for a in held), (held, declared)
            assert sum(held.values()) > 10_000


def infinite(rank, at, model, step):
    if model.context.rank == rank and step == at:
        next(u for u in model.units if u.gradient.numel()).gradient[0] = torch.inf


@pytest.mark.parametrize(
    ("rank", "away"), [(0, ""), (1, ""), (1, "offload:cpu offload.targets=optimizer")]
)
def test_an_inf_anywhere_skips_the_update_of_all(rank, away, tmp_path):
    made = job(tmp_path, f"pp2:zb_h2/4mb dp_shard2.zero1 fp16 {away} {AFTER}", clip=0.0)
    found, want = both(made, partial(infinite, rank, 1))
    assert_same(found, want)
    laid = lay(request_of(made))
    for at, seen in enumerate(found):  # skipped: what was updated is gathered as it was
        assert on_the_wire(seen[5][2]) == undone(laid, at, forwards=True)
    assert found[0][4] == [True, False, True] and found[0][1][1] == math.inf


def test_an_inf_without_a_scale_ends_the_run_before_the_update(tmp_path):
    def run(world, made):
        built = assemble(made, world)
        before = [u.master.clone() for u in built.model.units]
        built.model.forward_backward(built.batch(0, drains=False))
        infinite(1, 0, built.model, 0)
        built.update.step()
        with pytest.raises(NonFiniteError, match="norm of step 1 is inf"):
            built.model.forward_backward(built.batch(1, drains=False))
        after = [u.master for u in built.model.units]
        return all(torch.equal(a, b) for a, b in zip(before, after, strict=True))

    with local(2, 20) as ranks:
        assert ranks.run(run, job(tmp_path, f"pp2:zb_h1/4mb {AFTER}")) == [True, True]


def test_the_wait_is_gone_from_the_prediction():
    """zb_h2's flush is longer than its span: what waits pays it in every step; what does not pays memory, and
    the copies, which take as long as sequences of 4096 wait here: those of 8192 wait twice that."""
    line, sizes = "pp4:zb_h2/16mb tp2+sp bf16", {"global_batch_size": 16, "seq_len": 8192}
    made, waits = (
        Job.of("llama3-8b", "8xh100", plan, **sizes) for plan in (f"{line} {AFTER}", line)
    )
    after, before = simulate(made), simulate(waits)
    assert after.step_time_s is not None and before.step_time_s is not None
    for a, b in zip(
        after.ledgers, before.ledgers, strict=True
    ):  # fp32 master and two moments, twice
        assert a.at_peak["optimizer"] == 2 * b.at_peak["optimizer"]
    assert after.played is not None and after.timed is not None
    assert after.timed.pipeline_s == after.played.own < after.played.seconds
    assert after.step_time_s < before.step_time_s


def test_verify_proves_it(tmp_path):
    found = verify(job(tmp_path, f"pp2:zb_h1/4mb dp_shard2.zero1 fp64 {AFTER}"))
    assert found.equal and found.traffic_equal, str(found)


def test_a_norm_that_is_not_known_yet_excuses_no_traffic(tmp_path, monkeypatch):
    """The first step's guess holds, its norm comes with the next: what it did not send is missed."""
    made = job(tmp_path, f"pp2:zb_h1/4mb dp_shard2.zero1 fp64 {AFTER}", clip=0.0)
    data = open_data(made, made)
    ranks = run_ranks(made, data, "local", lay(request_of(made)))
    assert not any(r.halted for r in ranks) and traffic_difference(ranks) is None
    whole = runs.summarise
    monkeypatch.setattr(runs, "summarise", lambda x: [t for t in whole(x) if t.phase != "step"])
    found = traffic_difference(run_ranks(made, data, "local", lay(request_of(made))))
    assert found is not None and found[0].phase == "step" and found[1] < 0


def test_what_routers_did_is_of_the_step_that_is_proven(tmp_path):
    """The auxiliary losses of each step, though the next one's forwards have run when they are known."""
    found = verify(job(tmp_path, f"pp2:zb_h1/4mb fp64 {AFTER}", **verify_jobs.EXPERTS))
    assert found.equal, str(found)
    assert len({s.auxiliary[0] for s in found.trials[0].ranks[0].steps}) == 3


@pytest.mark.parametrize(
    ("plan", "why"),
    [
        ("2mb dp2", "without a pipeline the norm is known at once"),
        ("pp2:pipedream/2mb", "has no norm to wait for"),
    ],
)
def test_it_changes_nothing_where_nobody_waits(plan, why, tmp_path):
    """A warning says so; laid, and predicted, as without it; and it runs."""
    lines = (f"{plan} fp64{word}" for word in (f" {AFTER}", ""))
    made, plain = (job(tmp_path, line, clip=0.0, layers=2, batch=4) for line in lines)
    (found,) = problems(request_of(made))
    assert found.severity == "warning" and why in found.message
    laid, same = lay(request_of(made)), lay(request_of(plain))
    assert laid.program.step == same.program.step and laid.traffic(0) == same.traffic(0)
    assert simulate(made).step_time_s == simulate(plain).step_time_s
    assert verify(made, brief=True).equal


def test_traffic_is_told_where_every_step_undoes_an_update(tmp_path, monkeypatch):
    """Whatever the limit that verify looks for leaves: no step that it compares is one that is declared."""
    clipped = job(tmp_path, f"pp2:1f1b/2mb dp_shard2.zero1 {AFTER}", clip=1e-3)
    monkeypatch.setattr(parity, "limited", lambda job, data: job)
    found = verify(clipped, brief=True)
    assert found.equal and found.traffic_equal, str(found)
