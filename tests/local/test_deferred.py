"""Weight gradients that wait for their W: the same numbers bit for bit, and memory freed piece by piece."""

import gc
import weakref

import pytest
import torch
import verify_jobs

from partita.comm.threads.local import local
from partita.parallel.deferred import WeightQueue
from partita.schedule.ir import Action
from partita.train.build import assemble

HALVES = "F0 F1 I0 I1 W1 F2 F3 I3 W0 I2 W2 W3"


def actions(line):
    return tuple(Action(0, cell[0], int(cell[1:])) for cell in line.split())


def gradients(world, job, line):
    """Every unit's gradient after one step of a rank's list, and how much work is left over."""
    built = assemble(job, world)
    if line:
        built.model.executor.actions = actions(line)
    built.model.forward_backward(built.batch(0))
    queue = built.model.units[0].queue
    return {u.name: u.gradient.clone() for u in built.model.units}, len(queue)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    "plan", ["", "tp2", "tp2+sp", "dp2", "recompute:full", "tp2+sp recompute:full bf16"]
)
def test_two_halves_are_the_whole_bit_for_bit(plan, family, tmp_path):
    """The order in which microbatches are added decides rounding: W1 first, in both lists."""
    job = verify_jobs.job(tmp_path, f"{plan} 4mb", family, dropout=0.1 if family == "gpt2" else 0.0)
    with local(job.plan.world_size, 20) as ranks:
        whole = ranks.run(gradients, job, "F0 F1 B1 F2 F3 B0 B2 B3")
        halves = ranks.run(gradients, job, HALVES)
    for (want, _), (got, left) in zip(whole, halves, strict=True):
        assert left == 0
        for name, gradient in want.items():
            assert torch.equal(got[name], gradient), name
            assert gradient.abs().sum() > 0


@pytest.mark.parametrize("stop", [False, True])
def test_nothing_is_added_before_its_w(stop, tmp_path):
    """Until W, an I leaves every weight's gradient as it was: linears, biases, norms, tables."""
    job = verify_jobs.job(tmp_path, "1mb", "gpt2", tied=False, batch=1)
    with local(1) as ranks:
        ((found, left),) = ranks.run(gradients, job, "F0 I0" if stop else "F0 I0 W0")
    assert all((g.abs().sum() == 0) == stop for g in found.values())
    assert (left > 20) == stop


def test_work_lets_go_of_its_tensors_one_by_one():
    queue, seen = WeightQueue(), []
    queue.split(0, 0)
    tensors = [torch.ones(3) for _ in range(3)]
    alive = [weakref.ref(t) for t in tensors]
    for t in tensors:
        queue.add(lambda t: seen.append([r() is not None for r in alive]), t)
    queue.close()
    del tensors, t
    gc.collect()
    queue.add(seen.append, "at once")
    queue.run(0, 0)
    assert seen == ["at once", [True, True, True], [False, True, True], [False, False, True]]
    assert len(queue) == 0


def second_as_first(world, job, line, twice):
    """Gradients by weight where the second layer's weights are copies of the first's, or the first layer runs
    in its place."""
    built = assemble(job, world)
    built.model.executor.actions = actions(line)
    weights = built.model.units[0].weights()
    for name, weight in weights.items():
        if name.startswith("blocks.1"):
            weight.value.copy_(weights[name.replace("blocks.1", "blocks.0")].value)
    stage = built.model.executor.modules[0]
    if twice:
        blocks = list(stage.blocks)
        blocks[2] = blocks[1]
        stage.blocks = tuple(blocks)
    loss = built.model.forward_backward(built.batch(0))
    return loss, {name: weight.gradient.clone() for name, weight in weights.items()}


@pytest.mark.parametrize("plan", ["", "recompute:full"])
def test_a_layer_that_runs_twice_in_a_stage(plan, tmp_path):
    """Its gradient, in two halves, is the sum of those of two equal layers."""
    job = verify_jobs.job(tmp_path, f"{plan} fp64 4mb")
    with local(1) as ranks:
        ((want, copies),) = ranks.run(second_as_first, job, HALVES, False)
        ((loss, found),) = ranks.run(second_as_first, job, HALVES, True)
    assert loss == want
    for name, gradient in found.items():
        other = copies[name.replace("blocks.0", "blocks.1")]
        if name.startswith("blocks.0"):
            assert torch.allclose(gradient, copies[name] + other, rtol=1e-12, atol=1e-15), name
        else:
            assert torch.equal(gradient, torch.zeros_like(gradient)) == name.startswith("blocks.1")
