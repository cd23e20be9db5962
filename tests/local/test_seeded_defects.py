"""Nineteen faults that others shipped, planted one at a time: verify must see each, and say where."""

from dataclasses import replace

import pytest
import verify_jobs

from partita.comm.protocol import Done
from partita.model.attention import Attention
from partita.model.core import Tiled
from partita.model.maker import Maker
from partita.parallel.dp.replicate import Reducer
from partita.parallel.dp.zero import Parameters
from partita.parallel.regions import Region
from partita.parallel.tp.linear import AddBias
from partita.parallel.units import Unit
from partita.train.step import Model, Update
from partita.verify import runs
from partita.verify.parity import verify


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("defects")


@pytest.fixture
def judged(folder):
    def judge(plan, family="llama", **model):
        found = verify(verify_jobs.job(folder, f"{plan} fp64", family, **model))
        assert not found.equal, str(found)
        assert found.divergence is not None, str(found)
        return found.divergence

    return judge


def test_01_no_all_reduce_in_the_backward_of_copy_to(judged, monkeypatch):
    start = Region.start_backward
    broken = lambda self, dx: Done(dx) if self.kind == "copy_to" else start(self, dx)  # noqa: E731
    monkeypatch.setattr(Region, "start_backward", broken)
    at = judged("tp2")
    assert at.phase == "backward" and at.expected == ("all_reduce", "tp")
    assert "copy_to" in at.message and "missing" in at.message


def test_02_norm_weights_not_reduced_over_tp_under_sp(judged, monkeypatch):
    start = Reducer._start
    monkeypatch.setattr(
        Reducer, "_start", lambda self, unit: None if "unit[tp]" in unit.name else start(self, unit)
    )
    at = judged("tp2+sp")
    assert at.phase == "gradient" and at.expected == ("all_reduce", "tp") and "norm" in at.module


def test_03_loss_averaged_per_rank(judged, monkeypatch):
    count = Model.count

    def local_count(self, batch):
        self.comms = replace(self.comms, count=None)
        count(self, batch)

    monkeypatch.setattr(Model, "count", local_count)
    at = judged("dp2")
    assert at.expected == ("all_reduce", "dp_replicate") and "step.count" in at.message


def test_04_replicated_parameters_counted_tp_times_in_the_norm(judged, monkeypatch):
    make = runs.make_update

    def counts_all(model, train):
        update = make(model, train)
        update.counted = [u.gradient[a : a + k] for u in model.units for _, a, k in u.places]
        return update

    monkeypatch.setattr(runs, "make_update", counts_all)
    assert judged("tp2").module == "step.norm"


def test_05_clipping_with_a_local_norm(judged, monkeypatch):
    norm = Update.gradient_norm

    def local_norm(self):
        self.model.comms = replace(self.model.comms, norm=None)
        return norm(self)

    monkeypatch.setattr(Update, "gradient_norm", local_norm)
    at = judged("tp2")
    assert at.expected == ("all_reduce", "tp") and "step.norm" in at.message


def test_06_tied_gradients_not_summed_between_stages(judged, monkeypatch):
    finish = Reducer.finish

    def untied(self):
        self.comms = {n: replace(c, across=()) for n, c in self.comms.items()}
        finish(self)

    monkeypatch.setattr(Reducer, "finish", untied)
    at = judged("pp2/2mb", "gpt2")
    assert at.module == "embedding.table" and at.expected == ("all_reduce", "tied")


def test_07_wrong_vocabulary_offset(judged, monkeypatch):
    right = Maker.vocab_range

    def shifted(self, table):
        first, rows = right(self, table)
        return first + (1 if first else 0), rows

    monkeypatch.setattr(Maker, "vocab_range", shifted)
    at = judged("tp2")
    assert at.phase == "forward" and at.module == "embedding"


def test_08_data_parallel_gradients_reduced_twice(judged, monkeypatch):
    finish = Reducer.finish

    def twice(self):
        finish(self)
        for unit in self.units:
            comm = self.comms[unit.name].reduce
            unit.gradient.copy_(comm.all_reduce(unit.gradient, site=f"{unit.name}:reduce"))

    monkeypatch.setattr(Reducer, "finish", twice)
    at = judged("dp2")
    assert at.phase == "gradient" and at.expected == ("all_reduce", "dp_replicate")
    assert "too often" in at.message


def test_09_accumulation_divided_twice(judged, monkeypatch):
    finish = Reducer.finish

    def divided(self):
        finish(self)
        for unit in self.units:
            unit.gradient.div_(2)

    monkeypatch.setattr(Reducer, "finish", divided)
    assert judged("2mb").phase == "gradient"


def test_10_one_stage_misses_an_update(judged, monkeypatch):
    step = Update.step

    def misses(self):
        if self.model.place == 1 and self.updates == 1:
            self.updates += 1
            return self.gradient_norm()
        return step(self)

    monkeypatch.setattr(Update, "step", misses)
    at = judged("pp2/2mb")
    assert at.phase == "optimizer" and at.rank == 1


def test_11_key_value_heads_cut_wrongly(judged, monkeypatch):
    right = Tiled.forward

    def wrong(ctx, q, k, v, *rest):
        return right(ctx, q, k.roll(1, 1), v.roll(1, 1), *rest)

    monkeypatch.setattr(Tiled, "forward", staticmethod(wrong))
    at = judged("2mb")
    assert (at.phase, at.module) == ("forward", "blocks.0.attention")


