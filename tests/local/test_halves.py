"""A split backward is real: W holds its matmuls, the gradient of I leaves before its W, each W counts."""

import time

import pytest
import torch
import verify_jobs
from torch.utils.flop_counter import FlopCounterMode

from partita.comm.threads.local import local
from partita.parallel.deferred import WeightQueue
from partita.parallel.laid import lay
from partita.parallel.read import op_flops
from partita.parallel.regions import IDENTITY
from partita.parallel.tp.linear import Column
from partita.parallel.units import Matrix
from partita.simulate.predict import request_of
from partita.train.build import assemble


def addmm_flops(out, a, b, *rest, out_val=None, **more):
    """torch has no formula for the in-place form."""
    return 2 * a[0] * a[1] * b[1]


class Span:
    """Notes an action's FLOPs, and what the rank had sent before it began."""

    def __init__(self, action, seen, recorder):
        self.action, self.seen, self.recorder = action, seen, recorder

    def __enter__(self):
        self.sent = [(t.op, t.site, t.microbatch) for t in self.recorder.transfers]
        self.flops = FlopCounterMode(
            display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}
        )
        self.flops.__enter__()

    def __exit__(self, *error):
        self.flops.__exit__(*error)
        self.seen[str(self.action)] = (self.flops.get_total_flops(), self.sent)


def watched(world, job):
    """Per action its FLOPs and what was sent before; and the FLOPs of the stages' linears."""
    built = assemble(job, world)
    seen = {}
    built.model.executor.span = lambda action: Span(action, seen, built.context.recorder)
    built.context.recorder.take()
    built.model.forward_backward(built.batch(0))
    laid = built.model.laid
    linear = {
        s.index: sum(
            op_flops(op, laid.sizes) for b in s.blocks for op in b.ops() if op.kind == "linear"
        )
        for s in laid.stages_of(built.model.place)
    }
    return seen, linear


@pytest.mark.parametrize("plan", ["pp2:zb_h1/4mb", "pp2:zb_v/4mb recompute:full"])
def test_w_holds_its_matmuls_and_i_is_sent_before(plan, tmp_path):
    job = verify_jobs.job(tmp_path, plan, hidden=64, heads=4, ffn_hidden=192)
    with local(2, 20) as ranks:
        found = ranks.run(watched, job)
    for seen, linear in found:
        for name, (flops, sent) in seen.items():
            stage, kind, m = int(name[0]), name[1], int(name[2:])
            if kind == "W":
                assert flops == linear[stage], name
                neighbours = [x for x, _ in found]
                if stage and f"{stage - 1}I{m}" not in seen:  # its consumer is on the other rank
                    assert any(op == "send" and at == m for op, _, at in sent), (name, sent)
                assert any(f"{stage}I{m}" in x for x in neighbours)


def test_the_weight_half_of_a_linear_is_half_of_its_time():
    width, queue = 512, WeightQueue()
    value, gradient = torch.randn(width, width), torch.zeros(width, width)
    linear = Column((Matrix(value, gradient, (width, width), queue),), (), IDENTITY)
    spent = {"I": [], "W": []}
    for m in range(5):
        y = linear(torch.randn(1, width, width, requires_grad=True))
        queue.split(0, m)
        start = time.thread_time()
        y.backward(torch.ones_like(y))
        spent["I"].append(time.thread_time() - start)
        queue.close()
        start = time.thread_time()
        queue.run(0, m)
        spent["W"].append(time.thread_time() - start)
    i, w = (min(spent[k]) for k in "IW")
    assert 0.25 * (i + w) <= w <= 0.75 * (i + w)


def gradients(world, job, dropped):
    built = assemble(job, world)
    executor = built.model.executor
    executor.actions = [a for a in executor.actions if str(a) != dropped]
    built.model.forward_backward(built.batch(0))
    return {u.name: u.gradient.clone() for u in built.model.units}


def test_a_dropped_w_changes_exactly_its_stages_gradients(tmp_path):
    job = verify_jobs.job(tmp_path, "pp2:zb_v/4mb fp64", "gpt2", tied=False)
    with local(2, 20) as ranks:
        whole = ranks.run(gradients, job, "")
        without = ranks.run(gradients, job, "1W2")
    mine = lay(request_of(job)).stages[1].names
    for want, got in zip(whole, without, strict=True):
        for name, gradient in want.items():
            assert torch.equal(gradient, got[name]) == (
                ".".join(name.split(".")[:2]) not in mine
            ), name
