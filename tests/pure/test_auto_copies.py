"""`auto` with two copies of every stage, as a plan's line asks for it: laid, predicted, refused."""

from dataclasses import replace

import pytest
from executed import model, request, unequal

import partita as pt
from partita.base.errors import UsageError
from partita.parallel.exact.execute import execute
from partita.parallel.laid import lay
from partita.parallel.pp.rules import schedule_of
from partita.schedule.check import check
from partita.simulate.predict import Prediction, simulate
from partita.spec.plan import Plan
from partita.spec.plan_table import from_toml, to_toml

DEAR = "pp4:auto/8mb pipeline.copies=2 pipeline.costs=12_12_12,10_10_10x6,15_15_15"


def job(line: str, tied: bool = False, batch: int = 8) -> pt.Job:
    model = {
        "family": "llama", "layers": 8, "hidden": 64, "heads": 4, "ffn_hidden": 96, "vocab": 128,
        "max_seq_len": 32, "tied": tied,
    }  # fmt: skip
    cluster = {"device": "h100", "devices": 4}
    return pt.Job.of(model, cluster, line, global_batch_size=batch, seq_len=32)


def test_a_line_with_copies_is_read_as_it_is_written():
    plan = Plan.parse(DEAR)
    assert plan.pipeline.copies == 2 and str(plan) == DEAR and from_toml(to_toml(plan)) == plan
    assert plan != plan.with_("pipeline", copies=1)
    with pytest.raises(UsageError, match=r"pipeline.copies: 3 is not within 1\.\.2"):
        Plan.parse("pp4:auto/8mb pipeline.copies=3")


@pytest.mark.parametrize(
    ("line", "stages"), [("pp2:auto/4mb pipeline.copies=2", 2), (DEAR, 8), (DEAR + " pipeline.limit=6", 8)]
)  # fmt: skip
def test_half_of_the_microbatches_go_the_other_way(line, stages):
    """A line both ways where that is as fast, else a vee; within the limit; the same each time."""
    plan = Plan.parse(line)
    made = schedule_of(plan)
    assert check(made) == [] and made.num_stages == stages and made == schedule_of(plan)
    assert made.direction is not None and 2 * sum(made.direction) == made.num_microbatches
    assert all(len(made.ranks_of(stage)) == 2 for stage in range(stages))
    one = schedule_of(plan.with_("pipeline", copies=1))
    assert one.direction is None
    for actions in made.ranks:
        now = most = 0
        for _, kind, _ in actions:
            now += (kind == "F") - (kind == "W")
            most = max(most, now)
        assert most <= (plan.pipeline.limit or 10_000)


def test_parameters_are_predicted_and_added_up_twice():
    """What all ranks keep, the sums between copies, and less time where ends are dear."""
    both, one = simulate(job(DEAR)), simulate(job(DEAR.replace(" pipeline.copies=2", "")))
    assert both.fits and one.fits

    def kept(found: Prediction) -> int:
        return sum(ledger.at_peak["parameters"] for ledger in found.ledgers)

    assert kept(both) == 2 * kept(one) > 0
    assert both.laid is not None
    for rank in range(4):
        assert any(line.site.endswith(":copies") for line in both.laid.traffic(rank))


def test_a_tied_table_on_four_places():
    """The first and the last stage on other ranks: copies are added up, then ends."""
    asked = request(model(tied=True, layers=8), DEAR)
    whole = lay(replace(asked, micro_batch_size=1))
    assert whole.pairs == {"tied": ((0, 1), (2, 3)), "pp/copy": ((0, 3), (1, 2))}
    alone = lay(replace(request(asked.model, "8mb"), micro_batch_size=1))
    got, want = execute(whole, 1), execute(alone, 1)
    assert (got.losses[0][0], got.norms[0][0]) == (want.losses[0][0], want.norms[0][0])
    assert unequal(got.weights, want.weights) == ""
    for rank in range(4):
        assert got.traffic[rank] == whole.traffic(rank)
        assert sum(t.axis == "tied" for t in whole.traffic(rank)) == 1


@pytest.mark.parametrize(
    ("line", "rule", "nearest"),
    [
        ("pp3:auto/8mb pipeline.copies=2", "copies", "pp3:auto/8mb"),
        ("pp4:1f1b/8mb pipeline.copies=2", "costs", "pp4:1f1b/8mb"),
    ],
)
def test_what_two_copies_need_is_told(line, rule, nearest):
    """An even number of ranks, and `auto`; what is near runs."""
    found = [p for p in simulate(job(line)).problems if p.severity == "error"]
    assert [p.rule for p in found] == [rule]
    assert found[0].nearest == nearest
    again = simulate(job(nearest)).problems
    assert [p for p in again if p.severity == "error"] == []
