"""What `partita plan` answers: the document of the contract, and a ranked table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from partita.base.text import table
from partita.base.units import format_bytes, format_seconds
from partita.planner.answers.ask import Answer
from partita.planner.search.search import Found, measures
from partita.simulate.predict import Prediction

HEADER = ("", "plan", "step", "memory", "MFU", "bubble", "devices")


def document(answer: Answer) -> dict[str, Any]:
    """The JSON of a search; the plan predicted best has the reasons, the document where there is none."""
    found, solved, texts = answer.found, answer.solved, list(answer.texts)
    told: dict[str, Any] = {
        "plans": [_plan(answer, p) for p in answer.plans],
        "considered": found.considered,
        "rejected": {reason: n for reason, n in found.rejected.items() if n},
        "bounded": found.bounded,
        "simulated": found.simulated,
        "complete": found.complete,
        "not_searched": list(found.not_searched),
        "seconds": found.seconds,
    }
    if answer.survive:
        told["survive"] = [
            {"ranks": n, "plan": p and p.plan, "step_time_s": p and p.step_time_s}
            for n, p in answer.survive.items()
        ]
    if answer.measured:
        told["others"] = answer.others
    if solved is not None:
        keys = ("field", "value", "unit", "proven")
        told["solve"] = {key: getattr(solved, key) for key in keys}
    elif not answer.plans:
        told["why"] = texts
    return told


def _plan(answer: Answer, p: Prediction) -> dict[str, Any]:
    best = answer.found.plans and answer.found.plans[0] is p  # which the reasons are of
    ran = answer.measured.get(p.plan)
    told = p.to_json() | {"why": list(answer.texts) if best else []}
    seen = {"step_time_s": ran[0], "peak_bytes": ran[1]} if ran is not None else None
    return told | {"measured": seen}


def ranked(plans: Sequence[Prediction]) -> str:
    """One line a plan, best first; with money where the cluster has prices."""
    rows, prices = [], plans[0].job.cluster.prices if plans and plans[0].job else None
    for i, p in enumerate(plans):
        seconds, num_bytes, world = measures(p)
        cells = [f"{p.mfu:.1%}", f"{p.bubble_fraction:.1%}", str(world)]
        if prices is not None:
            each = world * seconds / p.tokens_per_step * 1e6
            cells.append(f"{each * prices.money_per_s:.4g} {prices.currency}")
            cells += [f"{each * prices.watts / 3.6e6:.4g} kWh"] if prices.watts else []
        rows.append([str(i + 1), p.plan, format_seconds(seconds), format_bytes(num_bytes), *cells])
    header = (*HEADER, "a million tokens") if prices is not None else HEADER
    header += ("",) if prices is not None and prices.watts else ()
    return table(rows, header=header)


def counts(found: Found) -> str:
    """How much was cut, and by what."""
    refused = ", ".join(f"{why} ({n:,})" for why, n in found.rejected.most_common() if n)
    proof = "the best is proven" if found.plans else "that none fits is proven"
    proof = proof if found.complete else "stopped by its budget: not proven"
    if found.unproven:
        proof += f" over {' and '.join(found.unproven)}, proven over all else"
    if found.complete and found.not_searched:
        proof += f" (not searched: {'; '.join(found.not_searched)})"
    if found.by_rates:
        proof = (
            "not proven: devices differ, and this search takes each for the weakest; "
            f"beside it {found.by_rates} plans were simulated with layers by what their devices reach"
        )
    if found.more:
        proof = f"{len(found.plans)} plans of the front, which may have more"
    beside = (
        _many(found.near, "change of one choice", "changes of one choice"),
        _many(found.turned, "other order of axes", "other orders of axes"),
        _many(found.split, "other split of layers", "other splits of layers"),
        _many(found.made, "schedule made for them", "schedules made for them"),
    )
    told = ", ".join(filter(None, beside))
    told = f"; of the best plans {told}" if told else ""
    told += _beaten(found)
    cut = "cut by their bound" + ("" if found.complete else " or not looked at")
    return (
        f"{found.considered:,} plans in {format_seconds(found.seconds)}: {found.bounded:,} {cut}, "
        f"{found.simulated:,} simulated, refused: {refused or 'none'}; {proof}{told}"
    )


def _beaten(found: Found) -> str:
    """By how much a plan with another split or a schedule made for it could be faster than the best."""
    if not found.least_s:
        return ""
    best = found.plans[0].step_time_s or 0.0
    alike = "; of plans with its precision and axes in the order that all are searched in"
    if found.least_s >= best:
        return f"{alike} no other split of layers and no schedule made for one is faster"
    least = f"{format_seconds(found.least_s)} at least ({found.least_s / best - 1:+.1%})"
    return f"{alike} one with another split of layers or a made schedule takes {least}"


def _many(count: int, one: str, more: str) -> str:
    return f"{count} {one if count == 1 else more}" if count else ""
