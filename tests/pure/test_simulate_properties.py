"""What holds of every prediction, on plans made by chance: of a dense model, of one with experts, on nodes
that ranks do not tile, on cores that they share; states and activations elsewhere, axes in any order."""

import random
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
from drawn_plans import random_leaf, wide

from partita.cost.machine import machine_of
from partita.planner.search.search import searcher
from partita.simulate.answer import to_json
from partita.simulate.predict import Prediction, simulate
from partita.simulate.stage import works_of
from partita.spec.job import Job

ROUNDING = 1 + 1e-12
SHARED = 1 + 1e-3  # ranks that share cores are slowed by what of their work meets, on average
# what hides collectives (a last backward's compute, a pair's rows under a host that is behind) hides
# less when it is shorter, also where the step waits for something else; and of a host that is behind an
# input half has what a weight half leaves
HIDDEN = 1 + 2e-3
DRAWN, TRIED = 20, 10
OFFLOADS = ("none", "none", "cpu", "nvme")
OWN = (("llama3-8b", "32xh100", 64), ("tiny-moe", "16xh100", 16), ("tiny", "24xh100", 24))
CORES = ("tiny", "laptop", 8)
WORDS = ("2mb",)
TIMES = ("compute_s", "bubble_s", "optimizer_s")


@cache
def drawn(question: tuple[str, str, int]) -> list[tuple[Job, Prediction]]:
    """Legal plans, each with what `simulate` says."""
    search, rng, found = wide(*question, layers=4), random.Random(7), []
    meshes = list(search.space.meshes())
    while len(found) < DRAWN:
        node = random_leaf(search, rng, meshes)
        if node is None:
            continue
        plan = search.plan(node).with_("offload", to=rng.choice(OFFLOADS))
        if rng.random() < 0.3:
            plan = plan.with_("mesh", order=tuple(rng.sample(plan.mesh.order, 5)))
        job = search.job.with_plan(plan)
        prediction = simulate(job)
        if prediction.step_time_s is not None:
            found.append((job, prediction))
    return found


@pytest.mark.parametrize("question", [*OWN, CORES], ids=str)
def test_the_parts_of_time_sum_to_the_step(question):
    for job, p in drawn(question):
        parts = [p.time[name] for name in TIMES] + list(p.time["exposed_comm_s"].values())
        assert sum(parts) == pytest.approx(p.step_time_s, rel=1e-9), job.plan
        assert min(parts) >= -1e-12, job.plan


@pytest.mark.parametrize("question", [*OWN, CORES], ids=str)
def test_a_peak_lies_in_its_interval_and_the_device_shows_no_less(question):
    for job, p in drawn(question):
        memory = to_json(p)["memory"]
        low, high = memory["peak_interval_bytes"]
        assert low <= memory["peak_bytes"] <= high, job.plan
        shown = memory["device_interval_bytes"]
        assert low <= shown[0] <= shown[1] and high <= shown[1], job.plan
        fits = memory["peak_bytes"] <= memory["limit_bytes"]
        assert p.fits == fits or job.plan.offload.to != "none", job.plan
        for rank in memory["per_rank"]:  # by category as over time
            curve = rank["over_time"]
            top = curve["time_s"].index(rank["peak"]["time_s"])
            for name in ("activations", "buffers", "gradients"):
                assert curve[name][top] == rank[name], (job.plan, name)


@pytest.mark.parametrize("question", [*OWN, CORES], ids=str)
def test_every_byte_of_traffic_is_priced_once(question):
    """What is priced of a rank is what its traffic declares, over the microbatches that it runs."""
    for job, p in drawn(question):
        laid = p.laid
        works = works_of(laid)
        for place, actions in enumerate(laid.schedule.ranks):
            runs = Counter(a.stage for a in actions if a.kind == "F")
            priced = sum(n * c.times * c.bytes for c, n in works.once[place].items())
            for stage, m in runs.items():
                work = works.stages[stage]
                priced += m * sum(
                    x.times * x.times_of(c) * c.bytes for x in work.parts for c in x.calls
                )
                priced += m * sum(c.times * c.bytes for c in work.sends)
            declared = sum(t.bytes for t in laid.traffic(laid.mesh.rank_of({"pp": place})))
            assert priced == pytest.approx(declared, rel=1e-12), job.plan


def faster(cluster, what, times):
    """The cluster with one of its rates higher."""
    links = cluster.links
    match what:
        case "links":
            found = {"links": tuple(replace(x, bytes_per_s=times * x.bytes_per_s) for x in links)}
        case "inner link":
            inner = replace(links[0], bytes_per_s=times * links[0].bytes_per_s)
            found = {"links": (inner, *links[1:])}
        case "latency":
            found = {"links": tuple(replace(x, latency_s=x.latency_s / times) for x in links)}
        case "memory":
            found = {"memory_bytes_per_s": times * cluster.memory_bytes_per_s}
        case "peak":
            found = {"peak_flops": {name: times * x for name, x in cluster.peak_flops.items()}}
        case "host":
            found = {"host_link_bytes_per_s": times * cluster.host_link}
        case _:
            found = {"disk_bytes_per_s": times * (cluster.disk_bytes_per_s or 14e9)}
    return replace(cluster, **found)


@pytest.mark.parametrize("question", [*OWN, CORES], ids=str)
def test_more_bandwidth_never_slows_a_step(question):
    for job, p in drawn(question)[:TRIED]:
        for what in ("links", "inner link", "latency", "memory", "peak", "host", "disk"):
            if what in ("host", "disk") and job.plan.offload.to == "none":
                continue
            faster_job = replace(job, cluster=faster(job.cluster, what, 1.5))
            slowest = SHARED if job.cluster.cores_shared else HIDDEN
            assert simulate(faster_job).step_time_s <= p.step_time_s * slowest, (
                what,
                job.plan.slug,
            )
            if slowest == HIDDEN and what not in ("memory", "peak"):
                assert unhosted(faster_job) <= unhosted(job) * ROUNDING, (what, job.plan.slug)


def unhosted(job):
    """Seconds of a step whose host is never behind."""
    machine = machine_of(job.cluster)
    quick = replace(machine, software=replace(machine.software, host_s=0.0))
    return simulate(job, quick).step_time_s


def test_less_memory_never_helps_a_plan_nor_the_search():
    for job, p in drawn(OWN[1])[:TRIED]:
        size = max(x.peak_bytes for x in p.ledgers) / job.cluster.memory_limit_fraction
        found = [simulate(with_memory(job, size * share)) for share in (1.01, 0.99)]
        assert [x.fits for x in found] == [True, False] or job.plan.offload.to != "none", job.plan
        assert {x.step_time_s for x in found} == {p.step_time_s}
    job, times = Job.of("tiny", "4xh100", "", global_batch_size=8, seq_len=64), []
    for num_bytes in (4e6, 2e6, 1.5e6, 1.2e6, 1e6):
        found = searcher(with_memory(job, num_bytes), WORDS, ("v_half", "cp", "gpipe")).best()
        assert found.complete
        times.append(found.plans[0].step_time_s if found.plans else float("inf"))
    assert times == sorted(times) and len(set(times)) > 2, times


def with_memory(job, num_bytes):
    return replace(job, cluster=replace(job.cluster, memory_bytes=int(num_bytes)))
