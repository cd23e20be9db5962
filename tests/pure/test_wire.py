"""Messages share the link out of their rank: they leave one after the other."""

from dataclasses import replace

import pytest

import partita as pt
from partita.record.span import Span
from partita.schedule.clock import Costs, StageCosts, clock, makespan
from partita.schedule.ir import Action, needs
from partita.schedule.make import GENERATORS, schedule
from partita.schedule.order import turns
from partita.schedule.replay import Replay
from partita.simulate.jitter import played

NAMES = [n for n in GENERATORS if n not in ("auto", "forward")]
ROWS = (2.0, 1.5, 1.0)


def costs_of(made, send: float, wire: float) -> Costs:
    stages = (StageCosts(*(x + i % 3 / 10 for x in ROWS)) for i in range(made.num_stages))
    return Costs(tuple(stages), send, wire)


@pytest.mark.parametrize("name", NAMES)
def test_messages_leave_a_rank_one_after_the_other(name):
    v = 2 if GENERATORS[name].virtual else 1
    made = schedule(name, num_ranks=4, num_microbatches=8, virtual_stages=v)
    costs = costs_of(made, 2.5, 2.0)
    spans = clock(made, costs)
    assert Replay(made)(costs).makespan == makespan(spans)
    order = turns(made)
    each = [costs.stages[t.action.stage].of(t.action.kind) for t in order]
    if not made.beside:  # a pair's own time is the clock's
        assert float(played(order, each, costs)) == pytest.approx(makespan(spans))
    told = {Action(s.stage, s.kind, s.microbatch): s for s in spans}
    come = expected(made, spans, costs)
    for action, s in told.items():
        for need in needs(action, made.num_stages):
            if need in come and come[need][0] != s.rank:
                assert s.start_s >= come[need][1] - 1e-12
    lone = makespan(clock(made, replace(costs, wire=0.0)))
    assert makespan(spans) >= lone


def expected(made, spans: list[Span], costs: Costs) -> dict[Action, tuple[int, float]]:
    """When each result that leaves its rank has come, worked out from the spans alone."""
    free, come = dict[int, float](), {}
    for s in sorted(spans, key=lambda s: (s.rank, s.end_s)):
        to = s.stage + (1 if s.kind == "F" else -1)
        if s.kind not in "FBI" or not 0 <= to < made.num_stages:
            continue
        if made.rank_of(to, s.microbatch) == s.rank:
            continue
        left = max(s.end_s, free.get(s.rank, 0.0))
        free[s.rank] = left + costs.wire
        kind = "F" if s.kind == "F" else "B"
        come[Action(s.stage, kind, s.microbatch)] = (s.rank, left + costs.send)
    return come


def test_eight_messages_of_ten_take_eighty():
    made = schedule("gpipe", num_ranks=2, num_microbatches=8)
    stages = (StageCosts(1, 1, 1),) * 2
    together = makespan(clock(made, Costs(stages, send=10)))
    after = makespan(clock(made, Costs(stages, send=10, wire=10)))
    assert together == 8 * 3 + 3 + 2 * 10  # m (F + B) + (p - 1) (F + B), and two on the way
    assert after == 1 + 8 * 10 + 1 + 2 + 7 * 10 + 10 + 2  # all go, then all come back


@pytest.mark.parametrize("plan", ["pp2:gpipe/16mb", "pp2:interleaved_1f1bx2/16mb", "pp2:zb_v/16mb"])
def test_a_step_takes_no_less_than_its_bytes_on_a_slow_link(plan):
    link = {"name": "ethernet", "bytes_per_s": 2e7, "latency_s": 1e-5}
    job = pt.Job.load({
        "name": "slow", "plan": f"{plan} bf16",
        "model": {"preset": "llama3.2-1b"},
        "cluster": {"name": "two", "devices": 2, "devices_per_node": 1, "device": "H100-80GB-SXM",
            "links": [link]},
        "data": {"source": "python-stdlib"},
        "train": {"global_batch_size": 16, "seq_len": 4096},
    })  # fmt: skip
    message = 4096 * 2048 * 2  # [1, seq, hidden] in bf16
    hops = 1 if "gpipe" in plan else 3 if "interleaved" in plan else 1
    one_way = (16 * message * ((hops + 1) // 2)) / 2e7
    both = 2 if "gpipe" in plan else 1  # its gradients go when all its forwards have come
    step = pt.simulate(job).step_time_s
    assert step is not None and step >= both * one_way
