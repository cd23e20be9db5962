"""Pipelines of modules of your own, under any schedule that flushes: any number of tensors between any two
stages, losses on any of them.

    wires = [Wire("x", 0, 1), Wire("x", 1, 2), Wire("skip", 0, 2), Wire("labels", 0, 2)]
    pipe = PipelinedModules({stage: module}, wires, schedule, context)
    loss = pipe.run(microbatches); optimizer.step(); optimizer.zero_grad()

A stage's module is called with the microbatch and its wires by name, and returns a dict of what its own wires
carry, and its 'loss' where it has one. The step's loss is the sum of all of them. What a module draws
(dropout) is drawn from the seed, its stage, the step and the microbatch (draws.py), so no two draw alike, and
all draw the same again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from partita.base.errors import UsageError
from partita.comm.context import Context, Named, group_ranks
from partita.comm.protocol import Comm, Where, World
from partita.parallel.equal_start import hold_alike
from partita.parallel.pp.executor import Channel, Executor, StageModule
from partita.parallel.pp.portals import ROW, Portal, Wire, wire_problems
from partita.parallel.pp.rules import lane
from partita.parallel.pp.stages import Stage, WiredStage, hold_kinds, unlike_signatures
from partita.schedule.check import check
from partita.schedule.ir import Schedule
from partita.schedule.passes import forward_only


class PipelinedModules:
    """The stages of one rank. Communicates over axis pp, a microbatch: a token (88 bytes a wire) between
    neighbouring stages and what wires carry (portals.py), down and up. A step: the loss (16 bytes);
    where microbatches go both ways (dualpipe, chimera) the gradients of each stage's two copies, added up,
    and once, when it is built, digests of their parameters (16 bytes a stage).

    Gradients add up in the parameters' `grad`, all of them in B or I: W has nothing left to do for a module
    whose weights do not wait in a queue (deferred.py). `world` may be the Context that everything else takes:
    its pipelines are then those of the plan's pp. `groups` are the ranks of every pipeline, else all ranks
    are one. `step` is the number of runs, which what is drawn depends on: a run that is resumed sets it.
    Raises UsageError with every wrong wire, a stage without its module or one that cannot be called with its
    wires, copies of a stage that begin unlike, or a schedule that cannot run or updates under way.
    """

    def __init__(
        self,
        modules: Mapping[int, Stage],
        wires: Sequence[Wire],
        schedule: Schedule,
        world: World | Context,
        *,
        groups: Sequence[Sequence[int]] = (),
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        hold_kinds(modules, wires, schedule)
        self.modules, self.wires, self.schedule, self.where = modules, wires, schedule, Where()
        if isinstance(world, Context):
            if not groups and schedule.num_ranks == world.mesh.sizes["pp"]:
                groups = group_ranks(world.mesh, ("pp",), Named())
            self.where, world = world.where, world.world
        groups = groups or [range(world.size)]
        self.rank, self.seed, self.step = world.rank, seed, 0
        self._check(groups, world.rank)
        self.device, self._world, self._groups = torch.device(device), world, groups
        at = next(i for i, g in enumerate(groups) if world.rank in g)
        self._ranks = tuple(groups[at])
        self._of_group: tuple[object, ...] = ("pipeline", at)
        self.place = self._of_group  # what is drawn depends on, beside stage and microbatch
        place = self._ranks.index(world.rank)
        self._sums = self._make("loss")
        self._copies = self._pairs(place)
        for comm, stage in self._copies:
            named = [(f"stage {stage}: {n}", p) for n, p in _parameters(modules[stage])]
            hold_alike(comm, named, f"{stage}.parameters:copies")
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
        self.token = torch.zeros(len(wires), ROW, dtype=torch.float64, device=self.device)
        self._trained, self._tried = self._executors(place)

    def _executors(self, place: int) -> tuple[Executor, Executor]:
        """Of the schedule, and of its forwards."""
        schedule, every = self.schedule, tuple(self.portals.values())
        stages: dict[int, StageModule] = {
            s: WiredStage(self, self.modules[s], (s, schedule.num_stages), every)
            for s in schedule.stages_of(place)
        }
        channels = {
            (what, stage): Channel(
                self._make(f"{lane(what, stage, schedule)}.{stage}"), f"{stage + away}:send"
            )
            for what, away in (("F", -1), ("B", 1))
            for stage in range(schedule.num_stages)
        }
        like = lambda *_: torch.empty_like(self.token)  # noqa: E731
        trained = Executor(stages, schedule, place, channels, self.where, like)
        return trained, Executor(stages, forward_only(schedule), place, channels, self.where, like)

    def run(self, microbatches: Sequence[Any]) -> float:
        """Forward and backward of all; the sum of all losses, on every rank."""
        if self.schedule.is_forward_only:
            raise UsageError(f"{self.schedule.name} has no backward: evaluate, or take another one")
        self.place = (*self._of_group, "step", self.step)
        before: list[Tensor | None] = []
        for _, _, p in self._copied():  # added up already
            before.append(p.grad)
            p.grad = None
        loss, losses = self._play(self._trained, microbatches)
        for (comm, site, p), had in zip(self._copied(), before, strict=True):
            p.grad = comm.all_reduce(torch.zeros_like(p) if p.grad is None else p.grad, site=site)
            p.grad = p.grad if had is None else had.add_(p.grad)
        if not losses:
            raise UsageError(
                "no stage returned a 'loss', so nothing went backward: one returns it beside its wires"
            )
        self.step += 1
        return loss

    def evaluate(self, microbatches: Sequence[Any]) -> float:
        """Forward only; the sum of all losses, on every rank."""
        self.place = (*self._of_group, "evaluation", self.step)
        with torch.no_grad():
            return self._play(self._tried, microbatches)[0]

    def _copied(self) -> Iterator[tuple[Comm, str, nn.Parameter]]:
        """The parameters that another rank holds too, and who adds up their gradients."""
        for comm, stage in self._copies:
            for name, p in _parameters(self.modules[stage]):
                if p.requires_grad:
                    yield comm, f"{stage}.{name}:copies", p

    def _play(self, executor: Executor, microbatches: Sequence[Any]) -> tuple[float, int]:
        """The sum of all losses, and how many there are."""
        if len(microbatches) != self.schedule.num_microbatches:
            raise UsageError(
                f"{len(microbatches)} microbatches for a schedule of {self.schedule.num_microbatches}"
            )
        executor.run(microbatches)
        for portal in self.portals.values():
            portal.settle()
        total = torch.tensor([0.0, len(self._losses)], dtype=torch.float64)
        for loss in self._losses:
            total[0] += loss.cpu()
        self._losses.clear()
        self.where.phase = "step"
        loss, count = self._sums.all_reduce(total, site="step.loss:reduce_from").tolist()
        return loss, round(count)

    @property
    def microbatch(self) -> int:
        """The one under way."""
        return self.where.microbatch

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
            found += unlike_signatures(self.modules, self.wires)
        found += [f"{schedule.name}: {problem.message}" for problem in check(schedule)]
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


def _parameters(module: Any) -> list[tuple[str, nn.Parameter]]:
    return list(module.named_parameters()) if isinstance(module, nn.Module) else []
