"""Runners on one GPU that thread ranks share: equal to the reference in float64, near it at 16 bits."""

from __future__ import annotations

from contextlib import closing

import pytest
from gpu_jobs import DEVICE
from serve_models import FAMILIES, greatest_difference, model, opening

from partita.serve.runner import started

PLANS = [
    ("tp2", "llama"), ("tp2+sp", "gpt2"), ("pp2", "latent"), ("tp2 pp2", "sliding"), ("ep2 dp2", "moe"),
]  # fmt: skip
WIDE = {"head_dim": 16}  # that kernels take


@pytest.mark.parametrize(("plan", "family"), [*(("", f) for f in FAMILIES), *PLANS])
def test_logits_equal_the_reference(plan, family):
    spec = model(family)
    with closing(started(opening(spec, plan, "fp64", DEVICE.type))) as runner:
        assert greatest_difference(runner, spec) < 1e-9


@pytest.mark.parametrize("family", ["llama", "sliding", "bloom"])
def test_logits_of_16_bits_are_near(family):
    spec = model(family, hidden=64, **({} if family == "bloom" else WIDE))
    with closing(started(opening(spec, "", "bf16", DEVICE.type))) as runner:
        assert greatest_difference(runner, spec) < 2.0  # of logits of about 10
