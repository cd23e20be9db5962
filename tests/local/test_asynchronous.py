"""Asynchronous schedules: delayed updates as a plain loop makes them; versions, staleness as stated."""

import math
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import verify_jobs
from turns import halves, in_turn

from partita.base.errors import PlanError, UsageError
from partita.comm.threads.local import local
from partita.parallel.laid import lay
from partita.schedule.versions import staleness
from partita.simulate.memory import stage_ledger
from partita.simulate.predict import request_of
from partita.train.build import assemble
from partita.train.recorder import StepRecorder
from partita.verify.parity import verify


def job(folder, plan, family="llama", **model):
    made = verify_jobs.job(folder, plan, family, **{"tied": False, **model})
    return replace(made, train=replace(made.train, clip_grad_norm=0.0))


PLANS = ("pp2:pipedream/4mb", "pp2:pipedream_2bw/4mb", "pp4:pipedream/4mb recompute:full")
MORE = (
    "pp4:pipedream_2bw/8mb", "pp3:pipedream/4mb", "dp2 pp2:pipedream/4mb", "dp2 pp2:pipedream_2bw/2mb",
    "tp2+sp pp2:pipedream/4mb recompute:full", "tp2 pp2:pipedream_2bw/4mb",
)  # fmt: skip


@pytest.mark.parametrize(
    ("plan", "family"),
    [
        pytest.param(p, f, marks=[pytest.mark.slow] * (p in MORE))
        for p, f in halves([*PLANS, *MORE], ["llama", "gpt2"])
    ],
)
def test_delayed_updates_equal_a_plain_loop(plan, family, tmp_path):
    layers = 3 if "pp2" in plan else 5
    found = verify(job(tmp_path, f"{plan} fp64", family, layers=layers))
    assert found.equal, str(found)
    assert found.traffic_equal
    assert found.to_json()["reference"] == "delayed"


MANY = {
    "tied": ("pp4:pipedream/8mb", "llama", {"tied": True}),
    "vertical sync": ("pp4:pipedream/4mb pipeline.vertical_sync=true", "llama", {"tied": True}),
    "dropout": ("dp_shard2.zero1 pp2:pipedream/4mb", "gpt2", {"tied": True, "dropout": 0.1}),
    "sharded": ("dp_shard2.zero1 pp2:pipedream_2bw/2mb", "llama", {"tied": True}),
    "experts": ("dp_shard2.zero1 ep2 pp2:pipedream/4mb", "llama", verify_jobs.EXPERTS),
    "experts 2bw": ("tp2+sp pp2:pipedream_2bw/4mb ep2", "llama", verify_jobs.EXPERTS),
    "fp8": ("pp2:pipedream/4mb fp8", "llama", {}),
    "bf16": ("tp2+sp pp2:pipedream/4mb bf16", "gpt2", {"tied": True}),
}


@pytest.mark.parametrize("name", in_turn(MANY))
def test_delayed_updates_of_what_steps_share(name, tmp_path):
    """A table on two stages, masks and routers of two steps under way, sharded states, low precision."""
    plan, family, model = MANY[name]
    found = verify(
        job(tmp_path, plan if "8" in plan or "bf16" in plan else f"{plan} fp64", family, **model),
        brief=True,
    )
    assert found.equal, str(found)


LISTS = {
    "uneven": "0F0,0F1,0B0,0U0,0F2,0B1,0U1,0F3,0B2,0B3,0U3\n1F0,1B0,1U0,1F1,1B1,1F2,1B2,1U2,1F3,1B3,1U3",
    "halves": "0F0,0F1,0F2,0I0,0W0,0F3,0I1,0U0,0W1,0I2,0W2,0U2,0I3,0W3,0U3\n"
    "1F0,1I0,1F1,1I1,1W0,1U0,1W1,1F2,1I2,1W2,1F3,1U2,1I3,1W3,1U3",
    "vee": "0F0,0F1,3F0,3B0,3U0,0F2,3F1,3B1,0B0,0U0,0F3,3F2,3B2,0B1,3F3,3B3,3U3,0B2,0B3,0U3\n"
    "1F0,2F0,1F1,2F1,2B0,1B0,2U0,1U0,1F2,2F2,2B1,1B1,1F3,2F3,2B2,1B2,2B3,2U3,1B3,1U3",
}  # fmt: skip


def listed(folder, name, words="fp64"):
    path = folder / f"{name}.csv"
    path.write_text(LISTS[name])
    return f'pp2:"file:{path}"/4mb {words}'


