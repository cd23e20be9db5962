"""ZeRO as it runs: how many blocks' weights are there, what is stored, checkpoints from any plan to any."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import verify_jobs
from saves import save_run

from partita.comm.threads.local import LocalComm, local
from partita.parallel.dp import zero
from partita.parallel.read import state_bytes
from partita.simulate.memory import coming_bytes
from partita.train.build import assemble
from partita.train.checkpoints.checkpoint import Ranks
from partita.train.checkpoints.resume import load_run
from partita.verify.parity import verify


def gathered(world, job):
    """Most stage-3 units whose memory was held at once in a step, and what was left behind it."""
    built = assemble(job, world)
    parameters = built.model.executor.modules[0].data.gatherer.parameters
    seen, bring = [], zero.Parameters.bring

    def counted(self, units):
        found = bring(self, units)
        seen.append(len(self._whole))
        return found

    parameters.bring = counted.__get__(parameters)
    built.model.forward_backward(built.batch(0))
    return max(seen), len(parameters._whole)


@pytest.mark.parametrize(
    ("prefetch", "moves", "most"), [(0, True, 1), (1, True, 2), (3, True, 4), (1, False, 1)]
)
def test_at_most_one_and_prefetch_gathered_blocks(prefetch, moves, most, tmp_path, monkeypatch):
    """One where a gather that is only started would not move."""
    monkeypatch.setattr(LocalComm, "moves", lambda self, size: moves)
    job = verify_jobs.job(tmp_path, f"dp_shard2.zero3 2mb data.prefetch={prefetch}", tied=False)
    with local(2, 20) as ranks:
        assert ranks.run(gathered, job) == [(most, 0)] * 2


def test_a_tied_table_stays_while_either_of_its_blocks_uses_it(tmp_path):
    """Asked for ahead by the other block before the first has let go of it."""
    line = "dp_shard2.zero3 data.prefetch=3 2mb fp64"
    found = verify(verify_jobs.job(tmp_path, line, layers=2, tied=True), brief=True)
    assert found.equal and found.traffic_equal, str(found)


def test_without_resharding_all_blocks_stay_until_the_last_backward(tmp_path):
    line = "dp_shard2.zero3 2mb data.reshard_after_forward=false"
    with local(2, 20) as ranks:
        assert ranks.run(gathered, verify_jobs.job(tmp_path, line, tied=False)) == [(5, 0)] * 2


def stored(world, job):
    """Bytes of working weights, gradients and masters that the units own, and what is declared."""
    built = assemble(job, world)
    built.model.forward_backward(built.batch(0))
    built.update.step()
    model = built.model
    held: Counter[str] = Counter()
    blocks = [b for s in model.laid.stages_of(model.place) for b in s.blocks]
    for unit in model.units:
        whole = unit.gradient if unit.spec.cuts_gradient else unit.gradients.tensor
        held["parameters"] += unit.working.untyped_storage().nbytes()
        held["gradients"] += whole.untyped_storage().nbytes()
        if unit.master.dtype != unit.working.dtype:
            held["optimizer"] += unit.master.untyped_storage().nbytes()
    for state in built.update.optimizer.state.values():
        held["optimizer"] += sum(x.nbytes for n, x in state.items() if n != "step")
    model.begin(built.batch(1))  # where a backward brings gradients, they are gone
    coming = sum(coming_bytes(b, model.laid.sizes) for b in blocks)
    own = [u.gradient.untyped_storage().nbytes() for u in model.units if u.spec.cuts_gradient]
    assert (sum(own), coming) == (0, held["gradients"] * bool(own))
    return held, sum((state_bytes(b, model.laid.sizes) for b in blocks), Counter())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", range(4))
def test_what_is_stored_is_declared(stage, dtype, tmp_path):
    job = verify_jobs.job(tmp_path, f"dp_shard4.zero{stage} {dtype}", tied=True)
    with local(4, 20) as ranks:
        found = ranks.run(stored, job)
    for rank, (held, declared) in enumerate(found):
        padding = 4 * 12 * 7 * (rank == 3)  # of the last shard, which no optimizer sees
        assert held["parameters"] == declared["parameters"]
        assert held["gradients"] == declared["gradients"]
        assert declared["optimizer"] - padding <= held["optimizer"] <= declared["optimizer"]


def trained(world, job, folder, resume):
    """Two steps, saved; or resumed from there: what this rank holds of every weight and moment."""
    built = assemble(job, world)
    if resume:
        load_run(resume, job, built.model, built.update, built.fingerprint)
    for step in range(2 * (resume is None)):
        built.model.forward_backward(built.batch(step))
        built.update.step()
    ranks = Ranks(world.rank, world.size, built.agree)
    return save_run(folder, 2, job, built.model, built.update, built.fingerprint, ranks)


LINES = ["dp_shard2.zero3 tp2 bf16", "dp_shard4.zero1 fp16", "pp2/2mb dp_shard2.zero2", "fp32"]


def test_any_plan_loads_what_any_plan_saved(tmp_path):
    """Saved by ZeRO, resumed and saved by another cut, back to one rank: not a bit has changed."""
    from safetensors import safe_open

    path, whole = None, []
    for line in (*LINES, LINES[0], "fp32"):
        job = verify_jobs.job(tmp_path, f"{line}", tied=True)
        with local(job.plan.world_size, 20) as ranks:
            folder = tmp_path / f"{len(whole)}-{line.replace('/', '-')}"
            path = ranks.run(trained, job, folder, path)[0]
        if line == "fp32":
            with safe_open(path / "rank-0.safetensors", framework="pt") as file:
                whole.append({k: file.get_tensor(k) for k in file.keys()})  # noqa: SIM118
        else:
            whole.append(None)
    first, again = whole[3], whole[5]
    assert first.keys() == again.keys() and len(first) > 60
    assert all(torch.equal(first[k], again[k]) for k in first)


def order(world, job):
    """Sites of what a rank sent over its shards in the first microbatch, in order."""
    built = assemble(job, world)
    built.context.recorder.take()
    built.model.forward_backward(built.batch(0))
    sent = built.context.recorder.take()
    return [t.site for t in sent if "unit[" in t.site and t.microbatch == 0]


@pytest.mark.parametrize(("prefetch", "moves"), [(0, True), (1, False)])
def test_reduction_starts_before_the_last_backward_ends(prefetch, moves, tmp_path, monkeypatch):
    """Every block's scatter goes out before the weights of the block below are gathered again, where they
    are not gathered ahead."""
    monkeypatch.setattr(LocalComm, "moves", lambda self, size: moves)
    job = verify_jobs.job(tmp_path, f"dp_shard2.zero3 2mb data.prefetch={prefetch}", tied=False)
    with local(2, 20) as ranks:
        (sites, other) = ranks.run(order, job)
    backward = sites[5:]  # behind the gathers of five blocks
    names = ["head", *(f"blocks.{i}" for i in range(2, -1, -1))]
    want = [f"{n}.unit[dp_shard]:{k}" for n in names for k in ("gather", "scatter")]
    assert backward == [*want, "embedding.unit[dp_shard]:scatter"]
    assert sites == other
