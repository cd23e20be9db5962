"""What models have beside Llama's layer: norms behind segments, scores and logits through a tanh, another
gate, biases. Each equals one device, sends what is declared, and keeps and computes it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import test_drift
import torch
import verify_jobs

from partita.comm.threads.local import local
from partita.model import core
from partita.parallel.cp.tile import Capped
from partita.verify.parity import verify

CAPS = {"attention_softcap": 1.5, "logit_softcap": 2.0, "query_scalar": 7, "embedding_scale": 4.0}
WINDOWS = {"sliding_window": 3, "attention_pattern": "sf", "local_rope_theta": 50.0}
VARIANTS = {
    "gemma2": {**CAPS, **WINDOWS, "norm_placement": "both", "gate": "gelu", "tied": True},
    "post": {"norm_placement": "post"},
    "biased": {"qkv_bias": True, "wo_bias": True, "mlp_bias": True, "rotary_pct": 0.5},
}
PLANS = [
    ("gemma2", "pp2/2mb tp2+sp recompute:full recompute.collectives=keep"),
    ("gemma2", "cp4:hybrid2x2 dp_shard2.zero3 2mb recompute:selective recompute.modules=core,norm,act"),
    ("post", "tp2+sp cp2:ring 2mb recompute:selective recompute.modules=core,norm,act"),
    ("post", "pp2:zb_h1/2mb tp2 recompute:full"),
    ("biased", "tp2+sp dp_shard2.zero2 2mb"),
]  # fmt: skip


def job(folder, name, plan):
    return verify_jobs.job(folder, plan, **{"layers": 2, "head_dim": 8, **VARIANTS[name]})


@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_a_variant_equals_one_device(name, plan, tmp_path):
    found = verify(job(tmp_path, name, f"{plan} fp64"))
    assert found.equal and found.traffic_equal, str(found)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("less", ["", "recompute:selective recompute.modules=core,norm,act"])
def test_a_variant_keeps_and_computes_what_is_declared(name, less, tmp_path):
    made = job(tmp_path, name, f"tp2+sp 2mb bf16 {less}")
    with local(2, 20) as ranks:
        for rows in ranks.run(test_drift.look, made):
            for of, kept, declared, flops, planned in rows:
                assert kept == declared, (of, kept, declared)
                assert less or flops == planned, (of, flops, planned)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("causal", "scale"), [(True, None), (False, None), (True, Capped(0.3, 1.5))]
)
def test_a_window_in_bands_is_the_masked_square(causal, scale, packed, monkeypatch):
    """23 tokens in bands of 5: output and gradients; no band has keys that none of its queries sees."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, 23, 6, generator=draw, dtype=torch.float64, requires_grad=True)
        for h in (4, 2, 2)
    )
    documents = torch.arange(23).div(9, rounding_mode="floor").expand(2, -1) if packed else None
    batch, found = SimpleNamespace(documents=documents), []
    for size in (1000, 5):
        monkeypatch.setattr(core, "BAND", size)
        out = core.Flash(4, scale, causal=causal)(q, k, v, batch, 0, True)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        found.append((out, *torch.autograd.grad((out * weight).sum(), (q, k, v))))
    assert core.bands_of(23, 4, causal)[1] == (5, 10, 2, 10 if causal else 13)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
