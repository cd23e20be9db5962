"""What must hold of every prediction, whatever its constants."""

import re
from dataclasses import replace

import pytest
from took import least_seconds

import partita as pt
from partita.base.units import format_bytes, format_seconds
from partita.cost.machine import machine_of
from partita.parallel.laid import lay
from partita.simulate.predict import request_of, simulate, timed
from partita.simulate.stage import works_of
from partita.spec.cluster import Cluster

PLANS = (
    "", "dp_replicate4 2mb", "tp4", "tp4+sp bf16", "pp4:1f1b/8mb bf16",
    "pp2:gpipe/4mb tp2+sp bf16 recompute:full",
    "pp2:1f1b/4mb dp_replicate2 tp2 bf16 recompute:selective",
    "dp_shard4.zero3 tp4+sp bf16 2mb", "dp_shard2.zero3 cp4:ring tp2+sp bf16",
)  # fmt: skip


def job(plan, **cluster):
    world = {"device": "a100", "devices": 16, "devices_per_node": 2, **cluster}
    model = {
        "family": "gpt2", "layers": 8, "hidden": 2048, "heads": 16, "vocab": 50257, "max_seq_len": 2048
    }  # fmt: skip
    return pt.Job.of(model, world, plan, global_batch_size=16, seq_len=1024)


@pytest.mark.parametrize("plan", PLANS)
def test_the_parts_of_time_add_up_to_the_step(plan):
    p = simulate(job(plan))
    parts = p.time["compute_s"] + p.time["bubble_s"] + p.time["optimizer_s"]
    assert parts + sum(p.time["exposed_comm_s"].values()) == pytest.approx(p.step_time_s, rel=1e-9)
    if "pp" not in plan:  # whoever moves, reduces and updates is not idle
        assert p.bubble_fraction == pytest.approx(0.0, abs=1e-9)
    assert p.bubble_fraction * p.step_time_s >= p.time["bubble_s"] - 1e-9  # of the busiest rank


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("what", ["links", "memory", "peak"])
def test_more_bandwidth_never_slows(plan, what):
    slow = job(plan)
    c = slow.cluster
    links = tuple(replace(x, bytes_per_s=2 * x.bytes_per_s) for x in c.links)
    peaks = {name: 2 * value for name, value in c.peak_flops.items()}
    fast = {
        "links": replace(c, links=links),
        "memory": replace(c, memory_bytes_per_s=2 * c.memory_bytes_per_s),
        "peak": replace(c, peak_flops=peaks),
    }[what]
    rounding = 1 + 1e-12
    faster, slower = simulate(replace(slow, cluster=fast)), simulate(slow)
    assert faster.step_time_s <= slower.step_time_s * rounding


@pytest.mark.parametrize("plan", PLANS)
def test_less_memory_never_helps(plan):
    fits = [simulate(job(plan, memory_bytes=n)).fits for n in (80e9, 40e9, 10e9, 2e9, 5e8)]
    assert fits == sorted(fits, reverse=True)


@pytest.mark.parametrize("plan", PLANS[1:])
def test_every_call_is_priced_once(plan):
    """The work that is priced holds each declared byte of the busiest rank, no more."""
    one = job(plan)
    laid = lay(request_of(one))
    works, m = works_of(laid), one.plan.num_microbatches
    for place in range(laid.sizes["pp"]):
        priced = sum(n * c.times * c.bytes for c, n in works.once[place].items())
        for stage in laid.stages_of(place):
            work = works.stages[stage.index]
            priced += sum(m * p.times * c.times * c.bytes for p in work.parts for c in p.calls)
            priced += sum(m * c.times * c.bytes for c in work.sends)
        declared = sum(
            c.times * c.bytes * (1 if c.phase == "step" else m) for c, _ in laid.calls(place)
        )
        assert priced == declared


def test_a_slow_host_is_waited_for():
    one = job("bf16 16mb")
    machine = machine_of(one.cluster)
    slow = replace(machine, software=replace(machine.software, host_s=1e-3))
    laid = lay(request_of(one))
    assert timed(laid, slow, 16).seconds > 2 * timed(laid, machine, 16).seconds


def test_an_update_without_a_fused_kernel_passes_operator_by_operator():
    """Of an element asgd moves 10 numbers, adagrad 14, adadelta 30, whatever they keep."""
    plain = job("dp2 1mb fp32")
    names = ("adagrad", "asgd", "adadelta")
    made = (replace(plain, train=replace(plain.train, optimizer=name)) for name in names)
    adagrad, asgd, adadelta = (simulate(of).time["optimizer_s"] for of in made)
    assert adadelta - adagrad == pytest.approx(4 * (adagrad - asgd), rel=0.01)


def test_sixteen_thousand_ranks_take_a_moment():
    one = pt.Job.of("llama3-405b", "16384xh100", "pp16:1f1b/16mb dp_replicate128 tp8+sp bf16",
                    global_batch_size=2048, seq_len=8192)  # fmt: skip
    assert least_seconds(lambda: simulate(one).to_json(), 0.2) < 0.2


def test_a_cluster_of_cores_has_no_fitted_constants():
    machine = machine_of(Cluster.from_preset("laptop"))
    assert machine.rate("fp32") == machine.cluster.peak("fp32")
    assert machine.software.host_s == 0


def test_the_text_has_the_answer_by_cause_category_axis_and_link():
    prices = {"device_hour": 2.0, "watts": 500.0, "kwh": 0.1}
    cluster = {"preset": "16xa100", "prices": prices}
    plan = "pp2:1f1b/4mb dp_shard2.zero1 tp4+sp bf16 recompute:full"
    one = pt.Job.of("llama3-8b", cluster, plan, global_batch_size=8, seq_len=1024)
    p = pt.simulate(one)
    text, answer = str(p), p.to_json()
    rows = {line.split()[0]: line.split() for line in text.splitlines()}
    causes = {f"{axis} traffic": s for axis, s in answer["time"]["exposed_comm_s"].items()}
    causes |= {k: answer["time"][f"{k}_s"] for k in ("compute", "bubble", "optimizer")}
    for name, seconds in causes.items():
        told = rf"^{re.escape(name)} +{format_seconds(seconds)} +{seconds / p.step_time_s:.1%}$"
        assert re.search(told, text, re.MULTILINE), name
    low, high = (format_seconds(x) for x in answer["step_time_interval_s"])
    assert f"{low} to {high}: 15% either way (published runs" in text
    assert f"MFU {p.mfu:.1%}" in text and f"HFU {p.hfu:.1%}" in text and p.hfu > p.mfu
    fullest = max(answer["memory"]["per_rank"], key=lambda r: r["total"])
    for name in ("parameters", "gradients", "optimizer", "activations", "buffers"):
        assert rows[name][1:] == format_bytes(fullest[name]).split()
    for name, key in (
        ("interval", "peak_interval_bytes"),
        ("on the device", "device_interval_bytes"),
    ):
        assert re.search(f"{name} +" + " to ".join(map(format_bytes, answer["memory"][key])), text)
    sends = [t for t in answer["traffic"] if (t["axis"], t["op"]) == ("tp", "all_gather")]
    calls, sent = (sum(t[k] for t in sends) for k in ("count", "bytes"))
    assert re.search(f"tp +all_gather +nvlink3 +{calls:,} +{format_bytes(sent)}", text)
    assert re.search("pp +send +inter-node", text)
    cost = answer["cost"]
    assert f"{cost['money_per_step']:.4g} USD a step" in text
    assert f"{1e6 * cost['energy_per_token_j'] / 3.6e6:.4g} kWh a million tokens" in text
