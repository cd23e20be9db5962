"""A training loop of your own, on every rank; the plan's schedule runs inside.

torchrun --standalone --nproc-per-node 2 examples/own_loop.py
"""

import partita as pt

job = pt.Job.load(
    {
        "name": "own-loop",
        "plan": "tp2+sp 2mb",
        "model": {"preset": "tiny"},
        "cluster": {"preset": "laptop"},
        "data": {"source": "python-stdlib", "tokenizer": "byte"},
        "train": {"steps": 4, "global_batch_size": 4, "seq_len": 32, "lr": 1e-2},
    }
)

model, optimizer, data = pt.build(job)  # this rank's share of the model
losses = []
for batch in data:
    loss = model.forward_backward(batch)  # the global token mean, the same on every rank
    norm = optimizer.step()
    losses.append(loss)
    if data.context.rank == 0:
        print(f"step {len(losses)}  loss {loss:.4f}  norm {norm:.4f}")
assert losses[-1] < losses[0]
