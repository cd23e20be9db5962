"""The JSON documents of `simulate` and `plan`."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from typing import Any

from partita.cost.machine import device_class, table
from partita.parallel.room import ARENAS
from partita.simulate import goodput, jitter, packed
from partita.simulate.groups import group_of
from partita.simulate.held import held, holders, peak_interval, shown_bytes
from partita.simulate.memory import arena_ledger
from partita.simulate.predict import Prediction

# of step times: where constants were fitted (docs/validation.md), and elsewhere
FITTED, UNFITTED = 0.15, 0.3
_EMPTY = {  # what is said of an illegal plan: a document of the same shape, and no number in it
    **dict.fromkeys(("step_time_s", "tokens_per_s", "tokens_per_s_per_device")),
    **dict.fromkeys(("mfu", "hfu", "bubble_fraction", "cost")),
    **dict.fromkeys(("jitter", "goodput", "routing", "packed")),
    "step_time_interval_s": [None, None],
    "memory": {
        "peak_bytes": None, "peak_interval_bytes": [None, None],
        "device_interval_bytes": [None, None], "limit_bytes": None, "per_rank": [],
    },
    "traffic": [],
    "time": {"compute_s": None, "exposed_comm_s": {}, "bubble_s": None, "optimizer_s": None},
}  # fmt: skip


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
        return head | deepcopy(_EMPTY)
    rate = p.tokens_per_step / p.step_time_s
    low, high = 1 - spread(p)[0], 1 + spread(p)[0]
    return head | {
        "step_time_s": p.step_time_s,
        "step_time_interval_s": [p.step_time_s * low, p.step_time_s * high],
        "tokens_per_s": rate,
        "tokens_per_s_per_device": rate / p.laid.mesh.world_size,
        "mfu": p.mfu,
        "hfu": p.hfu,
        "bubble_fraction": p.bubble_fraction,
        "memory": _memory(p),
        "traffic": _traffic(p),
        "time": p.time,
        "cost": _cost(p),
        **_outlook(p),
    }


def spread(p: Prediction) -> tuple[float, bool]:
    """How far a step may be off, either way, and whether published runs of such devices are in the fit."""
    fitted = device_class(p.device) in table()["device"]
    return FITTED if fitted else UNFITTED, fitted


def _traffic(p: Prediction) -> list[dict[str, Any]]:
    """The lines, each with the outermost link that its ranks meet over (a copy: its arena)."""
    assert p.job is not None and p.laid is not None
    links: dict[str, str] = {}
    for axis in {t.axis for t in p.traffic}:
        axes = tuple(axis.split("."))
        away = axis in ARENAS
        links[axis] = (
            axis if away else p.job.cluster.link_for(group_of(p.laid, axes, p.job.cluster)).name
        )
    return [
        {k: v for k, v in asdict(t).items() if k != "rank"} | {"link": links[t.axis]}
        for t in p.traffic
    ]


def _cost(p: Prediction) -> dict[str, Any] | None:
    """Money and energy of a step and of a token, where the cluster has prices."""
    assert p.job is not None and p.laid is not None and p.step_time_s is not None
    prices = p.job.cluster.prices
    if prices is None:
        return None
    held = p.laid.mesh.world_size * p.step_time_s
    money, energy = held * prices.money_per_s, held * prices.watts
    return {
        "currency": prices.currency,
        "money_per_step": money,
        "money_per_token": money / p.tokens_per_step,
        "energy_per_step_j": energy,
        "energy_per_token_j": energy / p.tokens_per_step,
    }


def _outlook(p: Prediction) -> dict[str, Any]:
    """What a long run and uneven ranks make of the step, where the cluster says how it fails and how
    unevenly it runs; else null."""
    assert p.job is not None and p.timed is not None and p.laid is not None
    assert p.step_time_s is not None
    found: dict[str, Any] = dict.fromkeys(("jitter", "goodput", "routing", "packed"))
    if p.job.data.documents is not None:
        found["packed"] = packed.outlook(p)
    if p.load is not None:
        at, factor = p.load.busiest(p.laid.sizes["ep"])
        found["routing"] = {"busiest_ep": at, "load": factor, "dropped": p.load.dropped}
    step_s, cluster, train = p.step_time_s, p.job.cluster, p.job.train
    if cluster.jitter is not None:
        t = p.timed
        found["jitter"] = jitter.outlook(
            p.laid, t.works, t.costs, cluster.jitter, (t.pipeline_s, step_s)
        )
        step_s = found["jitter"]["step_time_s"]["mean"]
    if cluster.reliability is not None:
        saved = max(_saved_bytes(p, place) for place in range(len(p.ledgers)))
        steps = (train.steps, train.checkpoint_every)
        world = p.laid.mesh.world_size
        found["goodput"] = goodput.outlook(cluster, world, saved, step_s, steps)
    return found


def _saved_bytes(p: Prediction, place: int) -> int:
    """Masters and moments, wherever they lie; working weights are read off the masters, where there are
    such: under an asynchronous schedule always."""
    assert p.job is not None and p.laid is not None
    arenas = [p.ledgers[place], *(arena_ledger(p.laid, place, a) for a in ("host", "disk"))]
    wide = p.job.plan.precision.dtype in ("fp32", "fp64")
    whole = wide and not p.laid.schedule.is_asynchronous
    saved = ("optimizer", "parameters") if whole else ("optimizer",)
    return sum(x.at_peak.get(c, 0) for x in arenas for c in saved)


def _memory(p: Prediction) -> dict[str, Any]:
    assert p.laid is not None
    peak = p.fullest.peak_bytes
    alike: list[list[int]] = [[] for _ in p.ledgers]
    for rank in range(p.laid.mesh.world_size):
        alike[p.laid.mesh.coords(rank)["pp"]].append(rank)
    return {
        "peak_bytes": peak,
        "peak_interval_bytes": list(peak_interval(peak)),
        "device_interval_bytes": list(shown_bytes(peak, device_class(p.device) == "CPU")),
        "limit_bytes": p.limit_bytes,
        "per_rank": [
            {
                "ranks": alike[i],
                **{
                    k: x.at_peak.get(k, 0)
                    for k in ("parameters", "gradients", "optimizer", "activations", "buffers")
                },
                "total": x.peak_bytes,
                "limit_bytes": p.limits[i],
                "host": arena_ledger(p.laid, i, "host").peak_bytes,
                "disk": arena_ledger(p.laid, i, "disk").peak_bytes,
                **_over_time(p, i),
            }
            for i, x in enumerate(p.ledgers)
        ],
    }


def _over_time(p: Prediction, place: int) -> dict[str, Any]:
    """When a place's peak is, who holds it, and the curve (of the spans that were played)."""
    assert p.laid is not None and p.schedule is not None and p.job is not None
    curve = held(p.laid, place, p.schedule, p.spans, p.ledgers[place])
    return {
        "peak": {"time_s": curve.peak_s, "during": curve.during},
        "holders": holders(p.laid, place, p.ledgers[place], p.job.cluster),
        "over_time": {
            "time_s": curve.times_s,
            "activations": curve.activations,
            "buffers": curve.buffers,
            "gradients": curve.gradients,
        },
    }
