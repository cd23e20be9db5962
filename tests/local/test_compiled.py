"""A layer is one graph for torch.compile: equal numbers, equal gradients of weights, equal traffic."""

import pytest
import torch
from turns import in_turn

import partita as pt
from partita.model.compiled import compiled
from partita.record.transfer import summarise

SIZES = {"layers": 1, "hidden": 64, "heads": 4, "ffn_hidden": 128, "vocab": 256, "max_seq_len": 64}


def both(context, job):
    """(output, input's gradient, units' gradients, traffic) of the eager and the compiled layer."""
    model, _, data = pt.build(job, context)
    block = model.blocks[1]
    batch, other = (data.batch(i).microbatches[0] for i in (1, 0))
    where, recorder, found = data.context.where, data.context.recorder, []
    units = [u for u in model.units if not u.spec.frozen]
    for unit in units:  # B of an adapter is 0 at first
        unit.working.add_(0.01)
    for layer in (block.run, compiled(block, backend="aot_eager")):
        where.phase = "F"
        layer(torch.zeros(2, 16, 64, dtype=torch.float64), other)  # another pass's masks
        recorder.take()
        for unit in units:
            unit.gradient.zero_()
        generator = torch.Generator().manual_seed(context.rank)
        x = torch.randn(2, 16, 64, generator=generator, dtype=torch.float64).requires_grad_()
        y = layer(x, batch)
        sent = recorder.take()
        layer(x.detach(), other)
        recorder.take()
        where.phase = "B"
        y.square().sum().backward()
        sums = [u.gradient.clone() for u in units]
        found.append(([y.detach(), x.grad, *sums], summarise([*sent, *recorder.take()])))
    return found


# Side by side: attention's and mlp's sums are moved once, there and back; frozen q k v gather nothing again
CALLS = {"gpt_neox": 8, "gpt2": 9}
CASES = [("tp2+sp", f) for f in ("llama", "gpt2", "gpt_neox", "bloom")]


@pytest.mark.parametrize(("axes", "family"), in_turn([*CASES, ("", "gpt_neox")], 3))
def test_a_layer_compiles(axes, family):
    own = {
        "llama": {"kv_heads": 2, "sliding_window": 8}, "gpt_neox": {"parallel_residual": True},
        "gpt2": {"lora_rank": 2, "lora_targets": ["wo", "fc1", "fc2"], "lora_dropout": 0.3},
    }  # fmt: skip
    job = pt.Job.load(
        {
            "plan": f"{axes} fp64",
            "model": {"family": family, **SIZES, **own.get(family, {})},
            "cluster": {"preset": "laptop"},
            "data": {"source": "python-stdlib", "tokenizer": "byte"},
            "train": {"steps": 2, "global_batch_size": 2, "micro_batch_size": 2, "seq_len": 32},
        }
    )
    torch._dynamo.reset()  # families share the code, and what is compiled of it is counted
    with pt.local(2 if axes else 1) as ranks:
        for (eager, sent), (graph, sent_by_graph) in ranks.run(both, job):
            assert all(torch.equal(a, b) for a, b in zip(eager, graph, strict=True))
            assert sent == sent_by_graph
            assert len(sent) == (
                CALLS.get(family, 10) if axes else 0
            )  # five calls in each of two sub-blocks
