"""Memory over time: the curve, its peak, who holds it; beside the ledger, the trace and the page."""

import json

import pytest
from typer.testing import CliRunner

import partita as pt
from partita import schedule
from partita.cli.main import application
from partita.schedule.clock import peaks_with_gradients, rank_peak
from partita.schedule.ir import Action
from partita.simulate import memory
from partita.simulate.held import held, holders, peak_interval, shown_bytes
from partita.simulate.memory import kept_at_once
from partita.simulate.predict import simulate

PLANS = (
    "bf16 4mb", "pp4:1f1b/8mb bf16", "pp4:gpipe/4mb tp2+sp recompute:full", "pp2:zb_h1/8mb bf16",
    "pp2:interleaved_1f1bx2/4mb bf16", "pp2:dualpipev/8mb bf16", "pp2:dualpipe/8mb bf16",
    "pp2:auto/8mb pipeline.copies=2 pipeline.costs=12_12_12,10_10_10x2,15_15_15 bf16",
    "pp4:1f1b/8mb bf16 offload:cpu offload.targets=activations",
    "pp2:zb_h1/8mb tp2 bf16 recompute:full offload:cpu offload.targets=activations",
    "pp2:dualpipe/8mb bf16 offload:cpu offload.targets=activations,optimizer",
    "dp_shard4.zero3 2mb bf16", "dp_shard2.zero1 2mb bf16 offload:cpu",
    "pp2:1f1b/4mb dp_shard4.zero2 bf16 recompute:selective",
)  # fmt: skip


def job(plan):
    model = {
        "family": "gpt2", "layers": 8, "hidden": 1024, "heads": 16, "vocab": 50257, "max_seq_len": 1024
    }  # fmt: skip
    cluster = {"device": "a100", "devices": 16}
    return pt.Job.of(model, cluster, plan, global_batch_size=16, seq_len=1024)


@pytest.mark.parametrize("plan", PLANS)
def test_the_curves_top_is_the_ledgers_peak(plan):
    p = pt.simulate(job(plan))
    assert p.laid is not None
    for place, ledger in enumerate(p.ledgers):
        curve = held(p.laid, place, p.schedule, p.spans, ledger)
        total = curve.total()
        assert max(size for _, size in total) == ledger.peak_bytes
        assert dict(total)[curve.peak_s] == ledger.peak_bytes
        assert curve.during
        top = curve.times_s.index(curve.peak_s)
        for name in ("activations", "buffers", "gradients"):  # one figure, wherever it is read
            assert getattr(curve, name)[top] == ledger.at_peak[name], name
        assert total[-1][1] == curve.stays + curve.gradients[-1]  # only states are left at the end
        assert curve.times_s == tuple(sorted(set(curve.times_s)))
        who = holders(p.laid, place, ledger, p.job.cluster)
        assert sum(who.values()) == ledger.peak_bytes
        assert list(who.values()) == sorted(who.values(), reverse=True)


def test_the_fullest_moment_of_1f1b_is_where_it_is_known():
    """The first stage holds as many microbatches as there are stages, the last one; at its first backward."""
    p = pt.simulate(job("pp4:1f1b/8mb bf16"))
    assert p.laid is not None
    first, last = (held(p.laid, i, p.schedule, p.spans, p.ledgers[i]) for i in (0, 3))
    one = [min(a for a in c.activations if a) for c in (first, last)]
    assert max(first.activations) == 4 * one[0]
    assert max(last.activations) == one[1]
    assert first.during == "0F3"


def test_the_head_holds_the_last_stages_scratch():
    p = pt.simulate(job("pp4:1f1b/8mb bf16"))
    assert p.laid is not None
    assert "inside head" in holders(p.laid, 3, p.ledgers[3], p.job.cluster)
    masters = holders(p.laid, 3, p.ledgers[3], p.job.cluster)
    assert masters["moments"] == 2 * masters["masters"]


def test_a_device_shows_more_than_tensors():
    low, high = shown_bytes(10**10, is_cpu=False)
    assert low < 10**10 < high
    assert shown_bytes(10**10, is_cpu=True) == (int(0.95e10), int(1.05e10))
    assert shown_bytes(10**6, is_cpu=False)[0] > 10**8  # a small model's context is most of it
    assert all(low <= n <= high for n in (0, 1, 10**6) for low, high in [peak_interval(n)])


