"""Four ranks as threads of one process, as in a notebook: look at a collective, then train under a plan."""

import torch

import partita as pt

# %% A collective among four ranks


def meet(context, scale):
    mine = torch.tensor([scale * context.rank])
    return context.comm("world").all_reduce(mine, site="notebook")


with pt.local(4) as ranks:
    sums = ranks.run(meet, 10)
print(sums)
assert all(int(x) == 10 * (0 + 1 + 2 + 3) for x in sums)

# %% Two steps of a plan over the same four ranks, and on one device

table = {
    "name": "notebook",
    "model": {"preset": "tiny"},
    "cluster": {"preset": "laptop"},
    "data": {"source": "python-stdlib", "tokenizer": "byte"},
    "train": {"steps": 2, "global_batch_size": 4, "seq_len": 32},
}


def train(context, job):
    model, optimizer, data = pt.build(job, context)
    return [(model.forward_backward(batch), optimizer.step()) for batch in data]


with pt.local(4) as ranks:
    cut = ranks.run(train, pt.Job.load(table, "plan=pp2:1f1b/2mb tp2+sp fp64"))
with pt.local(1) as ranks:
    whole = ranks.run(train, pt.Job.load(table, "plan=fp64"))[0]
assert all(rank == cut[0] for rank in cut)
for (loss, norm), (loss_1, norm_1) in zip(cut[0], whole, strict=True):
    print(f"loss {loss:.12f}  norm {norm:.12f}  one device: {loss_1:.12f}  {norm_1:.12f}")
    assert abs(loss - loss_1) < 1e-11 * loss_1
    assert abs(norm - norm_1) < 1e-11 * norm_1
