"""More planted faults, other ways to be wrong than the sixteen: verify sees each where it begins."""

import math
from dataclasses import replace

import pytest
import torch
import verify_jobs

from partita.comm.protocol import Done
from partita.comm.recording import RecordingComm
from partita.model import transformer
from partita.model.dropout import Dropout
from partita.parallel import units
from partita.parallel.dp.replicate import Reducer
from partita.parallel.ep import router
from partita.parallel.ep.router import choose
from partita.parallel.precision.scaler import LossScaler
from partita.parallel.regions import Region
from partita.parallel.units import Unit
from partita.train.optimizer import optim, slots
from partita.train.step import Model, Update
from partita.verify import runs
from partita.verify.parity import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("defects")


@pytest.fixture
def judged(folder):
    def judge(plan, family="llama", **model):
        found = verify(verify_jobs.job(folder, plan, family, **model))
        assert not found.equal, str(found)
        assert found.divergence is not None, str(found)
        return found.divergence

    return judge


def test_a_region_off_by_a_millionth_on_one_rank(judged, monkeypatch):
    start = Region.start_forward

    def off(self, x):
        handle = start(self, x)
        wrong = self.comm.rank == 1 and "blocks.2.mlp.down" in self.site
        return Done(handle.wait() * (1 + 1e-6)) if wrong else handle

    monkeypatch.setattr(Region, "start_forward", off)
    at = judged("tp2 fp64")
    assert (at.module, at.phase, at.rank) == ("blocks.2.mlp", "forward", 1)


def test_shards_gathered_in_another_order(judged, monkeypatch):
    start = RecordingComm.start_all_gather

    def reversed_ranks(self, x, *, site, dim=0, out=None):
        whole = start(self, x, site=site, dim=dim, out=out).wait()
        return Done(torch.cat(whole.chunk(self.size, dim)[::-1], dim))

    monkeypatch.setattr(RecordingComm, "start_all_gather", reversed_ranks)
    at = judged("tp2+sp fp64")
    assert at.phase == "forward" and at.expected == ("all_gather", "tp")


def test_a_gradient_that_never_came_in_either_microbatch(judged, monkeypatch):
    """Each microbatch has targets in one of the steps, so neither can hide."""
    receive = RecordingComm.receive
    for lost in (0, 1):

        def drops(self, like, source, *, key, site, lost=lost):
            handle = receive(self, like, source, key=key, site=site)
            gone = key.kind == "B" and key.microbatch == lost
            return Done(torch.zeros_like(handle.wait())) if gone else handle

        monkeypatch.setattr(RecordingComm, "receive", drops)
        at = judged("pp2/2mb fp64")
        assert (at.module, at.phase) == ("blocks.1.mlp", "backward")


def test_dropout_keyed_by_the_ranks_own_sample_number(judged, monkeypatch):
    call = Dropout.__call__

    def own(self, x, step, batch):
        return call(self, x, step, replace(batch, samples=torch.arange(len(batch.samples))))

    monkeypatch.setattr(Dropout, "__call__", own)
    assert judged("dp2 fp64", "gpt2", dropout=0.2).module == "embedding"


def test_the_last_position_of_a_table_is_the_one_before(judged, monkeypatch):
    make = transformer.tables

    def short(*given):
        cos, sin = (t.clone() for t in make(*given))
        cos[-1], sin[-1] = cos[-2], sin[-2]
        return cos, sin

    monkeypatch.setattr(transformer, "tables", short)
    at = judged("2mb fp64")
    assert (at.module, at.phase) == ("blocks.0.attention", "forward")


def test_decay_of_norms_is_the_optimizers_fault(judged, monkeypatch):
    monkeypatch.setattr(slots, "decays_weight", lambda name: True)
    at = judged("2mb fp64")
    assert at.phase == "optimizer" and at.module.endswith("norm")


