"""A segment that is one node of autograd is the same segment, bit for bit."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
import verify_jobs

from partita.comm.single import SingleWorld
from partita.parallel.kernels.chain import Residual, call
from partita.train.build import assemble


class Double(torch.autograd.Function):
    """Keeps what it makes; notes how many of the kept tensors are alive when its backward runs."""

    @staticmethod
    def forward(ctx, x, made, alive):
        y = 2 * x
        made.append(y.data_ptr())
        ctx.save_for_backward(x, y)
        ctx.alive = alive
        return y

    @staticmethod
    def backward(ctx, dy):
        ctx.alive.append([t.data_ptr() for t in ctx.saved_tensors])
        return 2 * dy, None, None


def test_links_are_run_in_order_and_each_is_given_back_what_it_kept():
    made, alive = [], []
    x = torch.ones(3, requires_grad=True)
    links = [(Double, made, alive)] * 3
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        y = Residual.apply(x, links)
    y.backward(torch.ones(3))
    assert y.tolist() == [9.0] * 3 and x.grad.tolist() == [9.0] * 3
    before = [x.data_ptr(), *made[:-1]]
    assert alive == [list(pair) for pair in zip(before[::-1], made[::-1], strict=True)]


def test_without_a_graph_a_function_is_its_forward(monkeypatch):
    made, alive = [], []
    x = torch.ones(3, requires_grad=True)
    assert call(Double, x, made, alive).grad_fn is not None
    monkeypatch.setattr(Double, "apply", None)
    with torch.no_grad():
        assert call(Double, x, made, alive).tolist() == [2.0] * 3
    assert len(made) == 2 and not alive


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_layer_in_parts_is_the_same(dtype, tmp_path):
    built = assemble(verify_jobs.job(tmp_path, f"1mb {dtype}", "llama"), SingleWorld())
    model, batch = built.model, built.batch(0).microbatches[0]
    block, (unit, *_) = model.blocks[1], model.units
    width = built.model.laid.request.model.hidden
    dice = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, *batch.ids.shape, width, generator=dice).to(unit.working.dtype)

    def run():
        for u in model.units:
            u.gradients.tensor.zero_()
        leaf = x.clone().requires_grad_()
        y = block.run(leaf, batch)
        nodes = {type(f).__name__ for f, _ in y.grad_fn.next_functions}
        y.backward(dy)
        return [y, leaf.grad, *(u.gradients.tensor.clone() for u in model.units)], nodes

    chained, nodes = run()
    assert nodes == {"ResidualBackward"}
    block.attention = replace(block.attention, chained=False)
    block.mlp = replace(block.mlp, chained=False)
    apart, nodes = run()
    assert nodes != {"ResidualBackward"}
    assert all(torch.equal(a, b) for a, b in zip(chained, apart, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layers_in_a_row_are_two_nodes_and_the_same(dtype, tmp_path):
    built = assemble(verify_jobs.job(tmp_path, f"1mb {dtype}", "llama"), SingleWorld())
    model, batch = built.model, built.batch(0)
    (stage,) = model.executor.modules.values()
    saved = []

    def run(joins):
        stage.__dict__["_joins"] = joins
        model.begin(batch)
        saved.clear()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.shape) or t, lambda t: t
        ):
            y = stage(None, batch.microbatches[0])
        nodes, row = [], [y.grad_fn]
        while row:
            nodes.append(type(row[-1]).__name__)
            row += [f for f, _ in row.pop().next_functions if f is not None]
        y.backward()
        return [y, *(u.gradients.tensor.clone() for u in model.units)], nodes, sorted(saved)

    (one, nodes, kept), (apart, others, held) = run(True), run(False)
    layers = len(model.blocks) - 2
    assert nodes.count("ResidualBackward") == 2 and others.count("ResidualBackward") == 2 * layers
    assert kept == held and all(torch.equal(a, b) for a, b in zip(one, apart, strict=True))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_layers_with_experts_in_a_row_are_the_same_and_stop_where_others_compute(dtype, tmp_path):
    experts = {"experts": 4, "top_k": 2, "shared_experts": 1, "shared_gate": True}
    given = {**experts, "balance_loss": 0.01, "z_loss": 0.001}
    built = assemble(verify_jobs.job(tmp_path, f"1mb {dtype}", "llama", **given), SingleWorld())
    model, batch = built.model, built.batch(0)
    (stage,) = model.executor.modules.values()

    def run(forward):
        model.begin(batch)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ):
            y = forward()
        nodes, row = set(), [y.grad_fn]
        while row:
            nodes.add(type(row[-1]).__name__)
            row += [f for f, _ in row.pop().next_functions if f is not None]
        y.backward(retain_graph=True)
        y.backward()  # a graph that is retained comes back again
        logs = [b.log.total().counts for b in model.blocks[1:-1]]
        return [y, *logs, *(u.gradients.tensor.clone() for u in model.units)], nodes, sorted(saved)

    def pieces():
        flow = stage.flow(None, batch.microbatches[0])
        live = next(flow)
        try:
            while True:
                live = flow.send(live)
        except StopIteration as end:
            return end.value

    (one, nodes, kept), (apart, others, held) = (
        run(f) for f in (lambda: stage(None, batch.microbatches[0]), pieces)
    )
    assert "CombineBackward" in others and nodes < others | {"ResidualBackward"}
    assert "CombineBackward" not in nodes and kept == held
    assert all(torch.equal(a, b) for a, b in zip(one, apart, strict=True))


def test_without_a_graph_a_layer_lets_go_before_the_next_begins(tmp_path):
    built = assemble(verify_jobs.job(tmp_path, "1mb fp32", "llama"), SingleWorld())
    (stage,) = built.model.executor.modules.values()
    batch = built.batch(0)
    asked = []
    for block in built.model.blocks[1:-1]:
        block.segments = asked.append
    built.model.begin(batch)
    with torch.no_grad():
        stage(None, batch.microbatches[0])
    assert not asked


def test_links_that_are_kept_hold_no_batch_and_are_of_one_length(tmp_path):
    built = assemble(
        verify_jobs.job(tmp_path, "1mb fp32", "llama", sliding_window=4), SingleWorld()
    )
    (stage,) = built.model.executor.modules.values()
    batch = built.batch(0)
    built.model.begin(batch)
    held = weakref.ref(batch.microbatches[0])
    stage(None, batch.microbatches[0]).sum().backward()
    attention = built.model.blocks[1].attention
    assert len(attention._known) == 1
    del batch
    built.model.begin(built.batch(1))
    gc.collect()
    assert held() is None
    x, other = (
        torch.ones(1, 3, built.model.laid.request.model.hidden),
        built.batch(2).microbatches[0],
    )
    attention.links(x, other)
    assert list(attention._known) == [3]
