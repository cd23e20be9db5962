"""fp16's loss scale: it changes no digit, one rank's overflow skips every rank's update, a resume goes on."""

import math
from dataclasses import replace
from itertools import islice

import torch
import verify_jobs
from saves import save_run

from partita.comm.single import SingleWorld
from partita.comm.threads.local import local
from partita.parallel.precision.scaler import GROWTH_INTERVAL, LossScaler
from partita.train.build import assemble
from partita.train.checkpoints.checkpoint import Ranks
from partita.train.checkpoints.resume import load_run


def test_it_halves_at_an_overflow_and_doubles_after_good_steps():
    scaler = LossScaler()
    assert not scaler.step(math.inf) and not scaler.step(math.nan)
    assert (scaler.scale, scaler.skipped) == (2.0**14, 2)
    assert all(scaler.step(1.0) for _ in range(GROWTH_INTERVAL))
    assert scaler.scale == 2.0**15
    again = LossScaler()
    again.restore(scaler.state())
    assert again == scaler


def test_it_is_torchs_scaler():
    theirs = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=GROWTH_INTERVAL)
    ours, weight, moved = LossScaler(), torch.zeros(1, requires_grad=True), 0
    optimizer = torch.optim.SGD([weight], lr=1.0)
    steps = 3 * GROWTH_INTERVAL
    for i in range(steps):
        overflows = i < 10 or i == 2 * GROWTH_INTERVAL + 100  # behind two growths in a row
        theirs.scale(weight.sum()).backward()
        if overflows:
            weight.grad.fill_(math.inf)
        assert ours.scale == theirs.get_scale()
        before = float(weight.detach())
        theirs.step(optimizer)
        assert ours.step(float(weight.grad)) == (float(weight.detach()) != before)
        theirs.update()
        optimizer.zero_grad()
        moved += not overflows
    assert ours.skipped == steps - moved and ours.scale == theirs.get_scale()


def weights(built):
    return [u.master.clone() for u in built.model.units]


def overflows_on_one_rank(world, job):
    built = assemble(job, world)
    before = weights(built)
    loss = built.model.forward_backward(built.batch(0))
    if world.rank == 3:
        own = next(u for u in built.model.units if u.name.endswith("unit[]"))
        own.gradient[0] = torch.inf
    norm = built.update.step()
    same = all(torch.equal(a, b) for a, b in zip(before, weights(built), strict=True))
    built.model.forward_backward(built.batch(1))
    moved = math.isfinite(built.update.step())
    scaler = built.model.scaler
    counts = scaler.skipped, built.update.updates, built.update.made
    return math.isfinite(loss), norm, same, moved, scaler.scale, counts


def test_an_overflow_on_one_rank_skips_the_update_of_all(tmp_path):
    job = verify_jobs.job(tmp_path, "pp2/2mb tp2+sp fp16")
    with local(4, 20) as ranks:
        found = ranks.run(overflows_on_one_rank, job)
    assert found == [(True, math.inf, True, True, 2.0**15, (1, 2, 1))] * 4


def norms(world, job, scale):
    built = assemble(job, world)
    built.model.scaler.scale = scale
    built.model.forward_backward(built.batch(0))
    return [u.gradient / scale for u in built.model.units], built.update.step()


def test_the_scale_changes_no_digit(tmp_path):
    job = verify_jobs.job(tmp_path, "tp2 2mb fp16")
    with local(2, 20) as ranks:
        small, large = (ranks.run(norms, job, scale) for scale in (2.0**10, 2.0**14))
    for (a, norm_a), (b, norm_b) in zip(small, large, strict=True):
        assert abs(norm_a / norm_b - 1) < 1e-3
        for x, y in zip(a, b, strict=True):
            assert (x - y).abs().max() <= 2e-3 * y.abs().max() + 1e-6


def goes_on(job, folder, steps, start=None):
    """Trains from a scale that overflows, or from a checkpoint; the built run, saved after `steps`."""
    built = assemble(job, SingleWorld())
    model, update, data = built.model, built.update, built.fingerprint
    if start:
        load_run(start, job, model, update, data)
    else:
        model.scaler.scale = 2.0**21
    for batch in islice(built, steps - update.updates):
        model.forward_backward(batch)
        update.step()
    return built, save_run(folder, steps, job, model, update, data, Ranks())


def test_a_resume_goes_on(tmp_path):
    """With the scale that was left, and the count of the updates that were made; under another precision
    and back too."""
    job = verify_jobs.job(tmp_path, "2mb fp16")
    job = replace(job, train=replace(job.train, steps=9))
    whole, _ = goes_on(job, tmp_path / "whole", 8)
    assert 0 < whole.model.scaler.skipped < 5, whole.model.scaler
    half, saved = goes_on(job, tmp_path / "half", 5)
    again, _ = goes_on(job, tmp_path / "again", 8, saved)
    assert again.model.scaler == whole.model.scaler
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))
    made = 5 - half.model.scaler.skipped
    for line in ("2mb bf16", "2mb bf16 offload:cpu", "2mb fp16"):
        made += 1
        other, saved = goes_on(
            job.with_plan(line), tmp_path / f"to {made}", made + whole.model.scaler.skipped, saved
        )
        states = other.update.optimizer.state.values()
        assert {float(s["step"]) for s in states} == {made} == {other.update.made}, line
