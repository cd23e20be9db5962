"""Nodes that differ: every stage takes what its own devices take, and layers lie by what these reach."""

from dataclasses import replace

import pytest

from partita.planner.answers.answer import counts, document
from partita.planner.answers.ask import Question, ask
from partita.planner.answers.unequal import of_each_pp
from partita.planner.search.search import searcher
from partita.planner.search.uneven import every_split
from partita.simulate.predict import simulate
from partita.spec.cluster import Cluster
from partita.spec.job import Job
from partita.spec.plan import Plan
from partita.spec.unequal import levelled

LINKS = [
    {"name": "inner", "devices": 2, "bytes_per_s": 200e9, "latency_s": 3e-6},
    {"name": "outer", "devices": 4, "bytes_per_s": 20e9, "latency_s": 1e-5},
]
MODEL = {
    "family": "llama", "layers": 10, "hidden": 4096, "heads": 32, "kv_heads": 32, "ffn_hidden": 11008,
    "vocab": 4096, "max_seq_len": 4096,
}  # fmt: skip
FIXED = ("pp2:1f1b/4mb", "zero1")
FORBIDDEN = ("recompute", "offload", "order", "cp", "tp", "auto")


def cluster(*devices: str) -> Cluster:
    """Two nodes of two devices each."""
    nodes = [{"count": 1, "device": name, "devices": 2} for name in devices]
    return Cluster.load({"nodes": nodes, "links": LINKS})


def job(line: str, *devices: str) -> Job:
    """A job on these devices."""
    one = Job.of(MODEL, "4xh100", line, global_batch_size=8, seq_len=4096)
    return replace(one, cluster=cluster(*devices))


@pytest.mark.parametrize("devices", [("h100", "a100"), ("a100", "h100")])
def test_every_stage_takes_what_its_own_devices_take(devices):
    line = "pp2:1f1b/4mb dp_shard2.zero1 bf16 pipeline.split=6,4"
    mixed = simulate(job(line, *devices))
    for place, device in enumerate(devices):
        alike = simulate(job(line, device, device))
        assert mixed.timed.stages[place] == alike.timed.stages[place]
    assert simulate(job("dp_shard4.zero1 2mb bf16", *devices)).step_time_s == (
        simulate(job("dp_shard4.zero1 2mb bf16", "a100", "a100")).step_time_s
    )
    flops = sum(2 * cluster(d, d).peak("bf16") for d in devices)
    alike = simulate(job(line, "a100", "a100"))
    theirs = alike.mfu * alike.step_time_s * 4 * cluster("a100", "a100").peak("bf16")
    assert mixed.mfu * mixed.step_time_s * flops == pytest.approx(theirs)


def test_each_stage_has_its_own_devices_memory():
    line = "pp2:1f1b/4mb dp_shard2.zero1 bf16 pipeline.split=7,3"
    one = job(line, "h100", "a100")
    first, last = (x.peak_bytes / one.cluster.memory_limit_fraction for x in simulate(one).ledgers)
    assert first > 1.1 * last

    def with_memory(*sizes: float):
        nodes = zip(one.cluster.nodes, sizes, strict=True)
        nodes = tuple(replace(n, memory_bytes=int(size)) for n, size in nodes)
        least = replace(one.cluster, nodes=nodes, memory_bytes=int(min(sizes)))
        return simulate(replace(one, cluster=least))

    roomy = with_memory(1.02 * first, 1.02 * last)
    assert roomy.fits and roomy.fullest.peak_bytes <= roomy.limit_bytes
    tight = with_memory(2 * first, 0.98 * last)
    assert not tight.fits and tight.fullest is tight.ledgers[1]
    assert tight.to_json()["memory"]["per_rank"][0]["limit_bytes"] == tight.limits[0]
    assert not with_memory(0.98 * first, 2 * last).fits


def test_layers_lie_by_what_devices_reach():
    mixed = job("", "h100", "a100")
    question = Question(top=2, fix=FIXED, forbid=FORBIDDEN, budget_s=20)
    answer = ask(mixed, question)
    best = answer.plans[0]
    lines = [Plan.parse(best.plan).with_("pipeline", split=s) for s in every_split(10, 2)]
    found = [simulate(mixed.with_plan(line)) for line in lines]
    assert best.step_time_s == min(p.step_time_s for p in found if p.fits)
    even = searcher(mixed, question.fix, question.forbid).best().plans[0]
    assert even.job.cluster == levelled(mixed.cluster)
    assert best.step_time_s < 0.8 * even.step_time_s
    assert any(text.startswith("split:") and "(+" in text for text in answer.texts)
    assert "not proven: devices differ" in counts(answer.found)
    assert document(answer)["complete"] is False
    assert simulate(mixed.with_plan(best.plan)).step_time_s == best.step_time_s


def test_stages_that_are_looked_at_lie_on_devices_of_one_kind():
    assert of_each_pp(job("", "h100", "a100")) == [2, 4]
    one = job("", "h100", "a100")
    first, last = one.cluster.nodes
    uneven = replace(one.cluster, nodes=(replace(first, devices=1), replace(last, devices=3)))
    assert of_each_pp(replace(one, cluster=uneven)) == [4]
