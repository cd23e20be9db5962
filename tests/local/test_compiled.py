"""A layer is one graph for torch.compile: equal numbers, equal gradients of weights, equal traffic."""

import pytest
import torch

import partita as pt
from partita.model.compiled import compiled
from partita.record.transfer import summarise

SIZES = {"layers": 1, "hidden": 64, "heads": 4, "ffn_hidden": 128, "vocab": 256, "max_seq_len": 64}


def both(context, job):
    """(output, input's gradient, units' gradients, traffic) of the eager and the compiled layer."""
    model, _, data = pt.build(job, context)
    block, batch = model.blocks[1], data.batch(0).microbatches[0]
    where, recorder, found = data.context.where, data.context.recorder, []
    for layer in (block.run, compiled(block, backend="aot_eager")):
        recorder.take()
        for unit in model.units:
            unit.gradient.zero_()
        generator = torch.Generator().manual_seed(context.rank)
        x = torch.randn(2, 16, 64, generator=generator, dtype=torch.float64).requires_grad_()
        where.phase = "F"
        y = layer(x, batch)
        where.phase = "B"
        y.square().sum().backward()
        sums = [u.gradient.clone() for u in model.units]
        found.append(([y.detach(), x.grad, *sums], summarise(recorder.take())))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "bloom"])
def test_a_tp_sp_layer_compiles(family):
    own = {"llama": {"kv_heads": 2, "sliding_window": 8}}
    job = pt.Job.load(
        {
            "plan": "tp2+sp fp64",
            "model": {"family": family, **SIZES, **own.get(family, {})},
            "cluster": {"preset": "laptop"},
            "data": {"source": "python-stdlib", "tokenizer": "byte"},
            "train": {"steps": 1, "global_batch_size": 2, "seq_len": 32},
        }
    )
    with pt.local(2) as ranks:
        for (eager, sent), (graph, sent_by_graph) in ranks.run(both, job):
            assert all(torch.equal(a, b) for a, b in zip(eager, graph, strict=True))
            assert sent == sent_by_graph
            assert len(sent) == 10  # five calls in each of two sub-blocks
