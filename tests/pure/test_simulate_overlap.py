"""What of experts' all-to-all is predicted to be seen: whole, under a paired microbatch, under chunks."""

import pytest

import partita as pt
from partita.schedule.clock import Costs, StageCosts, clock, makespan
from partita.schedule.make import schedule
from partita.schedule.replay import Replay
from partita.simulate.memory import waiting_bytes


def predicted(plan):
    job = pt.Job.of("mixtral-8x7b", "32xh100", plan, global_batch_size=64, seq_len=4096)
    return pt.simulate(job)


def test_rows_travel_under_a_paired_microbatch_or_another_chunk():
    """Both hide most of what a V without pairs shows; a layer that is run again has six legs, of which four
    are hidden and cost a fifth; it holds what waits for its rows. Parts still add up to the step."""
    v = "8mb dp8 tp2+sp ep8 bf16"
    alone, pairs, chunks, again, apart = (
        predicted(p)
        for p in (
            f"pp2:zb_v/{v}", f"pp2:dualpipev/{v}", f"pp2:zb_v/{v} expert.chunks=4",
            f"pp2:dualpipev/{v} recompute:full", f"pp2:zb_v/{v} recompute:full",
        )
    )  # fmt: skip
    seen = [p.time["exposed_comm_s"]["ep"] for p in (alone, pairs, chunks, again, apart)]
    assert seen[1] < 0.6 * seen[0] and seen[2] < 0.5 * seen[0]
    assert again.laid is not None and again.timed is not None and pairs.laid is not None
    stage = again.timed.stages[0]
    there, back = stage.comm_forward_s["ep"], stage.comm_backward_s["ep"]
    assert back == pytest.approx(2 * there, rel=0.1)
    assert again.timed.costs.stages[0].hidden == pytest.approx(0.8 * 2 * there)
    assert seen[1] < seen[3] < 0.7 * seen[4]
    assert waiting_bytes(again.laid, 0) > 0 == waiting_bytes(pairs.laid, 0)
    assert apart.laid is not None and waiting_bytes(apart.laid, 0) == 0
    for p in (alone, pairs, chunks, again, apart):
        parts = [p.time["compute_s"], p.time["bubble_s"], p.time["optimizer_s"]]
        assert sum(parts) + sum(p.time["exposed_comm_s"].values()) == pytest.approx(p.step_time_s)


@pytest.mark.parametrize(("name", "p"), [("dualpipe", 4), ("dualpipev", 2)])
def test_a_pair_is_shorter_by_what_it_hides(name, p):
    """The clock and its replay agree; without pairs nothing is shorter."""
    made = schedule(name, num_ranks=p, num_microbatches=2 * p)
    plain = Costs((StageCosts(1.0, 1.0, 1.0),) * made.num_stages)
    short = Costs((StageCosts(1.0, 1.0, 1.0, hidden=0.5),) * made.num_stages)
    spans = clock(made, short)
    assert makespan(spans) == pytest.approx(Replay(made)(short).makespan)
    assert makespan(spans) < makespan(clock(made, plain))
    lengths = {s.name: s.end_s - s.start_s for s in spans}
    assert made.beside and all(lengths[str(a)] == pytest.approx(1.5) for a in made.beside)
    line = schedule("1f1b", num_ranks=4, num_microbatches=8)
    assert not line.beside
