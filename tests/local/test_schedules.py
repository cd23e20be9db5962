"""Every schedule computes what one device computes, alone and with the other dimensions."""

import pytest
import verify_jobs

from partita.base.errors import PlanError
from partita.parallel.pp.pieces import Remade
from partita.schedule.make import schedule
from partita.verify.parity import verify

VEES = "pipeline.copies=2 pipeline.costs=12_12_12,10_10_10x2,15_15_15"  # half of them the other way
PLANS = (
    "pp2:interleaved_1f1bx2/4mb", "pp2:zb_h1/4mb", "pp2:zb_v/4mb", "pp2:dualpipe/4mb", "dp2 pp2:zb_h1/4mb",
    "tp2+sp pp2:zb_v/4mb recompute:full", "pp2:auto/4mb pipeline.copies=2", f"pp2:auto/4mb {VEES}",
)  # fmt: skip
MORE = (
    "pp4:zb_h1/8mb", "pp4:dualpipe/8mb", "pp2:v_1_2/4mb",
    f"dp_shard2.zero2 tp2+sp pp2:auto/4mb {VEES} recompute:full",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("schedules")


@pytest.mark.turns(2)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("plan", [*PLANS, *(pytest.param(p, marks=pytest.mark.slow) for p in MORE)])
def test_a_schedule_equals_one_device(plan, family, folder):
    """Llama untied, GPT-2 tied with 5 layers; zero-bubble halves with data parallelism too. With every other
    dimension they are in the covering array (test_composition.py)."""
    found = verify(verify_jobs.job(folder, f"{plan} fp64", family))
    assert found.equal, str(found)
    assert found.traffic_equal


@pytest.mark.parametrize(
    "more",
    [
        "recompute:full",
        pytest.param("tp2+sp recompute:full recompute.collectives=keep", marks=pytest.mark.slow),
        pytest.param("recompute:full offload:cpu offload.targets=activations", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_layers_that_run_again_take_turns(more, folder, monkeypatch):
    """Exact and with the declared traffic, whatever runs between the pieces of a replay."""
    begun, backward = [], Remade.backward

    def noted(self):
        begun.append(self)
        return (yield from backward(self))

    monkeypatch.setattr(Remade, "backward", noted)
    plan = f"dp_shard2.zero3 ep2 pp2:dualpipev/4mb {more} fp64"
    found = verify(verify_jobs.job(folder, plan, **verify_jobs.EXPERTS | {"layers": 4}), brief=True)
    assert found.equal and found.traffic_equal, str(found)
    assert begun


@pytest.mark.parametrize(
    "plan",
    [
        "pp2:zb_v/4mb fp64",
        "dp_shard2.zero2 pp2:dualpipe/4mb fp64",
        f"dp_shard2.zero3 pp2:auto/4mb {VEES} fp64",
        "pp2:zb_h1/4mb fp64",
        pytest.param("dp_shard2.zero3 pp2:chimera/4mb fp64", marks=pytest.mark.slow),
    ],
)
def test_a_tied_table_at_both_ends(plan, folder):
    """On one rank (V), on both ends twice (both ways; a microbatch comes to one of its holders there), on two
    ranks (a line)."""
    assert verify(verify_jobs.job(folder, plan, tied=True), brief=True).equal


def test_halves_at_low_precision_with_dropout(folder):
    found = verify(
        verify_jobs.job(folder, "tp2+sp pp2:zb_v/4mb bf16", "gpt2", dropout=0.2), brief=True
    )
    assert found.equal, str(found)


@pytest.mark.parametrize("name", ["zb_v", "dualpipe"])
def test_a_schedule_of_the_users_runs_from_a_file(name, folder):
    """Lists as CSV, stages and ways read off them; a doubled action is refused before anything starts."""
    text = str(schedule(name, num_ranks=2, num_microbatches=4))
    path = folder / "mine.csv"
    path.write_text(text)
    plan = f'pp2:"file:{path}"/4mb fp64'
    assert verify(verify_jobs.job(folder, plan)).equal
    path.write_text(text.replace("0F1", "0F1,0F1", 1))
    with pytest.raises(PlanError, match="done twice: 0F1"):
        verify(verify_jobs.job(folder, plan))