@pytest.mark.parametrize(
    ("name", "words", "model"),
    [
        ("uneven", "dp_shard2.zero1 ep2 fp64", verify_jobs.EXPERTS),
        ("halves", "tp2+sp recompute:full fp64", {"layers": 3}),
        ("halves", "dp2 fp64 offload:cpu offload.targets=activations,gradients,optimizer", {"layers": 3}),
        ("vee", "dp2 fp64", {"layers": 4}),
        pytest.param("vee", "bf16 precision.rounding=stochastic", {"layers": 4}, marks=pytest.mark.slow),
        pytest.param("halves", "fp64", verify_jobs.EXPERTS, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_list_of_ones_own_equals_a_plain_loop(name, words, model, tmp_path):
    """Updates of one microbatch and of two, weight halves behind the next update, two stages a rank."""
    found = verify(job(tmp_path, listed(tmp_path, name, words), **model), brief=True)
    assert found.equal, str(found)
    assert found.traffic_equal and found.to_json()["reference"] == "delayed"


@pytest.mark.parametrize("name", LISTS)
def test_a_list_of_ones_own_holds_the_versions_it_states(name, tmp_path):
    made = longer(job(tmp_path, listed(tmp_path, name, "fp32"), layers=4, batch=8), 3)
    laid = lay(request_of(made))
    with local(2, 20) as ranks:
        seen = [max(h) for h in ranks.run(held, made)]
        old = [max(s) for *_, s in ranks.run(steps, made, lambda model, step: model.flow.staleness)]
    said = [stage_ledger(laid, p, laid.schedule).at_peak["parameters"] for p in range(2)]
    assert said == seen if name != "vee" else all(a >= b for a, b in zip(said, seen, strict=True))
    of = [laid.schedule.stages_of(p) for p in range(2)]
    assert old == [max(staleness(laid.schedule)[s] for s in mine) for mine in of]


def test_a_list_of_ones_own_ends_its_step_empty(tmp_path):
    """Drained or not; and a table that two stages hold has no update of its own there."""
    made = longer(job(tmp_path, listed(tmp_path, "uneven"), batch=8), 3)
    with local(2, 20) as ranks:
        full = ranks.run(steps, made)[0][0]
        drained = ranks.run(steps, made, lambda model, step: None, (0, 1, 2))[0][0]
    assert full == drained
    with pytest.raises(PlanError, match="the table that both hold takes one update"):
        verify(job(tmp_path, listed(tmp_path, "uneven"), tied=True))


def steps(world, job, look=lambda model, step: None, drained=()):
    """Trains; (losses, versions held at once at most, staleness), and what `look` saw after each step."""
    built = assemble(job, world)
    held, seen, losses = [], [], []
    versions = built.model.flow.versions
    update = versions.update

    def counted(apply):
        update(apply)
        held.append(len(versions.stash) + 1)

    versions.update = counted
    for step in range(job.train.steps):
        last = step + 1 == job.train.steps or step in drained
        losses.append(built.model.forward_backward(built.batch(step, last)))
        built.update.step()
        seen.append(look(built.model, step))
    return losses, max(held), versions.staleness, seen


def longer(job, steps):
    return replace(job, train=replace(job.train, steps=steps))


@pytest.mark.parametrize(
    ("name", "held", "stale"),
    [("pipedream", [4, 3, 2, 1], [3, 2, 1, 0]), ("pipedream_2bw", [2] * 4, [1] * 4)],
)
def test_versions_and_staleness_are_the_stated(name, held, stale, tmp_path):
    """Stage s of PipeDream holds p-s versions, p-1-s updates old; 2BW two on every stage, one old."""
    made = longer(job(tmp_path, f"pp4:{name}/4mb", batch=4), 4)
    with local(4, 20) as ranks:
        found = ranks.run(steps, made)
    assert [h for _, h, _, _ in found] == held
    assert [s for *_, s, _ in found] == stale


def losses_by_microbatch(world, job, spoilt=-1):
    """What the last stage's forwards return, in order; version `spoilt` is other weights once stashed."""
    built, losses = assemble(job, world), []
    executor, versions = built.model.executor, built.model.flow.versions
    last, update = executor.schedule.num_stages - 1, versions.update
    if last in executor.modules:
        module = executor.modules[last]

        def noted(x, batch):
            losses.append(module(x, batch))
            return losses[-1]

        def spoiling(apply):
            before = set(versions.stash)
            update(apply)
            if spoilt in set(versions.stash) - before:
                versions.stash[spoilt][0].add_(0.1)

        executor.modules, versions.update = {**executor.modules, last: noted}, spoiling
    for step in range(job.train.steps):
        built.model.forward_backward(built.batch(step, step + 1 == job.train.steps))
        built.update.step()
    return [loss.item() for loss in losses]


@pytest.mark.parametrize(
    ("plan", "spoilt", "users"),
    [
        ("pp2:pipedream_2bw/4mb", 1, [8, 9, 10, 11]),
        ("pp3:pipedream/4mb pipeline.vertical_sync=true", 5, [7]),
    ],
)
def test_a_perturbed_version_changes_the_microbatches_that_use_it(plan, spoilt, users, tmp_path):
    """At rate 0 all versions are equal: losses of those that use the stashed one change, and no other."""
    made = longer(job(tmp_path, f"{plan} fp64", batch=4), 4)
    made = replace(made, train=replace(made.train, lr=0.0, optimizer="sgd"))
    with local(made.plan.world_size, 20) as ranks:
        plain = ranks.run(losses_by_microbatch, made)[-1]
        changed = ranks.run(losses_by_microbatch, made, spoilt)[-1]
    assert len(plain) == 16
    assert [k for k in range(16) if plain[k] != changed[k]] == users


def test_a_drain_restarts_the_count(tmp_path):
    """Drained after each step, PipeDream is what it is from scratch; held full, it differs from step 2 on."""
    made = longer(job(tmp_path, "pp2:pipedream/4mb fp64", batch=4), 3)
    with local(2, 20) as ranks:
        full = ranks.run(steps, made)[0][0]
        drained = ranks.run(steps, made, lambda model, step: None, (0, 1, 2))[0][0]
    assert full[0] == drained[0]
    assert full[1] != drained[1]
    assert all(map(math.isfinite, full + drained))


def test_what_needs_synchrony_is_refused(tmp_path):
    """Clipping, fp16, shards of gradients, few microbatches: all at once, with the rule and a way out."""
    made = verify_jobs.job(tmp_path, "dp_shard2.zero2 pp4:pipedream/2mb fp16", "gpt2")
    with pytest.raises(PlanError, match="no gradient norm is there to clip by"):
        verify(made)
    made = replace(made, train=replace(made.train, clip_grad_norm=0.0))
    with pytest.raises(PlanError) as error:
        verify(made)
    rules = ["microbatches", "precision", "zero_stage"]
    assert [p.rule for p in error.value.problems if p.room == "pp"] == rules
    with local(2, 20) as ranks, pytest.raises(UsageError, match="drain"):
        ranks.run(evaluate_full, longer(job(tmp_path, "pp2:pipedream/4mb", batch=4), 3))


def evaluate_full(world, job):
    built = assemble(job, world)
    built.model.forward_backward(built.batch(0, drains=False))
    built.model.evaluate(built.batch(1))


@pytest.mark.parametrize(
    ("plan", "tied"),
    [
        ("pp4:pipedream/4mb fp32", False),
        ("pp4:pipedream/4mb bf16", True),
        ("pp4:pipedream_2bw/4mb fp32", True),
        ("pp4:pipedream_2bw/4mb bf16", False),
        ("dp_shard2.zero1 pp2:pipedream/4mb fp32", False),
        ("dp_shard2.zero1 pp2:pipedream_2bw/4mb bf16", True),
        ("pp4:pipedream/4mb bf16 precision.rounding=stochastic", True),
    ],
)
def test_the_memory_of_versions_is_what_ranks_hold(plan, tied, tmp_path):
    """Working weights and stashed versions, never more at once; masters apart from them under fp32 too."""
    made = longer(job(tmp_path, plan, tied=tied, batch=8), 3)
    laid = lay(request_of(made))
    with local(laid.mesh.world_size, 20) as ranks:
        seen = ranks.run(measured, made, tmp_path)
    for rank, most in enumerate(seen):
        place = laid.mesh.coords(rank)["pp"]
        said = stage_ledger(laid, place, laid.schedule).at_peak
        assert most["parameters"] == said["parameters"]
        assert 0 <= most["optimizer"] - said["optimizer"] < 100  # AdamW counts steps


def measured(world, job, folder):
    """The most of each category in a step behind the first two."""
    built = assemble(job, world)
    recorder, steps = StepRecorder(built, folder, job.train.steps), job.train.steps
    for step in range(steps):
        with recorder.step(step) if step == steps - 1 else nullcontext():
            built.model.forward_backward(built.batch(step, drains=step == steps - 1))
            built.update.step()
    return recorder.record.ledger.most


def held(world, job):
    """Bytes of weights of any version, looked at before each forward and backward and when a step ends."""
    built = assemble(job, world)
    model, flow, found = built.model, built.model.flow, []

    def look(act=lambda *at: None, *at):
        act(*at)
        tensors = [t for v in flow.each for stash in v.stash.values() for t in stash]
        tensors += [u.working for u in model.units]
        found.append(sum(t.numel() * t.element_size() for t in tensors))

    model.executor.weights = SimpleNamespace(
        forward=partial(look, flow.forward),
        backward=partial(look, flow.backward),
        adds=flow.adds,
    )
    for step in range(job.train.steps):
        model.forward_backward(built.batch(step, step + 1 == job.train.steps))
        look()
        built.update.step()
    return found
