"""A model of four stages whose ends meet, for pipelines of plain modules: two skips, losses on three stages,
labels that travel, shapes of every microbatch its own."""

from __future__ import annotations

import torch
from torch import nn

from partita.parallel.pp.modules import PipelinedModules
from partita.parallel.pp.portals import Wire
from partita.schedule.ir import Schedule

WIDTH, M = 5, 4
STAGES = 4
WIRES = [
    *(Wire("x", s, s + 1) for s in range(STAGES - 1)),
    Wire("skip", 0, 3),
    Wire("skip", 0, 2),
    Wire("labels", 0, 3),
    Wire("unused", 1, 3),
    Wire("nothing", 1, 2),
]


class Stage(nn.Module):
    """One of four."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage = stage
        noise = torch.Generator().manual_seed(stage)
        weight = torch.randn(WIDTH, WIDTH, generator=noise, dtype=torch.float64) / 2
        self.weight = nn.Parameter(weight)

    def forward(self, batch, x=None, skip=None, labels=None, unused=None, nothing=None):
        x = batch["x"] if self.stage == 0 else x
        y = torch.tanh(x @ self.weight)
        if self.stage == 0:
            return {"x": y, "skip": y * 2, "labels": batch["labels"]}
        if self.stage == 1:
            loss = y.square().sum() / 7
            return {"x": y[:, ::2], "unused": y * 3, "nothing": y[:0], "loss": loss}
        if self.stage == 2:
            assert nothing.shape == (0, WIDTH)
            return {"x": torch.cat([y, skip]), "loss": skip.sum() / 3}
        return {"loss": ((y[: len(labels)] + skip).sum(1) * labels).sum()}


class Halved(Stage):
    """Stage 2 takes half the columns."""

    def forward(self, batch, x=None, **given):
        return super().forward(batch, nn.functional.pad(x, (0, 2)), **given)


def module(stage: int) -> Stage:
    return Halved(stage) if stage == 2 else Stage(stage)


def batches() -> list[dict[str, torch.Tensor]]:
    noise = torch.Generator().manual_seed(9)
    return [
        {
            "x": torch.randn(2 + m, WIDTH, generator=noise, dtype=torch.float64),
            "labels": torch.arange(2 + m),
        }
        for m in range(M)
    ]


def one_process() -> tuple[float, list[torch.Tensor]]:
    modules, total = [module(s) for s in range(STAGES)], 0.0
    for batch in batches():
        made: dict[tuple[str, int], torch.Tensor] = {}
        losses = []
        for s, stage in enumerate(modules):
            found = dict(stage(batch, **{w.name: made[str(w), s] for w in WIRES if w.target == s}))
            losses += [found.pop("loss")] if "loss" in found else []
            made |= {(str(w), w.target): found[w.name] for w in WIRES if w.source == s}
        loss = torch.stack(losses).sum()
        loss.backward()
        total += float(loss.detach())
    return total, [m.weight.grad for m in modules]


def run(world, made: Schedule):
    held = {s: module(s) for s in made.stages_of(world.rank)}
    pipe = PipelinedModules(held, WIRES, made, world)
    data = batches() * (made.num_microbatches // M)
    before = pipe.evaluate(data)
    loss = pipe.run(data)
    return before, loss, {s: m.weight.grad for s, m in held.items()}
