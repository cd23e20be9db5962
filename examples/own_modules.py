"""Modules of your own, cut by zero3 and laid on a pipeline: pp2 with dp_shard2, four ranks as threads.

    python examples/own_modules.py        # seconds

Each of two stages is a list of nn.Module blocks whose parameters two ranks share; a skip goes from the first
stage to the second beside its output. A process of its own trains the same modules; both losses are one.
"""

import torch
from torch import nn

import partita as pt
from partita.parallel.dp.modules import ShardedModules
from partita.parallel.draws import drawing
from partita.parallel.pp.modules import PipelinedModules
from partita.parallel.pp.portals import Wire

STAGES, MICROBATCHES, ROWS, WIDTH, STEPS = 2, 4, 8, 16, 20
WIRES = [Wire("x", 0, 1), Wire("skip", 0, 1)]


def blocks(stage):
    """The same numbers on every rank: inside `drawing` nothing else is drawn from."""
    with drawing(0, "weights", stage):
        made = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(3)]
    return [block.double() for block in made]


def data(step):
    """Microbatches of (rows, what they should become)."""
    noise = torch.Generator().manual_seed(step)
    x = torch.randn(MICROBATCHES, ROWS, WIDTH, generator=noise, dtype=torch.float64)
    return [(rows, rows.roll(1, -1).tanh()) for rows in x]


def first(run):
    """Stage 0: what it returns goes down the wires of these names."""
    return lambda batch: {"x": run(batch[0]), "skip": batch[0]}


def last(run):
    """Stage 1, with the loss: a share of the mean over the whole step."""

    def call(batch, x, skip):
        each = (run(x) + skip / 2 - batch[1]).square().mean(-1)
        return {"loss": each.sum() / (MICROBATCHES * ROWS)}

    return call


def train(context):
    """On every rank. Its samples are half of each microbatch: shards' gradients are summed over both."""
    schedule = pt.schedule("1f1b", num_ranks=2, num_microbatches=MICROBATCHES)
    (stage,) = schedule.stages_of(context.coords["pp"])
    sharded = ShardedModules(blocks(stage), context)
    module = (first if stage == 0 else last)(sharded)
    pipe = PipelinedModules({stage: module}, WIRES, schedule, context)
    optimizer = torch.optim.Adam(sharded.parameters(), lr=1e-2)
    half, losses = context.coords["dp_shard"], []
    for step in range(STEPS):
        batches = [tuple(part.chunk(2)[half] for part in batch) for batch in data(step)]
        loss = torch.tensor([pipe.run(batches)], dtype=torch.float64)  # of this pipeline's samples
        sharded.finish()
        losses.append(float(context.comm("dp_shard").all_reduce(loss, site="step.loss:sum")))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def alone():
    """One process."""
    stages = [nn.Sequential(*blocks(stage)) for stage in range(STAGES)]
    optimizer = torch.optim.Adam(nn.ModuleList(stages).parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS):
        total = 0.0
        for batch in data(step):
            loss = last(stages[1])(batch, **first(stages[0])(batch))["loss"]
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


if __name__ == "__main__":
    with pt.local(4, "pp2 dp_shard2.zero3") as ranks:
        found = ranks.run(train)
    want = alone()
    print(f"loss {found[0][0]:.4f} to {found[0][-1]:.4f} on four ranks, {want[-1]:.4f} on one")
    assert want[-1] < want[0]
    for losses in found:
        assert all(abs(a - b) <= 1e-9 for a, b in zip(losses, want, strict=True))