def test_simulate_answers_with_curves_page_and_trace(tmp_path):
    page, trace = tmp_path / "a.html", tmp_path / "a.json"
    words = ["simulate", "llama3-8b", "16xh100", "--plan", "pp2:1f1b/4mb tp8+sp bf16", "--json",
             "--global-batch-size", "4", "--seq-len", "4096",
             "--html", str(page), "--trace", str(trace)]  # fmt: skip
    result = CliRunner().invoke(application(words), words)
    found = json.loads(result.stdout)["memory"]["per_rank"]
    assert len(found) == 2
    for rank in found:
        curve = rank["over_time"]
        assert len(curve["time_s"]) == len(curve["activations"]) == len(curve["buffers"])
        names = ("activations", "buffers", "gradients")
        tops = map(sum, zip(*(curve[name] for name in names), strict=True))
        stays = rank["parameters"] + rank["optimizer"]
        top = curve["time_s"].index(rank["peak"]["time_s"])
        assert {name: curve[name][top] for name in names} == {name: rank[name] for name in names}
        assert max(tops) + stays == rank["total"] == sum(rank["holders"].values())
        assert 0 <= rank["peak"]["time_s"] <= curve["time_s"][-1]
    assert page.read_text().count('class="held"') == 2
    assert " GB</text>" in page.read_text()
    events = json.loads(trace.read_text())["traceEvents"]
    counters = [e for e in events if e["ph"] == "C"]
    assert max(e["args"]["bytes"] for e in counters) == max(r["total"] for r in found)
    assert {e["pid"] for e in counters} == {e["pid"] for e in events if e["ph"] == "X"}


def test_cut_gradients_come_as_activations_go():
    """A microbatch's 10 bytes go as 4 of gradients come; two microbatches have both at the second forward."""
    one = schedule("gpipe", num_ranks=1, num_microbatches=1)
    assert peaks_with_gradients(one, [10], [4]) == [(10, 0)]
    assert peaks_with_gradients(one, [10], [14]) == [(10, 4)]  # inside the backward, block by block
    two = schedule("1f1b", num_ranks=1, num_microbatches=2)
    assert peaks_with_gradients(two, [10], [4]) == [(10, 4)]
    assert peaks_with_gradients(two, [10], [0]) == [(10, 0)]


def test_what_a_weight_half_reads_is_held_from_its_input_half_on():
    """F keeps 10; 25 wait for each W: two of them stand beside a third forward's 10."""
    order = ("F0", "I0", "F1", "I1", "F2", "W0", "W1", "I2", "W2")
    actions = [Action(0, kind, int(m)) for kind, m in order]
    assert rank_peak(actions, [10], [0], [25]) == (60, 0)
    assert rank_peak(actions, [10], [0], [5]) == rank_peak(actions, [10], [0]) == (30, 0)


def test_gradients_of_zero_do_not_stand_beside_all_activations():
    found = [pt.simulate(job(f"dp_shard4.zero{z} 1mb bf16")) for z in (1, 2)]
    kept = [kept_at_once(p.laid, 0, p.schedule)[0] for p in found if p.laid is not None]
    assert kept[0] == kept[1]
    whole, cut = (p.ledgers[0] for p in found)
    assert cut.at_peak["gradients"] < whole.at_peak["gradients"] / 4


def test_a_shard_is_that_of_the_gradient_on_its_way(monkeypatch):
    """Two units of one whole size, cut over different axes."""
    line = "dp_shard4.zero3 2mb bf16"
    job = pt.Job.of("tiny", "4xh100", line, global_batch_size=8, seq_len=64)
    laid = simulate(job).laid
    assert laid is not None
    blocks = laid.stages[0].blocks
    lent = {id(blocks[0]): (memory._Whole(100, True, 25),)}
    other = (memory._Whole(100, False, 50),)
    monkeypatch.setattr(
        memory, "_lent", lambda b, *_: memory._Lent(0, 0, True, lent.get(id(b), other))
    )
    monkeypatch.setattr("partita.simulate.away.leaves", lambda _: True)
    assert memory.lent_parts(laid, blocks)["whole gradients"] == 100 + 25 + 100
