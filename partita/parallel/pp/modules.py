"""Pipelines of modules of your own, under any schedule that flushes: any number of tensors between any two
stages, losses on any of them.

    wires = [Wire("x", 0, 1), Wire("x", 1, 2), Wire("skip", 0, 2), Wire("labels", 0, 2)]
    pipe = PipelinedModules({stage: module}, wires, schedule, world)
    loss = pipe.run(microbatches); optimizer.step(); optimizer.zero_grad()

A stage's module is called with the microbatch and its wires by name, and returns a dict of what its own wires
carry, and its 'loss' where it has one. The step's loss is the sum of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from partita.base.errors import UsageError
from partita.comm.protocol import Comm, Where, World
from partita.parallel.pp.executor import Channel, Executor, StageModule
from partita.parallel.pp.portals import ROW, Adds, Portal, Wire, wire_problems
from partita.parallel.pp.rules import lane
from partita.schedule.ir import Schedule
from partita.schedule.passes import forward_only

Stage = Callable[..., Mapping[str, Tensor]]


class PipelinedModules:
    """The stages of one rank. Communicates over axis pp, a microbatch: a token (88 bytes a wire) between
    neighbouring stages and what wires carry (portals.py), down and up. A step: the loss (8 bytes);
    where microbatches go both ways (dualpipe, chimera) the gradients of each stage's two copies, added up.

    Gradients add up in the parameters' `grad`, all of them in B or I: W has nothing left to do for a module
    whose weights do not wait in a queue (deferred.py). `groups` are the ranks of every pipeline of the world,
    of all ranks if not given. Raises UsageError with every wrong wire, a stage without its module, or a
    schedule that updates under way.
    """

    def __init__(
        self,
        modules: Mapping[int, Stage],
        wires: Sequence[Wire],
        schedule: Schedule,
        world: World,
        *,
        groups: Sequence[Sequence[int]] = (),
        device: torch.device | str = "cpu",
    ) -> None:
        self.modules, self.wires, self.schedule, self.where = modules, wires, schedule, Where()
        groups = groups or [range(world.size)]
        self._check(groups, world.rank)
        self.device, self._world, self._groups = torch.device(device), world, groups
        self._ranks = next(tuple(g) for g in groups if world.rank in g)
        place = self._ranks.index(world.rank)
        self._sums = self._make("loss")
        self._copies = self._pairs(place)
        self.portals = {
            wire: Portal(
                i,
                wire,
                schedule,
                self._make(f"wire.{i}.down"),
                self._make(f"wire.{i}.up"),
                self.device,
            )
            for i, wire in enumerate(wires)
        }
        self._losses: list[Tensor] = []
        stages: dict[int, StageModule] = {s: _Stage(self, s) for s in schedule.stages_of(place)}
        channels = {
            (what, stage): Channel(
                self._make(f"{lane(what, stage, schedule)}.{stage}"), f"{stage + away}:send"
            )
            for what, away in (("F", -1), ("B", 1))
            for stage in range(schedule.num_stages)
        }
        self.token = torch.zeros(len(wires), ROW, dtype=torch.float64, device=self.device)
        trained, tried = (
            Executor(
                stages, how, place, channels, self.where, lambda *_: torch.empty_like(self.token)
            )
            for how in (schedule, forward_only(schedule))
        )
        self._trained, self._tried = trained, tried

    def run(self, microbatches: Sequence[Any]) -> float:
        """Forward and backward of all; the sum of all losses, on every rank."""
        if self.schedule.is_forward_only:
            raise UsageError(f"{self.schedule.name} has no backward: evaluate, or take another one")
        loss = self._play(self._trained, microbatches)
        for comm, stage in self._copies:
            for name, p in _parameters(self.modules[stage]):
                site = f"{stage}.{name}:copies"
                p.grad = comm.all_reduce(
                    torch.zeros_like(p) if p.grad is None else p.grad, site=site
                )
        return loss

    def evaluate(self, microbatches: Sequence[Any]) -> float:
        """Forward only; the sum of all losses, on every rank."""
        with torch.no_grad():
            return self._play(self._tried, microbatches)

    def _play(self, executor: Executor, microbatches: Sequence[Any]) -> float:
        if len(microbatches) != self.schedule.num_microbatches:
            raise UsageError(
                f"{len(microbatches)} microbatches for a schedule of {self.schedule.num_microbatches}"
            )
        executor.run(microbatches)
        for portal in self.portals.values():
            portal.settle()
        total = torch.zeros(1, dtype=torch.float64)
        for loss in self._losses:
            total += loss.cpu()
        self._losses.clear()
        self.where.phase = "step"
        return float(self._sums.all_reduce(total, site="step.loss:reduce_from"))

    def add(self, loss: Tensor) -> None:
        """A stage's loss of one microbatch joins the step's."""
        self._losses.append(loss.detach().to(torch.float64))

    def _check(self, groups: Sequence[Sequence[int]], rank: int) -> None:
        schedule = self.schedule
        found = wire_problems(self.wires, schedule.num_stages)
        if schedule.is_asynchronous:
            found.append(
                f"{schedule.name} updates under way; modules of your own take one that flushes"
            )
        found += [
            f"a pipeline of {len(g)} ranks ({', '.join(map(str, g))}); the schedule has {schedule.num_ranks}"
            for g in groups
            if len(g) != schedule.num_ranks
        ]
        mine = [tuple(g).index(rank) for g in groups if rank in g]
        if len(mine) != 1:
            found.append(f"rank {rank} is in {len(mine)} of the groups; each is in one")
        else:
            missing = [
                s for s in schedule.stages_of(mine[0] % schedule.num_ranks) if s not in self.modules
            ]
            found += [f"rank {rank} holds stage {s} and has no module for it" for s in missing]
        if found:
            raise UsageError("this pipeline cannot be built:" + "".join(f"\n  {f}" for f in found))

    def _make(self, lane: str, places: Sequence[int] = (), axis: str = "pp") -> Comm:
        """All ranks make those of every pipeline, in one order; this rank's."""
        found: Comm | None = None
        for group in self._groups:
            ranks = [group[p] for p in places] if places else list(group)
            found = self._world.make(ranks, axis=axis, lane=lane) or found
        assert found is not None or places
        return found  # type: ignore[return-value]

    def _pairs(self, place: int) -> list[tuple[Comm, int]]:
        """The Comm of each stage of this rank whose other copy lies elsewhere."""
        found = []
        for stage in range(self.schedule.num_stages):
            places = self.schedule.ranks_of(stage)
            if len(places) > 1:
                comm = self._make(f"copies.{stage}", sorted(places), "pp/copy")
                found += [(comm, stage)] if place in places else []
        return found


