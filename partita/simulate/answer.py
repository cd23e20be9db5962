"""The JSON documents of `simulate` and `plan`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from partita.cost.machine import device_class, table

if TYPE_CHECKING:
    from partita.simulate.predict import Prediction

# of step times: where constants were fitted (docs/validation.md), and elsewhere
FITTED, UNFITTED = 0.15, 0.3
_EMPTY = (
    "step_time_s", "step_time_interval_s", "tokens_per_s", "tokens_per_s_per_device", "mfu", "hfu",
    "bubble_fraction", "memory", "traffic", "time",
)  # fmt: skip


def to_json(p: Prediction) -> dict[str, Any]:
    """All fields of the contract; null for every number of an illegal plan."""
    head: dict[str, Any] = {
        "format": 1,
        "plan": p.plan,
        "problems": [asdict(x) for x in p.problems],
        "fits": p.fits,
        "flops_convention": "model_causal",
    }
    if p.step_time_s is None or p.laid is None:
        return head | dict.fromkeys(_EMPTY)
    rate = p.tokens_per_step / p.step_time_s
    spread = FITTED if device_class(p.device) in table()["device"] else UNFITTED
    low, high = 1 - spread, 1 + spread
    return head | {
        "step_time_s": p.step_time_s,
        "step_time_interval_s": [p.step_time_s * low, p.step_time_s * high],
        "tokens_per_s": rate,
        "tokens_per_s_per_device": rate / p.laid.mesh.world_size,
        "mfu": p.mfu,
        "hfu": p.hfu,
        "bubble_fraction": p.bubble_fraction,
        "memory": _memory(p),
        "traffic": [{k: v for k, v in asdict(t).items() if k != "rank"} for t in p.traffic],
        "time": p.time,
    }


def _memory(p: Prediction) -> dict[str, Any]:
    assert p.laid is not None
    peak = max(x.peak_bytes for x in p.ledgers)
    return {
        "peak_bytes": peak,
        "peak_interval_bytes": [int(peak * 0.95), int(peak * 1.05)],
        "limit_bytes": p.limit_bytes,
        "per_rank": [
            {
                "ranks": [
                    r for r in range(p.laid.mesh.world_size) if p.laid.mesh.coords(r)["pp"] == i
                ],
                **{
                    k: x.at_peak.get(k, 0)
                    for k in ("parameters", "gradients", "optimizer", "activations", "buffers")
                },
                "total": x.peak_bytes,
                "host": 0,
                "disk": 0,
            }
            for i, x in enumerate(p.ledgers)
        ],
    }
