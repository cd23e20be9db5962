import math
from dataclasses import replace

import pytest
import verify_jobs
from turns import halves

from partita.parallel.regions import Region
from partita.verify.parity import verify

PLANS = (
    "tp2", "tp2+sp", "tp4+sp", "dp2", "dp4", "2mb", "pp2:gpipe/4mb", "pp2:1f1b/4mb", "pp4:1f1b/8mb",
    "pp4:1f1b/2mb", "dp2 tp2", "dp2 pp2/4mb", "tp2+sp pp2/2mb", "dp2 tp2+sp pp2:1f1b/4mb",
)  # fmt: skip


ZERO = (
    "dp_shard2.zero1", "dp_shard2.zero2 2mb", "dp_shard2.zero3 2mb", "dp_replicate2 dp_shard2.zero3",
    "dp_shard2.zero3 2mb data.reshard_after_forward=false data.prefetch=9",
    "pp2/2mb dp_shard2.zero2", "pp2/2mb dp_shard2.zero3 data.prefetch=0", "dp_shard2.zero1 tp4+sp 2mb",
    "dp_shard4.zero2 data.bucket_bytes=300",
    "dp_shard2.zero3 tp2+sp 2mb recompute:selective recompute.every=2 recompute.collectives=keep",
    "pp2/2mb dp_replicate2 dp_shard2.zero1", "dp_shard3.zero3 tp2",
    "dp_shard2.zero3 tp2+sp 2mb data.accumulate=whole",
    "pp2/2mb dp_shard2.zero3 data.accumulate=whole data.reshard_after_forward=false offload:cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("verify")


AGAIN = "recompute:full"
FORMS = [("llama", ""), ("llama", AGAIN), ("gpt2", AGAIN), ("gpt2", "")]


@pytest.mark.parametrize(("plan", "form"), halves(PLANS, FORMS), ids=str)
def test_a_plan_equals_one_device(plan, form, folder):
    family, recompute = form
    found = verify(verify_jobs.job(folder, f"{plan} {recompute} fp64", family))
    assert found.equal, str(found)
    assert found.traffic_equal and found.precision["fp64"]


CUT = [("llama", True, p) for p in ZERO] + [("gpt2", True, p) for p in ZERO[2:6]]
CUT += [("llama", False, p) for p in (ZERO[1], ZERO[6], ZERO[9])]


@pytest.mark.turns(2)
@pytest.mark.parametrize("family, tied, plan", CUT)
def test_states_cut_over_ranks_change_nothing(plan, family, tied, folder):
    batch = 6 if "shard3" in plan else 8
    found = verify(verify_jobs.job(folder, f"{plan} fp64", family, tied=tied, batch=batch))
    assert found.equal, str(found)


@pytest.mark.parametrize("plan", ["dp_shard2.zero1 tp2", "dp_shard2.zero2", "dp_shard4.zero3"])
def test_states_cut_over_ranks_at_low_precision(plan, folder):
    found = verify(verify_jobs.job(folder, f"{plan} bf16", "llama"), brief=True)
    assert found.equal, str(found)


@pytest.mark.turns(2)
@pytest.mark.parametrize(
    "plan",
    ["dp2 tp2+sp pp2:1f1b/4mb bf16", "tp4+sp bf16", "pp2/8mb fp32", "dp2 tp2+sp pp2/2mb fp16"],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_plan_equals_one_device_at_its_own_precision(plan, family, folder):
    found = verify(verify_jobs.job(folder, plan, family))
    assert found.equal, str(found)


@pytest.mark.parametrize("plan", ["tp4+sp fp64", "dp2 tp2+sp pp2:1f1b/4mb recompute:full fp64"])
def test_dropout_masks_agree_with_one_device(plan, folder):
    found = verify(verify_jobs.job(folder, plan, "gpt2", dropout=0.2))
    assert found.equal, str(found)


MORE = [
    ("gpt_neox", {"parallel_residual": True, "rotary_pct": 0.5}, "tp2+sp dp_shard2.zero3 2mb fp64"),
    ("gpt_neox", {"gelu": "erf"}, "pp2:1f1b/4mb tp2 recompute:full bf16"),
    ("bloom", {}, "tp4+sp 2mb bf16"), ("bloom", {"packed": True}, "cp4:hybrid2x2 2mb fp64"),
]  # fmt: skip


@pytest.mark.parametrize("family, model, plan", MORE)
def test_parallel_residuals_and_scores_that_fall_off(family, model, plan, folder):
    found = verify(verify_jobs.job(folder, plan, family, **model))
    assert found.equal, str(found)


LESS = (
    "recompute:selective", "recompute:selective recompute.modules=core,norm,act",
    "recompute:full recompute.collectives=keep", "recompute:full recompute.every=2",
)  # fmt: skip


@pytest.mark.turns(2)
@pytest.mark.parametrize("less", LESS)
@pytest.mark.parametrize("family, model", [("llama", {}), ("gpt2", {"dropout": 0.2})])
def test_less_kept_changes_no_number(less, family, model, folder):
    found = verify(verify_jobs.job(folder, f"pp2/2mb tp2+sp {less} fp64", family, **model))
    assert found.equal, str(found)
    found = verify(verify_jobs.job(folder, f"tp2 2mb {less} bf16", family, **model), brief=True)
    assert found.equal, str(found)


@pytest.mark.parametrize("family, dropout", [("llama", 0.0), ("gpt2", 0.2)])
def test_a_sliding_window(family, dropout, folder):
    job = verify_jobs.job(folder, "tp2+sp fp64", family, sliding_window=3, dropout=dropout)
    assert verify(job).equal


def test_gradients_that_are_zero_are_not_told_apart_by_their_rounding(folder):
    """A token that sees itself alone: scores move nothing."""
    job = verify_jobs.job(folder, "tp2+sp fp64", sliding_window=1)
    found = verify(replace(job, train=replace(job.train, trainable=("*.attention.w[qk]",))))
    assert found.equal, str(found)


def test_tied_llama_and_untied_gpt2(folder):
    for family, tied in (("llama", True), ("gpt2", False)):
        found = verify(verify_jobs.job(folder, "tp2+sp pp2/2mb fp64", family, tied=tied))
        assert found.equal, str(found)


def test_microbatches_that_do_not_divide_the_stages(folder):
    assert verify(verify_jobs.job(folder, "pp4:1f1b/3mb fp64", batch=6)).equal
    assert verify(verify_jobs.job(folder, "pp3:gpipe/5mb fp64", batch=5)).equal


@pytest.mark.slow
def test_the_four_dimensions_of_llama_3(folder):
    """Innermost to outermost tp, cp, pp, dp (2407.21783, fig. 5); packed documents, keys gathered."""
    line = "pp2:interleaved_1f1bx2/4mb dp_shard2.zero1 cp2:all_gather tp2+sp"
    order = "order:tp,cp,pp,dp_shard,dp_replicate"
    made = verify_jobs.job(folder, f"{line} {order} fp64", packed=True)
    found = verify(made)
    assert found.equal and found.traffic_equal and made.plan.world_size == 16, str(found)


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_sixty_four_ranks(folder):
    found = verify(verify_jobs.job(folder, "tp8+sp pp4:1f1b/4mb dp2 fp64", heads=8, hidden=32))
    assert found.equal, str(found)


def test_a_job_too_big_is_shrunk_and_says_so(folder):
    big = {"hidden": 512, "heads": 16, "kv_heads": 4, "layers": 9, "ffn_hidden": 1024}
    found = verify(verify_jobs.job(folder, "tp8+sp pp2/2mb fp64", **big))
    assert found.equal and found.shrunk is not None and "layers" in found.shrunk
    assert found.to_json()["shrunk"] == found.shrunk


def test_the_document_has_the_contract_fields(folder):
    document = verify(verify_jobs.job(folder, "tp2+sp fp64")).to_json()
    assert document["equal"] is True and document["reference"] == "single"
    assert document["first_divergence"] is None and document["traffic"]["equal"] is True
    assert document["traffic"]["declared"] and len(document["loss"]["parallel"]) == 2
    assert set(document["traffic"]["declared"][0]) == {
        "rank", "axis", "op", "site", "phase", "count", "bytes",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_sixty_four_ranks_at_once(folder):
    """tp8 with two key/value heads, four stages, two replicas, as threads."""
    model = {"heads": 8, "hidden": 32, "ffn_hidden": 48, "layers": 5}
    found = verify(verify_jobs.job(folder, "dp2 tp8+sp pp4:1f1b/4mb fp64", batch=8, **model))
    assert found.equal, str(found)
    assert len({line.rank for line in found.recorded}) == 64


def test_a_step_that_stops_at_its_norm_misses_no_traffic_behind_it(folder, monkeypatch):
    """No update is made, so states on the host neither come nor go: what is wrong is the number."""
    whole = Region.forward

    def spoilt(self, x):
        y = whole(self, x)
        return y * math.nan if self.site == "blocks.0.attention.wo:reduce_from" else y

    monkeypatch.setattr(Region, "forward", spoilt)
    plan = "tp2 offload:cpu offload.targets=optimizer fp64"
    found = verify(verify_jobs.job(folder, plan, "llama"), brief=True)
    assert not found.equal and found.divergence is not None
    assert (
        found.divergence.module == "blocks.0.attention"
        and "missing" not in found.divergence.message
    )
    assert "as far as the step came" in str(found)
