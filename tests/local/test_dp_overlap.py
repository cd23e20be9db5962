"""Gradients are summed, and stage 3's weights gathered, while blocks compute."""

import time

import pytest
import verify_jobs
from comm_contract import best_of

from partita.comm.clocked import ClockedWorld, Link
from partita.comm.threads.local import local
from partita.train.build import assemble

BLOCKS = 4
COMPUTE_S = 0.05  # of each block


def sites(world, job):
    """Of gradients that set out before the last block's backward of the step was over, and of all."""
    built = assemble(job, world)
    reducer, recorder, sent, early = built.model.reducer, built.context.recorder, [], []
    done = reducer.block_done

    def noted(block):
        sent.extend(t.site for t in recorder.take() if "unit[" in t.site)
        if block == "embedding":
            early[:] = sent
        return done(block)

    reducer.block_done = noted
    recorder.take()
    built.model.forward_backward(built.batch(0))
    sent.extend(t.site for t in recorder.take() if "unit[" in t.site)
    return early, sent


@pytest.mark.parametrize("stage", range(3))
def test_reduction_starts_before_the_last_backward_ends_at_every_stage(stage, tmp_path):
    """Where a unit is a block, all but the last one's have set out, in the order of backward."""
    line = f"dp_shard2.zero{stage} 2mb data.bucket_bytes=1"
    with local(2, 20) as ranks:
        found = ranks.run(sites, verify_jobs.job(tmp_path, line, layers=BLOCKS - 2, tied=False))
    names = [f"{n}.unit[dp_shard]" for n in ("head", "blocks.1", "blocks.0", "embedding")]
    want = [f"{name}:{'scatter' if stage else 'reduce'}" for name in names]
    times = 2 if stage == 2 else 1  # a microbatch
    for early, whole in found:
        assert (early, whole) == ((want * times)[:-1], want * times)


def seconds(world, job, transfer_s, forward):
    """Of all blocks' forward with their gathers, or of their backward until gradients are summed; a block
    takes COMPUTE_S, a unit `transfer_s` on its way."""
    link, times = Link(latency_s=0.0, bytes_per_s=1e15), []
    built = assemble(job, ClockedWorld(world, {"dp": link}))
    model = built.model
    model.forward_backward(built.batch(0))

    def around(of, name, rests=False):
        whole = getattr(of, name)

        def noted(*given):
            link.latency_s = transfer_s  # from the first of them on
            times.append(time.perf_counter())
            time.sleep(COMPUTE_S * rests)
            found = whole(*given)
            times.append(time.perf_counter())
            return found

        setattr(of, name, noted)

    gatherer = model.executor.modules[0].data.gatherer
    if forward:
        around(gatherer, "forward")
        around(gatherer, "forward_done", rests=True)
    else:
        around(gatherer, "backward_done", rests=True)
        around(model.reducer, "finish")
    batch = built.batch(1)
    world.comm("world", lane="start").barrier(site="start")
    model.forward_backward(batch)
    return times[-1] - times[0]


@pytest.mark.timed
@pytest.mark.parametrize("transfer_s", [COMPUTE_S / 2, 2 * COMPUTE_S])
@pytest.mark.parametrize("stage", [0, 3])
def test_what_is_seen_of_transfers_is_what_compute_does_not_hide(stage, transfer_s, tmp_path):
    """Sums of stage 0 behind backward, gathers of stage 3 before forward, a block apart: of n blocks n times
    the longer of both, and the shorter once, within 10 %."""
    line = f"dp_shard2.zero{stage} 1mb data.bucket_bytes=1"
    job = verify_jobs.job(tmp_path, line, layers=BLOCKS - 2, tied=False)
    want = BLOCKS * max(COMPUTE_S, transfer_s) + min(COMPUTE_S, transfer_s)

    def soonest():
        with local(2, 20) as ranks:
            return [min(ranks.run(seconds, job, transfer_s, stage == 3))]

    best_of(soonest, want, 1.1 * want)
