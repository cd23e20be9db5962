"""How far verify lets low precision go: not for weights at which roundings carry further, and no further."""

from dataclasses import replace

import image_jobs
import pytest
import torch
import verify_jobs

from partita.verify.batches import open_data
from partita.verify.compare import ROUNDING, UPDATE, differences, walk
from partita.verify.delayed import run_delayed
from partita.verify.parity import verify
from partita.verify.runs import RankSeen, StepSeen, neighbours, run_judge, weights_after

BOX = ((0, 8), (0, 8))


@pytest.fixture
def job(tmp_path):
    """Heads of 4 numbers that are normalised; in trial 5 a token's keys almost cancel."""
    made = verify_jobs.job(tmp_path, "tp2 bf16", tied=True, layers=2, qkv_bias=True, qk_norm=True)
    return replace(made, seed=5)


def seen(gradients, weights):
    return StepSeen(1.0, 1.0, {"w": gradients}, {"w": weights})


def held(job, gradients, weights, judge, near=()):
    """Whether one tensor is held to be right; judge and neighbours are (gradient, weight)."""
    rank = RankSeen(0, [seen([(BOX, gradients)], [(BOX, weights)])])
    others = [[seen(g, judge[1])] for g in near]
    found = differences([seen(*judge)], [rank], job, neighbours=others)
    return not any(d.bad for d in found)


def test_norms_of_few_numbers_carry_roundings_further_and_hide_no_fault(job):
    found = verify(job, brief=True)
    assert found.equal, str(found)
    trial = found.trials[-1]
    starts, u = weights_after(trial.job, trial.ranks), ROUNDING["bf16"]
    for rank in trial.ranks:
        for _, part in rank.steps[0].gradients["blocks.0.attention.wk"]:
            part.mul_(1.16)
    data = open_data(trial.job, job)
    near = [
        run_judge(trial.job, data, starts=starts, moved=moved)[0]
        for moved in neighbours(trial.job, u)
    ]
    faults = differences(trial.judge, trial.ranks, trial.job, neighbours=near)
    assert {d.name for d in faults if d.bad and d.kind == "gradients"} == {"blocks.0.attention.wk"}


def test_a_gradient_beyond_the_walk_is_held_to_the_judges_neighbours(job):
    torch.manual_seed(0)
    g, w = torch.randn(8, 8), torch.randn(8, 8)
    s = walk("bf16", job.model.layers)
    assert held(job, g * (1 + s), w, (g, w)) and not held(job, g * (1 + 3 * s), w, (g, w))
    assert held(job, g * (1 + 3 * s), w, (g, w), [g * (1 + s), g * (1 - s)])
    assert not held(job, g * (1 + 5 * s), w, (g, w), [g * (1 + s), g * (1 - s)])


def test_delayed_updates_of_images_are_held_to_the_judges_neighbours(tmp_path):
    """A ReLU that a rounding turns puts the last microbatch's gradient of a bias off by 1.7 of its largest
    element; three times the gradients are beyond what the judge's neighbours do."""
    job = image_jobs.job(tmp_path, "pp2:pipedream/4mb split2 bf16")
    job = replace(job, seed=6, train=replace(job.train, clip_grad_norm=0.0))
    found = verify(job, brief=True)
    assert found.equal, str(found)
    trial = found.trials[-1]
    assert any(d.bad for d in differences(trial.judge, trial.ranks, trial.job, True))
    data = open_data(trial.job, job)
    near = [run_delayed(trial.job, data, moved=m) for m in neighbours(trial.job, ROUNDING["bf16"])]
    for rank in trial.ranks:
        for parts in rank.steps[0].gradients.values():
            for _, part in parts:
                part.mul_(3)
    found = differences(trial.judge, trial.ranks, trial.job, True, near)
    assert any(d.bad and d.kind == "gradients" for d in found)


def test_what_an_update_leaves_of_a_weight_is_fp32s_last_bits(job):
    """0.0100098 minus AdamW's first step of 0.01: -1.97e-7 by one kernel, -1.99e-7 by another."""
    job = job.with_plan("tp2 bf16 precision.rounding=stochastic")
    g, w = torch.randn(8, 8), torch.full((8, 8), 0.25)
    w[0, 0] = -1.993030e-7
    mine = w.clone()
    mine[0, 0] = -1.974404e-7
    assert held(job, g, mine, (g, w))
    mine[0, 0] += 3 * UPDATE * 0.25
    assert not held(job, g, mine, (g, w))
    mine = w.clone()
    mine[1, 1] = 0.25 * (1 + 2.0**-6)  # two of its last bits away
    assert not held(job, g, mine, (g, w))


def test_an_overflow_at_the_edge_may_be_on_one_side_but_not_of_one_rank(tmp_path):
    """Held to the judge at another loss scale, which overflows as the plan does; its numbers still count."""
    job, (g, w) = verify_jobs.job(tmp_path, "tp2 fp16", layers=2), torch.ones(2, 8, 8)

    def wrong(norms, judge, *scaled, off=1.0):
        def steps(norm, gradients, weights):
            return [StepSeen(1.0, norm, {"w": gradients}, {"w": weights})]

        ranks = [RankSeen(i, steps(n, [(BOX, g * off)], [(BOX, w)])) for i, n in enumerate(norms)]
        others = [steps(n, g, w) for n in scaled]
        found = differences(steps(judge, g, w), ranks, job, scaled=others)
        return {d.kind for d in found if d.bad}

    inf = float("inf")
    assert wrong([inf, inf], 1.0) == wrong([1.0, 1.0], inf) == {"grad_norm"}
    assert not wrong([inf, inf], 1.0, 1.0, inf) and not wrong([1.0, 1.0], inf, 1.0, inf)
    assert wrong([inf, 1.0], 1.0, 1.0, inf) == {"grad_norm"}
    assert wrong([1.0, 1.0], inf, 1.0, inf, off=1.1) == {"gradients"}
