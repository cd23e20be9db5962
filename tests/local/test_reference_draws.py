"""The judge draws its own numbers: they are the plan's, and a fault in the plan's is seen by verify."""

import pytest
import torch
import verify_jobs

from partita.comm.random import seeds
from partita.model import dropout
from partita.model import reference_draws as own
from partita.train import build
from partita.verify.parity import verify

SHAPE, BOX = (7, 3, 5), ((2, 6), (0, 3), (1, 4))
PART = tuple(slice(a, b) for a, b in BOX)


def test_they_are_the_plans(monkeypatch):
    monkeypatch.setattr(seeds, "CHUNK", 16)
    for name in (
        "blocks.1.attention.wo",
        "blocks.1.mlp.fc1",
        "embedding.kernel",
        "head.norm",
        "head.norm_bias",
    ):
        whole = own.new_weight(5, name, SHAPE, 3)
        assert torch.equal(whole[PART], seeds.initial_value(5, name, SHAPE, BOX, layers=3)), name
    samples = torch.tensor([0, 3, 2**20])
    kept = own.kept(5, 9, "site", samples.tolist(), SHAPE, 0.3)
    box = seeds.dropout_box(5, 9, "site", samples, shape=SHAPE, box=BOX, p=0.3)
    assert torch.equal(kept[(slice(None), *PART)], box)
    for dtype in (torch.float32, torch.float64):
        values = own.normals(5, "v", SHAPE, 2.0).to(dtype)
        part = seeds.rounded_box(values[PART].contiguous(), 5, 9, "w", SHAPE, BOX)
        assert torch.equal(own.rounded(values, 5, 9, "w")[PART], part) and part.dtype == dtype
        for size in (1.0, 2.0**-12, 2.0**-20, 3e4):  # of fp16, numbers without a leading one too
            part = seeds.rounded_box(
                (values * size)[PART].contiguous(), 5, 9, "w", SHAPE, BOX, half=True
            )
            assert torch.equal(own.rounded(values * size, 5, 9, "w", half=True)[PART], part)
            assert torch.equal(part.half().to(dtype), part)


def wider(seed, name, *rest, real=seeds.initial_value, **more):
    return real(seed, name, *rest, **more) * (1.01 if name == "blocks.2.mlp.fc2" else 1)


def without_step(seed, step, *rest, real=seeds.dropout_box, **more):
    return real(seed, 1, *rest, **more)


@pytest.mark.parametrize(
    ("module", "name", "fault", "where"),
    [
        (build, "initial_value", wider, "blocks.2.mlp"),
        (dropout, "dropout_box", without_step, "embedding"),
    ],
)
def test_a_fault_in_the_plans_is_seen(module, name, fault, where, tmp_path, monkeypatch):
    monkeypatch.setattr(module, name, fault)
    found = verify(verify_jobs.job(tmp_path, "tp2 fp64", "gpt2", dropout=0.1))
    assert not found.equal
    assert (found.divergence.phase, found.divergence.module) == ("forward", where)