class _Stage:
    """What the executor calls: wires in, the module, wires out."""

    def __init__(self, pipe: PipelinedModules, stage: int) -> None:
        self.pipe, self.stage, self.module = pipe, stage, pipe.modules[stage]
        self.last = stage == pipe.schedule.num_stages - 1
        self.takes = [p for w, p in pipe.portals.items() if w.target == stage]
        self.gives = [p for w, p in pipe.portals.items() if w.source == stage]

    def __call__(self, x: Tensor | None, batch: Any) -> Tensor:
        """The token behind all that the stage does; of the last stage a number that backward starts from."""
        microbatch = self.pipe.where.microbatch
        token = self.pipe.token.clone().requires_grad_(torch.is_grad_enabled()) if x is None else x
        given: dict[str, Tensor] = {}
        for portal in self.takes:
            token, given[portal.wire.name] = portal.receive(token, microbatch)
        made = dict(self.module(batch, **given))
        loss = made.pop("loss", None)
        wanted = {p.wire.name for p in self.gives}
        if made.keys() != wanted:
            raise UsageError(
                f"stage {self.stage} returned {_names(made)}; its wires carry {_names(wanted)}, and a "
                "'loss' may stand beside them"
            )
        for portal in self.gives:
            token = portal.send(token, made[portal.wire.name], microbatch)
        if loss is not None:
            if loss.numel() != 1:
                raise UsageError(
                    f"the loss of stage {self.stage} is {list(loss.shape)}; one number"
                )
            self.pipe.add(loss.reshape(()))
            token = Adds.apply(token, loss)  # type: ignore[assignment]
        return token.sum() if self.last else token


def _names(of: Any) -> str:
    return ", ".join(sorted(of)) or "nothing"


def _parameters(module: Any) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters()) if isinstance(module, nn.Module) else []
