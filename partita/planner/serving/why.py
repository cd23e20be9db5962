"""The answer of `plan --serve`: the table, why the best plan is the best, what would do where none does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from partita.base.text import table
from partita.base.units import format_bytes, format_count, format_seconds
from partita.planner.answers.solve import with_devices
from partita.planner.serving.search import FoundServing, Wanted, search
from partita.simulate.serving.predict import Asked, Serving, engine, predict, steps_of
from partita.simulate.serving.told import says, to_json
from partita.spec.plan import Plan

HEADER = (
    "", "plan", "step", "first token", "then each", "tokens/s", "a device", "memory", "requests", "MFU",
    "memory's rate", "binds",
)  # fmt: skip
MORE = 1 << 16  # times the devices, at most, that are looked at where nothing fits
Read = Callable[[Serving], object]
AXES: tuple[tuple[str, Read], ...] = (
    ("pp", lambda p: p.plan.mesh.pp),
    ("tp", lambda p: p.plan.mesh.tp),
    ("sp", lambda p: p.plan.mesh.sp),
    ("ep", lambda p: p.plan.mesh.ep),
    ("engines", lambda p: p.engines),
    ("step", lambda p: p.asked.load.max_batch_tokens),
)


def ranked(plans: Sequence[Serving]) -> str:
    """One line a plan, best first."""
    rows = []
    for i, p in enumerate(plans):
        r, h = p.rates, p.fullest
        assert r is not None
        step = str(p.asked.load.max_batch_tokens)
        rates = format_count(p.tokens_per_s or 0), format_count(p.tokens_per_s_per_device or 0)
        held = format_bytes(h.weights + h.step)
        shares = f"{p.mfu:.1%}", f"{p.mbu:.0%}", says(p.binds)
        cells = format_seconds(r.ttft_s), format_seconds(r.itl_s), *rates, held
        rows.append([str(i + 1), p.line, step, *cells, str(p.most_sequences * p.engines), *shares])
    return table(rows, header=HEADER)


def curve(best: Serving) -> list[Serving]:
    """The plan with other numbers of requests at once: powers of two up to twice what is asked."""
    asked, steps = best.asked, steps_of(best.asked, engine(best.plan))
    found, many = list[Serving](), 1
    while many <= 2 * asked.load.concurrency:
        load = replace(asked.load, concurrency=many)
        p = predict(replace(asked, load=load), best.plan, steps)
        found += [p] if p.rates is not None and p.rates.running == p.each else []
        many *= 2
    return found


def curve_table(plans: Sequence[Serving]) -> str:
    """One line a number of requests."""
    rows = []
    for p in plans:
        assert p.rates is not None and p.tokens_per_s is not None
        times = format_seconds(p.rates.ttft_s), format_seconds(p.rates.itl_s)
        rates = format_count(p.tokens_per_s), f"{p.mfu:.1%}", f"{p.mbu:.0%}", says(p.binds)
        rows.append([str(p.asked.load.concurrency), *times, *rates])
    header = ("at once", "first token", "then each", "tokens/s", "MFU", "memory's rate", "binds")
    return table(rows, header=header)


def curve_json(plans: Sequence[Serving]) -> list[dict[str, Any]]:
    """The same as data."""
    fields = ("ttft_s", "itl_s", "tokens_per_s", "mfu", "mbu", "binds")
    every = ((p.asked.load.concurrency, to_json(p)) for p in plans)
    return [{"concurrency": n, **{f: told[f] for f in fields}} for n, told in every]


def counts(found: FoundServing) -> str:
    """How many there were, and what the others were refused for."""
    refused = ", ".join(f"{why} ({n:,})" for why, n in found.rejected.most_common())
    return (
        f"{found.considered:,} plans in {format_seconds(found.seconds)}, all predicted; "
        f"refused: {refused or 'none'}"
    )


def why(found: FoundServing, wanted: Wanted) -> list[str]:
    """What each choice of the best plan is held against: the best that has another."""
    best, texts = found.plans[0], list[str]()
    for name, read in AXES:
        others = (p for p in found.plans if read(p) != read(best))
        other = next(others, None)
        if other is not None:
            texts.append(f"{name}: {_beside(best, other, wanted)}")
    return [*texts, start(best)]


def _beside(best: Serving, other: Serving, wanted: Wanted) -> str:
    stated = other.line
    if other.plan == best.plan:
        stated = f"steps of {other.asked.load.max_batch_tokens} tokens"
    if wanted.goal == "latency":
        a, b = format_seconds(best.request_s), format_seconds(other.request_s)
        text = f"a request takes {a}, under {stated} {b}"
    elif wanted.goal == "devices" and best.plan.world_size != other.plan.world_size:
        text = f"{best.plan.world_size} devices, {stated} takes {other.plan.world_size}"
    else:
        a, b = format_count(best.tokens_per_s or 0), format_count(other.tokens_per_s or 0)
        text = f"{a} tokens/s, under {stated} {b}"
    return f"{text}, most of a step {says(other.binds)}"


def start(p: Serving) -> str:
    """How its engine is started: ranks that are threads would share one device."""
    own, step = engine(p.plan), p.asked.load.max_batch_tokens
    assert p.rates is not None
    stated = f'--plan "{own}" ' if own != Plan() else ""
    stated += "--backend processes " if own.world_size > 1 else ""
    words = (
        f"partita serve FOLDER {stated}--dtype {p.asked.dtype} --pages {p.pages} "
        f"--max-sequences {min(p.rates.running, step)} --max-batch-tokens {step}"
    )
    more = f", {p.engines} times, each on devices of its own" if p.engines > 1 else ""
    return f"start: {words}{more}"


def would_do(
    asked: Asked, wanted: Wanted, found: FoundServing, budget_s: float = 60.0
) -> list[str]:
    """Where no plan does: by how much the nearest fails, and what would, looked for in so many seconds."""
    texts = list(_missed(wanted, found))
    if not texts:
        return [f"no plan is legal: {found.wrong}"]
    if asked.dtype == "fp32" and search(replace(asked, dtype="bf16"), wanted).plans:
        texts.append("in bf16 a plan does (--precision bf16)")
    tried = 0
    for devices in _more_devices(asked, budget_s):
        grown = replace(asked, cluster=with_devices(asked.cluster, devices))
        more = search(grown, replace(wanted, goal="devices"))
        if more.plans:
            p = more.plans[0]
            texts.append(f"{p.plan.world_size} such devices do: {p.line}")
            return texts
        tried = devices
    if tried:
        texts.append(f"up to {tried} such devices no plan does that holds all requests at once")
    return texts


def _more_devices(asked: Asked, budget_s: float) -> Iterator[int]:
    """Twice as many, over and over; a search of twice the devices takes as long as all before it."""
    if asked.cluster.nodes or not asked.cluster.links:
        return
    devices = asked.cluster.devices
    most = min(1024, devices * MORE)
    begin = time.perf_counter()
    while (devices := 2 * devices) <= most and 2 * (time.perf_counter() - begin) < budget_s:
        yield devices


def _missed(wanted: Wanted, found: FoundServing) -> Iterator[str]:
    if found.late:
        first = min(found.late, key=lambda p: p.rates.ttft_s if p.rates else 0.0)
        each = min(found.late, key=lambda p: p.rates.itl_s if p.rates else 0.0)
        assert first.rates is not None and each.rates is not None
        if wanted.max_ttft_s is not None:
            soonest = format_seconds(first.rates.ttft_s)
            yield f"the first token comes after {soonest} at the soonest: {first.line}"
        if wanted.max_itl_s is not None:
            yield f"a token comes every {format_seconds(each.rates.itl_s)} at the best: {each.line}"
        most = max(found.late, key=lambda p: p.most_sequences * p.engines)
        if wanted.goal == "devices" and most.rates and most.rates.running < most.each:
            yield f"{most.most_sequences * most.engines} requests fit at once: {most.line}"
    elif found.too_big:
        near = max(found.too_big, key=lambda p: p.kv_tokens)
        yield f"{near.line}: {near.problems[0].message}"


def document(plans: Sequence[Serving], found: FoundServing, texts: list[str]) -> dict[str, Any]:
    """The JSON: as of every search, with plans of serving."""
    told: dict[str, Any] = {
        "plans": [to_json(p) | {"why": texts if i == 0 else []} for i, p in enumerate(plans)],
        "considered": found.considered,
        "rejected": dict(found.rejected),
        "bounded": 0,
        "simulated": found.considered - sum(n for r, n in found.rejected.items() if " " in r),
        "complete": True,
        "seconds": found.seconds,
    }
    if plans and plans[0].rates is not None:
        told["plans"][0]["by_concurrency"] = curve_json(curve(plans[0]))
    return told if plans else told | {"why": texts}