def test_the_rate_of_the_update_before_or_averages_swapped_are_the_optimizers_fault(
    judged, monkeypatch
):
    """Faults in the very lines that make the optimizer: the judge has its own."""
    rate, (adamw, takes) = optim.learning_rate, optim.KINDS["adamw"]
    with monkeypatch.context() as patch:
        patch.setattr(optim, "learning_rate", lambda train, update: rate(train, update - 1))
        at = judged("dp2 fp64")
        assert at.phase == "optimizer" and "update 1" in at.message

    def swapped(groups, betas, **more):
        return adamw(groups, betas=betas[::-1], **more)

    monkeypatch.setitem(optim.KINDS, "adamw", (swapped, takes))
    assert judged("dp2 fp64").phase == "optimizer"


def test_momentum_forgotten_between_steps(judged, monkeypatch):
    step = Update.step

    def forgets(self):
        norm = step(self)
        self.optimizer.state.clear()
        return norm

    monkeypatch.setattr(Update, "step", forgets)
    at = judged("2mb fp64")
    assert at.phase == "optimizer" and "update 2" in at.message


def test_a_replica_that_drifts_after_the_last_step(judged, monkeypatch):
    step = Update.step

    def drifts(self):
        norm = step(self)
        if self.model.context.rank == 1 and self.updates == 2:
            self.slots[-1].master.data.mul_(1 + 1e-6)
        return norm

    monkeypatch.setattr(Update, "step", drifts)
    at = judged("dp2 fp64")
    assert (at.phase, at.rank) == ("optimizer", 1)


def test_masks_of_the_first_step_again_in_the_second(judged, monkeypatch):
    call = Dropout.__call__
    monkeypatch.setattr(Dropout, "__call__", lambda self, x, step, batch: call(self, x, 0, batch))
    assert judged("2mb fp64", "gpt2", dropout=0.2).module == "embedding"


def test_a_replay_that_draws_other_masks(judged, monkeypatch):
    """Forward makes no graph under full recomputation, the replay does."""
    call = Dropout.__call__

    def other(self, x, step, batch):
        again = torch.is_grad_enabled() and "blocks.2.attention.residual" in self.site
        return call(self, x, step + again, batch)

    monkeypatch.setattr(Dropout, "__call__", other)
    at = judged("2mb recompute:full fp64", "gpt2", dropout=0.2)
    assert at.phase in ("backward", "gradient") and at.module.startswith("blocks.2.")


def test_an_overflow_that_one_rank_sees_alone(judged, monkeypatch):
    """It skips the update and halves its scale; the others go on."""
    make, right, alone = runs.make_model, LossScaler.step, []

    def made(job, laid, context, fill):
        model = make(job, laid, context, fill)
        alone.extend([model.scaler] * (context.rank == 1))
        return model

    def sees(self, norm):
        return right(self, math.inf if any(self is a for a in alone) else norm)

    monkeypatch.setattr(runs, "make_model", made)
    monkeypatch.setattr(LossScaler, "step", sees)
    at = judged("tp2 fp16", layers=2)
    assert (at.phase, at.rank) == ("optimizer", 1)


def test_masters_rounded_to_bf16_are_seen_though_gradients_are_only_close(judged, monkeypatch):
    round_working = Unit.round_working

    def rounds_both(self):
        round_working(self)
        if self.working.dtype == torch.bfloat16:
            self.master.data.copy_(self.working.reshape(-1))

    monkeypatch.setattr(Unit, "round_working", rounds_both)
    assert judged("2mb bf16").phase == "optimizer"


@pytest.mark.parametrize("stage", [1, 3])
def test_working_weights_cut_off_instead_of_rounded(folder, monkeypatch, stage):
    """At stage 3 they are made for each gather."""

    def cut(master):
        return (master.detach().view(torch.int32) & -65536).view(torch.float32)

    def cut_off(self):
        if self.working.dtype == torch.bfloat16 and not self.casts:
            self.shard.copy_(cut(self.master))

    hand_in = Unit.handed_in

    def cut_there(self, whole):
        return whole[self.part].copy_(cut(self.master)) if self.casts else hand_in(self, whole)

    monkeypatch.setattr(Unit, "round_working", cut_off)
    monkeypatch.setattr(Unit, "handed_in", cut_there)
    found = verify(verify_jobs.job(folder, f"dp_shard2.zero{stage} bf16", layers=2))
    wrong = found.trials[-1].worst("weights")
    assert wrong.bad and wrong.relative == 2.0**-9 and found.divergence is not None


