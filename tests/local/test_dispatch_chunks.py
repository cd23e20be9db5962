"""Dispatch in chunks: rows of one travel while another's are computed on, on links of stated time."""

import time
from dataclasses import dataclass

import pytest
import torch
import verify_jobs
from comm_contract import best_of

from partita.comm.clocked import ClockedWorld, Link
from partita.comm.threads.local import local
from partita.model.moe import MoE
from partita.parallel.ep.dispatch import Combine, Exchange
from partita.parallel.pp.pieces import run
from partita.parallel.regions import IDENTITY, Region
from partita.verify.parity import verify

TOKENS, HIDDEN = 64, 8
LEG_S = 0.06  # of all rows one way, on the link


@pytest.mark.parametrize("plan", ["dp_shard2.zero2 ep2 expert.chunks=3 pp2:zb_h1/4mb fp64"])
def test_chunks_change_no_number(plan, tmp_path):
    """More chunks than some have tokens too; one all_to_all a chunk, the same bytes."""
    found = verify(verify_jobs.job(tmp_path, plan, **verify_jobs.EXPERTS))
    assert found.equal, str(found)
    whole = verify(
        verify_jobs.job(tmp_path, plan.replace("chunks=3", "chunks=1"), **verify_jobs.EXPERTS)
    )
    calls, once = ([t for t in f.recorded if t.op == "all_to_all"] for f in (found, whole))
    assert [t.count for t in calls] == [3 * t.count for t in once]
    assert [t.bytes for t in calls] == [t.bytes for t in once]


def test_rows_that_are_weighed_some_at_a_time_are_all_weighed():
    """More than a turn's: each row's gradient is its token's by its gate, a gate's their product."""
    dice = torch.Generator().manual_seed(0)
    tokens, hidden, top_k = 300, 1024, 2

    def drawn(*shape):
        return torch.randn(*shape, generator=dice, dtype=torch.float64)

    chosen = torch.stack([torch.randperm(4, generator=dice)[:top_k] for _ in range(tokens)])
    (rows,) = Exchange(4, top_k, *[IDENTITY] * 6).plan(chosen[None])
    made, gates = drawn(tokens * top_k, hidden), drawn(tokens, top_k).requires_grad_()
    rows.start_to_tokens(made)
    dy, order = drawn(tokens, hidden), rows.order
    Combine.apply(torch.empty(0, requires_grad=True), gates, rows).backward(dy)
    each = dy[order // top_k]
    torch.testing.assert_close(rows.at_experts(), each * gates.detach().flatten()[order, None])
    slopes = torch.empty(tokens * top_k, dtype=torch.float64)
    slopes[order] = (each * made).sum(-1)
    torch.testing.assert_close(gates.grad, slopes.view(tokens, top_k))


@dataclass(frozen=True)
class Experts:
    """A linear of experts that takes `seconds` for all rows that two ranks send, forward and backward alike;
    the one that narrows takes nothing."""

    seconds: float
    widens: bool

    def __call__(self, x, counts, marks):
        share = self.seconds * x.shape[0] / (2 * TOKENS)
        return Asleep.apply(torch.cat((x, x), -1), share) if self.widens else x


class Asleep(torch.autograd.Function):
    """Takes a time, and as much backward."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        time.sleep(ctx.seconds)
        return dx, None


def layer(world, chunks, compute_s):
    """Seconds of a forward and of a backward of the experts of two ranks, all tokens at both equally."""
    nbytes = TOKENS * 2 * HIDDEN * 4
    clocked = ClockedWorld(world, {"ep": Link(0.0, nbytes / LEG_S)})
    comm = clocked.make((0, 1), axis="ep", lane="ep")
    quick = world.make((0, 1), axis="ep", lane="counts")
    count, send, back = (
        Region(kind, c, f"{kind}")
        for kind, c in (("counts", quick), ("send", comm), ("back", comm))
    )
    exchange = Exchange(2, 2, count, send, IDENTITY, IDENTITY, back, IDENTITY, None, chunks)
    moe = MoE(None, None, exchange, Experts(compute_s, True), Experts(compute_s, False), None)
    x = torch.ones(TOKENS, HIDDEN, requires_grad=True)
    gates = torch.full((TOKENS, 2), 0.5, requires_grad=True)
    chosen = torch.tensor([0, 1]).expand(1, TOKENS, 2)
    start = time.perf_counter()
    (y,) = run(moe.experts(x, gates, exchange.plan(chosen)))
    middle = time.perf_counter()
    y.sum().backward()
    return middle - start, time.perf_counter() - middle


def expected(chunks, compute_s):
    """Both ways on one link: chunks leave in order, come back in order, each computed on when it is there."""
    leg, work = LEG_S / chunks, compute_s / chunks
    link, busy, done = chunks * leg, 0.0, []
    for i in range(chunks):
        busy = max(busy, (i + 1) * leg) + work
        done.append(busy)
    for ready in done:
        link = max(link, ready) + leg
    return link


@pytest.mark.timed
@pytest.mark.parametrize(
    ("chunks", "compute_s"),
    [(4, 0.04), *(pytest.param(*x, marks=pytest.mark.slow) for x in ((1, 0.1), (4, 0.2)))],
)
def test_what_is_exposed_is_what_is_not_computed_beside(chunks, compute_s):
    """Within 10 %: one chunk hides nothing; where compute is longer, all but the first chunk's way there and
    the last one's back is hidden; where transfers are longer, exposed = transfer - compute."""
    want = expected(chunks, compute_s)
    transfer = 2 * LEG_S
    hidden = {(1, 0.1): 0.0, (4, 0.2): transfer * 3 / 4, (4, 0.04): 0.04}[chunks, compute_s]
    assert want - compute_s == pytest.approx(transfer - hidden)

    def both_ways():
        with local(2, 20) as ranks:
            found = ranks.run(layer, chunks, compute_s)
        return [max(f[i] for f in found) for i in range(2)]

    best_of(both_ways, want, 1.1 * want)
