"""Evaluation does not depend on the plan: the same sequences, the same mean."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import image_jobs
import numpy as np
import pytest
import verify_jobs

from partita.comm.threads.local import local
from partita.spec.job import Job
from partita.train.build import assemble
from partita.train.data import megatron
from partita.train.loop import Loop


def evaluated(world, job):
    """(mean, images known, tokens); a step behind it is as it was before: it drops what it dropped."""
    built = assemble(job, world)
    before = built.model.forward_backward(built.batch(0))
    found = built.held_out()
    assert built.model.forward_backward(built.batch(0)) == before
    tokens = sum(valid for _, valid in built.eval_batches())
    return found["eval_loss"], found.get("eval_accuracy"), tokens


def of_text(folder, plan):
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat and the dog sat on the log. " * 60)
    base = verify_jobs.job(folder, plan, vocab=256).to_table()
    return Job.load(
        {**base, "data": {"source": str(text), "tokenizer": "byte", "eval_fraction": 0.2}}
    )


def of_model(family, model, folder, plan):
    base = verify_jobs.job(folder, plan, family, **{"layers": 2, "vocab": 256, **model}).to_table()
    return Job.load({**base, "data": of_text(folder, plan).to_table()["data"]})


def of_documents(folder, plan):
    """Packed, held out like the text."""
    dice = np.random.default_rng(0)
    documents = [dice.integers(0, 256, n) for n in dice.integers(3, 12, 90)]
    megatron.write(folder / "packed", documents, vocab=256)
    source = {"source": str(folder / "packed"), "documents": "idx", "eval_fraction": 0.3}
    return Job.load({**of_text(folder, plan).to_table(), "data": source})


of_dropout = partial(of_model, "gpt2", {"dropout": 0.3})  # which no evaluation has
of_experts = partial(of_model, "llama", {**verify_jobs.EXPERTS, "layers": 2})


def of_images(folder, plan):
    job = image_jobs.job(folder, plan)
    return replace(job, data=replace(job.data, eval_fraction=0.4))


@pytest.mark.parametrize("made, plans", [
    (of_text, ("fp64", "tp2+sp pp2/2mb fp64", "dp8 fp64", "dp2 pp2/4mb fp64")),  # 76 sequences: 4 in the last
    (of_documents, ("fp64", "dp2 cp2:ring 2mb fp64")),
    (of_dropout, ("fp64", "dp_shard2.zero3 cp2:ring fp64")),
    (of_experts, ("fp64", "dp_shard2.zero3 ep2 cp2:ulysses 2mb fp64")),
    (of_images, ("fp64", "cp2:halo 2mb fp64")),
])  # fmt: skip
def test_every_plan_evaluates_to_the_same_loss(made, plans, tmp_path):
    results = []
    for plan in plans:
        job = made(tmp_path, plan)
        with local(job.plan.world_size, 20) as ranks:
            found = ranks.run(evaluated, job)
        assert len(set(found)) == 1
        results.append(found[0])
    losses = [loss for loss, _, _ in results]
    assert len({tuple(others) for _, *others in results}) == 1, results
    assert max(losses) - min(losses) < 1e-12


def test_what_is_held_out_is_looked_at_when_it_is_due_and_at_the_end():
    def looked(every, held=4):
        job = SimpleNamespace(train=SimpleNamespace(eval_every=every, steps=7))
        built = SimpleNamespace(data=SimpleNamespace(num_eval_sequences=held))
        loop = SimpleNamespace(job=job, built=built)
        return [step for step in range(1, 8) if Loop._evaluates(loop, step)]

    assert (looked(3), looked(0), looked(3, held=0)) == ([3, 6, 7], [7], [])


def stepped(world, job):
    """What a rank knows of steps: the loss, whether targets were counted, the norm; and what is told of the
    step without targets as it ends."""
    built, found, told = assemble(job, world), [], []
    for step in range(3):
        loss = built.model.forward_backward(built.batch(step, step == 2))
        told.append(built.model.told(loss))
        guess = built.model.guess
        if step == 2 and guess is not None:  # known only now
            found[1] = guess.found.loss, guess.found.has_targets, guess.found.norm
        found.append((loss, built.model.has_targets, built.update.step()))
    return *found[1:], told[1]


UNPROVEN = "pp2:gpipe/4mb pipeline.post_validation=true fp32"


@pytest.mark.parametrize(
    ("plan", "clip"),
    [("dp2 fp32", 1.0), ("pp2:dualpipe/4mb fp32", 1.0), (UNPROVEN, 1.0), (UNPROVEN, 1e-3)],
)
def test_a_step_that_counts_no_target_has_no_loss(plan, clip, tmp_path):
    """On no rank, of those that see no label either, nor where the step before it is clipped meanwhile; its
    gradients are 0, the next step has a loss."""
    made = verify_jobs.job(tmp_path, plan, layers=2)
    made = replace(made, train=replace(made.train, clip_grad_norm=clip))
    mask = np.ones(2000, np.int8)
    mask[8 * 8 : 16 * 8 + 1] = 0  # the second step's eight sequences of eight
    np.save(tmp_path / "mask.npy", mask)
    made = replace(made, data=replace(made.data, mask=str(tmp_path / "mask.npy")))
    with local(2, 20) as ranks:
        for nothing, then, told in ranks.run(stepped, made):
            assert nothing == (0.0, False, 0.0) and then[0] > 1.0 and then[1]
            assert told is None if plan != UNPROVEN else math.isnan(told)