def test_a_gradient_times_1_02_in_bf16_alone(judged, monkeypatch):
    finish = Reducer.finish

    def scaled(self):
        finish(self)
        for unit in self.units:
            for weight, first, size in unit.places:
                if weight == "blocks.1.mlp.down" and unit.working.dtype == torch.bfloat16:
                    unit.gradient[first : first + size].mul_(1.02)

    monkeypatch.setattr(Reducer, "finish", scaled)
    at = judged("tp2 bf16", hidden=64, ffn_hidden=96, layers=3)
    assert (at.phase, at.module) == ("gradient", "blocks.1.mlp.down")


def test_gradients_added_up_in_bf16(judged, monkeypatch):
    add = units.add_product

    def narrow(gradient, dy, x, *how):
        add(gradient, dy, x, *how)
        if dy.dtype == torch.bfloat16:
            gradient.copy_(gradient.bfloat16())

    monkeypatch.setattr(units, "add_product", narrow)
    at = judged("tp2 4mb bf16", layers=2)
    assert at.phase == "gradient" and at.module.startswith("blocks.")


def test_a_swapped_pair_of_batches_on_one_stage(judged, monkeypatch):
    right = runs.rank_batch

    def swapped(built, step):
        batch = right(built, step)
        wrong = batch.microbatches[::-1] if built.context.rank == 1 else batch.microbatches
        return replace(batch, microbatches=wrong)

    monkeypatch.setattr(runs, "rank_batch", swapped)
    assert judged("pp2/2mb fp64").rank == 1


@pytest.mark.parametrize("plan, op", [("tp2", "all_reduce"), ("tp2+sp", "reduce_scatter")])
def test_the_latent_keys_positional_part_not_reduced_over_tp(plan, op, judged, monkeypatch):
    start = Region.start_backward

    def own_heads_only(self, dx):
        if not self.site.endswith(("k_pe:copy_to", "k_pe:gather_from")):
            return start(self, dx)
        return Done(dx.chunk(self.comm.size, 1)[self.comm.rank] if "gather" in self.site else dx)

    monkeypatch.setattr(Region, "start_backward", own_heads_only)
    at = judged(f"{plan} fp64", **verify_jobs.MLA)
    assert at.phase == "backward" and at.expected == (op, "tp") and "k_pe" in at.message


@pytest.mark.parametrize("plan", ["tp2 fp64", "tp2 bf16"])
def test_a_number_that_is_none_is_a_difference_with_a_place(plan, judged, monkeypatch):
    start = Region.start_forward
    site = "blocks.1.mlp.down:reduce_from"
    spoilt = lambda self, x: start(self, x * float("nan") if self.site == site else x)  # noqa: E731
    monkeypatch.setattr(Region, "start_forward", spoilt)
    at = judged(plan, layers=2)
    assert (at.phase, at.module) == ("forward", "blocks.1.mlp") and "off by inf" in at.message


def test_a_gradient_that_is_none_on_one_rank(judged, monkeypatch):
    run = Model.forward_backward

    def spoilt(self, batch):
        loss = run(self, batch)
        if self.context.rank == 1:
            self.units[0].gradient[0] = torch.inf
        return loss

    monkeypatch.setattr(Model, "forward_backward", spoilt)
    at = judged("pp2/2mb fp64", layers=2)
    assert (at.phase, at.rank) == ("gradient", 1)


def test_the_judge_shares_no_angles_and_no_choice_of_experts(judged, monkeypatch):
    turned = transformer.tables
    with monkeypatch.context() as m:
        m.setattr(transformer, "tables", lambda *a: tuple(t * (1 + 1e-6) for t in turned(*a)))
        assert judged("2mb fp64", layers=2).module == "blocks.0.attention"
    without_bias = lambda spec, scores, bias: choose(spec, scores, None)  # noqa: E731
    monkeypatch.setattr(router, "choose", without_bias)
    at = judged("2mb fp64", **verify_jobs.EXPERTS)
    assert (at.phase, at.module) == ("forward", "blocks.1.mlp")
