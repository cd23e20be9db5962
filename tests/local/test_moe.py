"""Experts on thread ranks: equal to one device, loads and losses told alike, faults of others found."""

from dataclasses import replace

import pytest
import torch
import verify_jobs

from partita.comm.recording import RecordingComm
from partita.comm.threads.local import local
from partita.parallel.ep import dispatch, router
from partita.parallel.laid import problems
from partita.parallel.regions import Region
from partita.simulate.predict import request_of
from partita.spec.model import ModelSpec
from partita.train import routing
from partita.train import step as step_module
from partita.train.build import assemble
from partita.train.step import Update
from partita.verify import runs
from partita.verify.batches import open_data
from partita.verify.parity import verify

PLANS = (
    "2mb", "dp4 ep4", "dp2 tp2+sp ep2 etp2 2mb", "dp2 tp2 ep2 etp2 2mb", "pp2/2mb dp2 ep2",
    "cp2 tp2+sp ep4 2mb", "dp2 tp2+sp ep2 recompute:full",
)  # fmt: skip
MORE = (
    "dp4.zero3 ep2 2mb", "dp_replicate2 dp2.zero1 ep2",
    "dp2 ep2 2mb", "tp2+sp ep2 2mb", "dp2 tp2+sp ep2", "tp2 etp2 2mb", "dp_replicate2 dp2 ep2",
    "tp4+sp etp4 2mb", "dp2 cp2:ulysses ep2 2mb", "pp2:zb_h1/4mb dp2 ep2",
    "dp2 ep2 2mb recompute:selective recompute.modules=norm,act",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("moe")


def job(folder, plan, **model):
    return verify_jobs.job(folder, plan, **{**verify_jobs.EXPERTS, **model})


@pytest.mark.turns(3)
@pytest.mark.parametrize("plan", [*PLANS, *(pytest.param(p, marks=pytest.mark.slow) for p in MORE)])
def test_a_plan_equals_one_device(plan, folder):
    found = verify(job(folder, f"{plan} fp64"))
    assert found.equal and found.traffic_equal, str(found)


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize("replicas", ["dp_replicate2 ", ""])
def test_five_dimensions(replicas, folder):
    """32 ranks and 16; stage 3, as `dp_shard2` alone says."""
    found = verify(job(folder, f"{replicas}dp_shard2 cp2 tp2+sp pp2/2mb ep4 fp64"))
    assert found.equal and found.traffic_equal, str(found)


def test_a_plan_equals_one_device_at_its_own_precision(folder):
    """Others are in the covering array (test_composition.py)."""
    found = verify(job(folder, "dp2 tp2+sp ep2 etp2 2mb bf16"), brief=True)
    assert found.equal and found.traffic_equal, str(found)


@pytest.mark.slow
def test_choices_of_microbatches_under_way_are_kept_where_activations_go_elsewhere(folder):
    line = "pp2:pipedream/4mb expert.chunks=2 offload:cpu offload.targets=activations bf16"
    made = job(folder, line, layers=6, expert_every=1, dense_layers=0)
    found = verify(replace(made, train=replace(made.train, clip_grad_norm=0.0)), brief=True)
    assert found.equal and found.traffic_equal, str(found)


def test_a_choice_that_is_wrong_at_low_precision_alone_is_seen(folder, monkeypatch):
    """The judge follows what roundings can explain, not a balance bias that is left out."""
    chosen = router.choose
    monkeypatch.setattr(
        router,
        "choose",
        lambda s, x, bias: chosen(s, x, bias if x.dtype == torch.float64 else None),
    )
    found = verify(job(folder, "dp2 ep2 2mb bf16"), brief=True)
    assert found.precision == {"fp64": True, "plan": False}, str(found)


@pytest.mark.parametrize(
    "model",
    [
        {"router": "sigmoid", "router_groups": 2, "router_top_groups": 1, "router_scale": 2.5},
        {"normalise_top_k": False, "shared_experts": 0, "dense_layers": 0, "top_k": 1},
        {"experts": 8, "top_k": 3, "router_bias": False, "balance_loss": 0.0, "z_loss": 0.0},
        {"experts": 8, "top_k": 3, "balance_loss": 0.05},  # thirds, which no float32 holds
    ],
)
def test_other_routers_equal_one_device(model, folder):
    found = verify(job(folder, "dp2 tp2+sp ep2 2mb fp64", **model))
    assert found.equal and found.traffic_equal, str(found)


@pytest.mark.turns(2)
@pytest.mark.parametrize(
    "plan",
    [
        "tp4+sp ep2 2mb", "cp2:ring tp2+sp ep2 2mb", "cp4:hybrid2x2 ep2 etp2 recompute:full",
        "cp2:ring ep2 packed", "dp_shard2.zero1 etp2 2mb offload:cpu offload.targets=activations",
    ],
)  # fmt: skip
def test_a_capacity_drops_the_same_rows_under_every_plan(plan, folder):
    """Earlier positions first, wherever a ring lays them; with packed documents each sample has its order."""
    plan, packed, _ = plan.partition(" packed")
    found = verify(job(folder, f"{plan} fp64", packed=bool(packed), capacity_factor=0.75))
    assert found.equal and found.traffic_equal, str(found)
    assert found.trials[0].judge[0].auxiliary[2] > 0


@pytest.mark.parametrize("plan", ["dp2 tp2+sp ep2 2mb", "dp_replicate2 cp2 ep2 2mb recompute:full"])
def test_a_balance_loss_over_the_batch_is_of_a_microbatch_on_all_ranks(plan, folder):
    """Only by name, with a warning: other microbatches are another loss."""
    made = job(folder, f"{plan} fp64", balance_over="batch")
    found = verify(made, brief=True)
    assert found.equal and found.traffic_equal, str(found)
    assert [p.severity for p in problems(request_of(made)) if p.rule == "balance"] == ["warning"]


def test_a_balance_loss_of_each_sequence_is_the_same_however_samples_fall(folder):
    """That over the batch is not."""
    ones = []
    for over in ("batch", "sequence"):
        for mb in ("1mb", "4mb"):
            made = job(folder, f"{mb} fp64", batch=4, balance_over=over)
            steps, _ = runs.run_judge(made, open_data(made, made))
            ones.append(steps[0].auxiliary[0])
    assert ones[0] != pytest.approx(ones[1], rel=1e-3) and ones[2] == pytest.approx(ones[3])


@pytest.mark.slow
def test_a_published_plan_is_shrunk_with_its_experts(folder):
    """Mixtral with tp+sp and folded ep; Switch's dp8 ep8; TED."""
    for plan in ("dp8 tp4+sp ep8 2mb fp64", "dp8 ep8 1mb fp64", "dp2 tp4 ep2 etp4 2mb fp64"):
        big = {"hidden": 512, "heads": 16, "expert_ffn_hidden": 2048, "experts": 16, "layers": 5}
        found = verify(job(folder, plan, batch=16, **big), brief=True)
        assert found.equal and found.shrunk is not None and "ep2" in found.shrunk, str(found)


@pytest.mark.slow
def test_deepseek_v3_at_its_plan_is_shrunk_and_verified(folder):
    """Pipeline stages, experts and ZeRO 1, no tensor parallelism; latent attention, groups of experts."""
    made = job(folder, "pp16:dualpipe/32mb dp_shard128.zero1 ep64 fp64", batch=4096)
    found = verify(replace(made, model=ModelSpec.from_preset("deepseek-v3")), brief=True)
    assert found.equal and found.shrunk is not None and "ep2" in found.shrunk, str(found)


def trained(world, jobs):
    found = []
    for one in jobs:
        built = assemble(one, world)
        loss = built.model.forward_backward(built.batch(0))
        built.update.step()
        found.append((loss, built.model.routed))
    return found


def test_every_rank_knows_the_step_s_loads_and_losses(folder):
    """The same on every rank and under every plan: auxiliary losses, rows of each layer and expert."""
    plans = [job(folder, p) for p in ("dp2 tp2+sp ep2 2mb fp64", "pp2/4mb dp2 ep2 fp64")]
    with local(4, 20) as ranks:
        seen = ranks.run(trained, plans)
    (alone,) = trained(verify_jobs.SingleWorld(), [job(folder, "4mb fp64")])
    for loss, routed in [one for rank in seen for one in rank]:
        assert loss == pytest.approx(alone[0], rel=1e-12)
        assert routed.counts == alone[1].counts
        assert routed.balance == pytest.approx(alone[1].balance, rel=1e-12)
        assert routed.z == pytest.approx(alone[1].z, rel=1e-12)
    routed = alone[1]
    assert routed.rows == 8 * verify_jobs.SEQ * 2 * 2 and routed.dropped == 0
    first, second = routed.counts
    assert first != second and max(first) != max(
        second
    )  # each number below is of one layer, or of both
    assert routed.imbalance == max(max(first) / sum(first), max(second) / sum(second)) * 4
    rows = [a + b for a, b in zip(first, second, strict=True)]
    assert routed.load == pytest.approx([n / sum(rows) for n in rows], rel=1e-12)


def test_rows_counted_in_the_wrong_layer_are_seen(folder, monkeypatch):
    """They enter no loss, only what metrics say of the loads."""
    right = routing.logs

    def swapped(model):
        names, found = zip(*right(model), strict=True)
        return zip(names[::-1], found, strict=True)

    monkeypatch.setattr(routing, "logs", swapped)
    found = verify(job(folder, "dp2 ep2 2mb fp64"))
    assert not found.equal and "an expert's rows" in str(found), str(found)


# Faults that others shipped ------------------------------------------------------------------------


@pytest.fixture
def judged(folder):
    def judge(plan, **model):
        found = verify(job(folder, f"{plan} fp64", **model))
        assert not found.equal and found.divergence is not None, str(found)
        return found.divergence

    return judge


def test_expert_gradients_scaled_by_ep(judged, monkeypatch):
    """Invisible in the loss under Adam, which divides by the gradient's size."""
    finish = step_module.Reducer.finish

    def scaled(self):
        finish(self)
        for unit in self.units:
            for name, first, size in unit.places:
                if ".experts." in name:
                    unit.gradient[first : first + size].div_(2)

    monkeypatch.setattr(step_module.Reducer, "finish", scaled)
    at = judged("dp2 ep2")
    assert at.phase == "gradient" and ".experts." in at.module


@pytest.mark.parametrize("fault", ["averaged", "in the wrong group"])
def test_experts_part_of_the_norm(judged, monkeypatch, fault):
    right, make = Update.gradient_norm, runs.make_update

    def averaged(self):
        places = [(u, n, a, k) for u in self.model.units for n, a, k in u.places]
        experts = [u.gradient[a : a + k] for u, n, a, k in places if ".experts." in n]
        torch._foreach_mul_(experts, 0.5**0.5)
        norm = right(self)
        torch._foreach_mul_(experts, 2**0.5)
        return norm

    def own_only(model, train):
        """As if experts lay on tp alone: those of other ep ranks are not counted."""
        update = make(model, train)
        if model.context.coords["dp_shard"] > 0:
            update.counted = []
        return update

    if fault == "averaged":
        monkeypatch.setattr(Update, "gradient_norm", averaged)
    else:
        monkeypatch.setattr(runs, "make_update", own_only)
    assert judged("dp2 ep2").module == "step.norm"


def test_router_gradients_not_reduced_over_tp_under_sp(judged, monkeypatch):
    start = step_module.Reducer._start
    skip = lambda self, unit: None if "unit[tp]" in unit.name else start(self, unit)  # noqa: E731
    monkeypatch.setattr(step_module.Reducer, "_start", skip)
    at = judged("tp2+sp ep2")
    assert at.phase == "gradient" and at.expected == ("all_reduce", "tp")


@pytest.mark.parametrize("plan", ["tp2+sp ep2", "cp2:ring ep2"])
def test_auxiliary_loss_scaled_by_tp_or_cp(plan, judged, monkeypatch):
    """Its seed counts the tokens of a rank in place of the sequence's."""
    seed = router.Router.seed
    monkeypatch.setattr(router.Router, "seed", lambda self, c: 2 * seed(self, c))
    at = judged(plan)
    assert at.phase in ("backward", "gradient")


def test_balance_counted_on_each_rank_s_tokens(judged, monkeypatch):
    forward = Region.forward
    alone = lambda self, x: 2 * x if "router.count" in self.site else forward(self, x)  # noqa: E731
    monkeypatch.setattr(Region, "forward", alone)
    at = judged("tp2+sp ep2")
    assert "router.count" in at.message and "missing" in at.message


def test_an_auxiliary_gradient_missing_on_one_stage(judged, monkeypatch):
    make = runs.make_model

    def silent(job, laid, context, fill):
        model = make(job, laid, context, fill)
        for block in model.blocks if model.place == 1 else ():
            if getattr(block, "log", None) is not None:
                router = replace(block.mlp.router, samples=10**30)
                block.mlp = replace(block.mlp, router=router)
        return model

    monkeypatch.setattr(runs, "make_model", silent)
    at = judged("pp2/2mb dp2 ep2")
    assert at.phase in ("backward", "gradient")


def test_etp_and_tp_gradients_mixed(judged, monkeypatch):
    """Experts' gradients are added up over tp, whose ranks hold other columns of them, not over efsdp."""
    right = runs.make_context

    def mixed(laid, job, world, where, recorder=None, device=None):
        context = right(laid, job, world, where, recorder, device)
        wrong = world.make(laid.mesh.group(world.rank, "tp"), axis="efsdp", lane="dp")
        told = RecordingComm(wrong, context.recorder, where)
        return replace(context, comms={**context.comms, ("efsdp", "dp"): told})

    monkeypatch.setattr(runs, "make_context", mixed)
    at = judged("dp_shard2.zero0 tp2+sp etp2")
    assert (
        at.phase == "gradient"
        and ".experts." in at.module
        and at.expected == ("all_reduce", "efsdp")
    )


def test_gates_of_the_wrong_token(judged, monkeypatch):
    forward = dispatch.Combine.forward

    def rolled(ctx, made, gates, rows):
        return forward(ctx, made, gates.roll(1, 0), rows)

    monkeypatch.setattr(dispatch.Combine, "forward", staticmethod(rolled))
    at = judged("dp2 ep2")
    assert (at.phase, at.module) == ("forward", "blocks.1.mlp")


def test_a_balance_bias_that_drifts_on_one_rank(judged, monkeypatch):
    right = Update._balance

    def misses(self, master, rows):
        if self.model.context.rank == 0:
            right(self, master, rows)

    monkeypatch.setattr(Update, "_balance", misses)
    assert judged("dp2 ep2").phase in ("optimizer", "forward")
