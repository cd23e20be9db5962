"""Routing that is not even: loads, drops, and what the straggling place costs."""

import json

import pytest

import partita as pt
from partita.base.errors import UsageError
from partita.parallel.ep.counts import rows
from partita.parallel.laid import lay
from partita.simulate.imbalance import Load, straggler
from partita.simulate.predict import request_of

PLAN = "dp_shard8.zero1 ep4 etp2 tp2+sp bf16"


def job(plan=PLAN, **model):
    spec = {"preset": "mixtral-8x7b", **model}
    cluster = {"device": "h100", "devices": 16}
    return pt.Job.of(spec, cluster, plan, global_batch_size=8, seq_len=4096)


def test_an_even_load_is_the_prediction_without_one():
    even, none = pt.simulate(job(), load=Load.balanced(8)), pt.simulate(job())
    assert even.step_time_s == none.step_time_s
    assert even.ledgers == none.ledgers
    assert even.traffic == none.traffic


def test_the_stragglers_rows_are_those_that_routing_counts_say():
    """Every rank routes 3/8 of its rows to expert 2, the rest evenly: the rows of the fullest place are those
    that the runtime computes from the same counts."""
    laid = lay(request_of(job()))
    sent = 4096
    counts = [sent * 3 // 8 if e == 2 else sent * 5 // 56 for e in range(8)]
    counts[7] += sent - sum(counts)
    load = Load.counts(counts)
    place, factor = load.busiest(4)
    assert place == 1
    assert factor == pytest.approx(4 * (3 / 8 + 5 / 56), rel=1e-3)
    mesh = laid.mesh
    rank = next(r for r in range(mesh.world_size) if mesh.coords(r)["ep"] == place)
    exact = rows(mesh, dict.fromkeys(range(mesh.world_size), counts), rank, False)
    found = straggler(laid, load).rows
    assert found == {k: pytest.approx(exact[k], abs=1) for k in found}
    assert set(found) == {"arrivals", "gathered", "padded", "spread"}


def test_a_longer_tail_costs_more_time_and_memory():
    steps = [pt.simulate(job(), load=Load.zipf(8, s)) for s in (0.0, 0.5, 1.0, 2.0)]
    times = [p.step_time_s for p in steps]
    peaks = [max(x.peak_bytes for x in p.ledgers) for p in steps]
    assert times == sorted(times)
    assert times[0] < times[-1]
    assert peaks == sorted(peaks)
    assert peaks[0] < peaks[-1]
    assert times[0] == pytest.approx(pt.simulate(job()).step_time_s, rel=1e-6)


def test_a_capacity_bounds_the_straggler_and_drops():
    load = Load.zipf(8, 2.0)
    kept = load.limited(1.0)
    assert kept.busiest(8)[1] <= 1.0 + 1e-12
    assert kept.dropped == pytest.approx(1 - sum(min(s, 1 / 8) for s in load.shares))
    assert load.limited(None).dropped == pytest.approx(0.0)
    p = pt.simulate(job("dp_shard8.zero1 ep8 tp2+sp bf16", capacity_factor=1.0), load=load)
    assert p.load is not None
    assert p.to_json()["routing"]["load"] <= 1.0 + 1e-12
    assert p.to_json()["routing"]["dropped"] > 0.2


def test_loads_are_read_and_refused(tmp_path):
    path = tmp_path / "counts.json"
    path.write_text(json.dumps([10, 30]))
    assert Load.parse(f"counts:{path}", 2).shares == (0.25, 0.75)
    assert Load.parse("zipf:0", 4) == Load.balanced(4)
    for text, words in (
        ("even", "zipf:EXPONENT"), ("zipf:x", "is no routing"),
        ("zipf:nan", "is no routing"), ("zipf:-1", "0 to 100"), ("zipf:inf", "is no routing"),
        (f"counts:{path}", "2 counts for 3"),
        (f"counts:{tmp_path}/none", "no such file"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            Load.parse(text, 3)
    with pytest.raises(UsageError, match="has no experts"):
        Load.parse("balanced", 0)
    with pytest.raises(UsageError, match="not all 0"):
        Load.counts([0, 0])
