"""What a small microbatch takes is never below what an endless one tells of it, and close to it."""

from __future__ import annotations

import random

import numpy as np
import pytest

import partita as pt
from partita.planner.bounds.bound import ENDLESS, SLACK
from partita.planner.bounds.columns import TIMES
from partita.planner.bounds.rough import HIDES, halves
from partita.planner.bounds.table import Table
from partita.planner.search.search import searcher
from partita.planner.space import Tokens

QUESTIONS = (
    ("deepseek-v3", "2048xh100", 15360, 4096, 0.05),
    ("mixtral-8x7b", "64xa100-80gb", 512, 4096, 0.005),
    ("llama3-8b", "32xh100", 256, 8192, 0.01),
)


@pytest.mark.parametrize("question", QUESTIONS, ids=[q[0] for q in QUESTIONS])
def test_no_microbatch_takes_less_than_an_endless_one_tells(question):
    model, cluster, batch, length, gained = question
    rng = random.Random(7)
    told: list[float] = []
    plain: list[float] = []
    job = pt.Job.of(model, cluster, "", global_batch_size=batch, seq_len=length)
    search = searcher(job)
    bounds, meshes = search.bounds, list(search.space.meshes())
    while len(told) < 40:
        mesh = rng.choice(meshes)
        shape, mode = rng.choice(search.space.shapes(mesh)), rng.choice(search.space.modes())
        samples = rng.choice((1, 2, 3, 4, 8, 16))
        endless = bounds.table(mesh, shape, Tokens(*mode, ENDLESS))
        small = bounds.table(mesh, shape, Tokens(*mode, samples))
        if not isinstance(endless, Table) or not isinstance(small, Table):
            continue
        share, split = np.array([SLACK * samples / ENDLESS]), (len(endless.at) - 2,)
        for hides in (0.0, HIDES):
            least = halves(endless.stages(split), share, hides)
            takes = halves(small.stages(split), np.ones(1), hides)
            for low, high in zip(least[:3], takes[:3], strict=True):
                assert low <= high * (1 + 1e-9), (mesh, shape, mode, samples, hides)
        even = endless.stages(split)[0, TIMES] * share, small.stages(split)[0, TIMES]
        least = halves(endless.stages(split), share)
        told.append(float(least.forward[0, 0] + least.whole[0, 0]) / even[1].sum())
        plain.append(even[0].sum() / even[1].sum())
    assert np.mean(told) > np.mean(plain) + gained