def test_12_dropout_masks_equal_over_tp_where_they_must_differ(judged, monkeypatch):
    right = Maker.dropout

    def same(self, site, mask):
        drop = right(self, site, mask)
        if site != "attention.core":
            return drop
        (a, b), *rest = drop.box
        return replace(drop, box=((0, b - a), *rest))

    monkeypatch.setattr(Maker, "dropout", same)
    at = judged("tp2", "gpt2", dropout=0.2)
    assert (at.phase, at.module) == ("forward", "blocks.0.attention")


def test_12_dropout_masks_different_over_tp_where_they_must_agree(judged, monkeypatch):
    right = Maker.dropout

    def differs(self, site, mask):
        drop = right(self, site, mask)
        return replace(drop, seed=drop.seed + self.context.rank) if site == "mlp.residual" else drop

    monkeypatch.setattr(Maker, "dropout", differs)
    at = judged("tp2", "gpt2", dropout=0.2)
    assert (at.phase, at.module, at.rank) == ("forward", "blocks.0.mlp", 1)


def test_13_local_positions_under_sp(judged, monkeypatch):
    call = Attention.__call__

    def local(self, x, *rest):
        share = x.shape[1]
        tables = tuple(t[:share].repeat(2, 1) for t in self.rope)
        return call(replace(self, rope=tables), x, *rest)

    monkeypatch.setattr(Attention, "__call__", local)
    at = judged("tp2+sp")
    assert (at.phase, at.module) == ("forward", "blocks.0.attention")


def test_14_one_rank_reads_other_data(judged, monkeypatch):
    right = runs.rank_batch

    def other(built, step):
        batch = right(built, step)
        if built.context.rank != 1:
            return batch
        wrong = [replace(b, ids=(b.ids + 1) % 127) for b in batch.microbatches]
        return replace(batch, microbatches=wrong)

    monkeypatch.setattr(runs, "rank_batch", other)
    at = judged("dp2")
    assert (at.phase, at.rank) == ("data", 1)


def test_15_a_bias_added_tp_times(judged, monkeypatch):
    forward = AddBias.forward
    monkeypatch.setattr(
        AddBias, "forward", staticmethod(lambda ctx, y, bias: forward(ctx, y, bias) + bias.value)
    )
    at = judged("tp2", "gpt2")
    assert (at.phase, at.module) == ("forward", "blocks.0.attention")


@pytest.mark.parametrize("name", ["blocks.1.attention.norm", "blocks.2.mlp.down", "head.table"])
def test_16_one_gradient_times_one_and_a_millionth(judged, monkeypatch, name):
    finish = Reducer.finish

    def scaled(self):
        finish(self)
        for unit in self.units:
            for weight, first, size in unit.places:
                if weight == name:
                    unit.gradient[first : first + size].mul_(1 + 1e-6)

    monkeypatch.setattr(Reducer, "finish", scaled)
    at = judged("tp2")
    assert (at.phase, at.module) == ("gradient", name)


def test_17_replicas_of_shards_drift(judged, monkeypatch):
    """HSDP whose shards are reduced among themselves only."""
    reduce = Reducer._reduce
    monkeypatch.setattr(
        Reducer, "_reduce", lambda self, unit, comm, kind: reduce(self, unit, comm, kind)
        if comm.axis != "dp_replicate" else None,
    )  # fmt: skip
    at = judged("dp_replicate2 dp_shard2.zero2")
    assert at.phase == "gradient" and at.expected == ("all_reduce", "dp_replicate")


def test_18_shards_stale_after_the_update(judged, monkeypatch):
    """Masters move, what the other ranks multiply by does not: gathered at the beginning alone."""
    refresh = Parameters.refresh

    def once(self, **which):
        if not hasattr(self, "fresh"):
            self.fresh = True
            refresh(self, **which)

    monkeypatch.setattr(Parameters, "refresh", once)
    at = judged("dp_shard2.zero1")
    assert at.expected == ("all_gather", "dp_shard") and "gather" in at.message


def test_18_shards_stale_after_the_update_where_each_block_gathers(judged, monkeypatch):
    """Stage 3 that hands in what a shard was when it was gathered first."""
    handed_in, first = Unit.handed_in, {}

    def stale(self, whole):
        if id(self) not in first:
            first[id(self)] = self, handed_in(self, whole).clone()
        return first[id(self)][1]

    monkeypatch.setattr(Unit, "handed_in", stale)
    at = judged("dp_shard2.zero3")
    assert at.module == "embedding" and at.expected == ("all_gather", "dp_shard")


def test_19_a_tied_weight_reduced_by_one_of_its_holders(judged, monkeypatch):
    """Stage 3 that scatters the head's part alone: the embedding's never arrives."""
    done = Reducer.block_done

    def early(self, block):
        if block == "head":
            for unit in self.units:
                if unit.spec.blocks == ("embedding", "head"):
                    self._start(unit)
        elif block == "embedding":
            for unit in self.units:
                if unit.spec.blocks == ("embedding", "head"):
                    unit.gradients.take()
            return block in self._last
        return done(self, block) if block != "head" else block in self._last

    monkeypatch.setattr(Reducer, "block_done", early)
    at = judged("dp_shard2.zero3", tied=True)
    assert at.phase == "gradient" and at.module in ("embedding.table", "head.norm")
