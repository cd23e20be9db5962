"""What models have beside Llama's layer: norms behind segments, scores and logits through a tanh, another
gate, biases. Each equals one device, sends what is declared, and keeps and computes it."""

from __future__ import annotations

import pytest
import test_drift
import verify_jobs

from partita.comm.threads.local import local
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
