"""ZeRO's parameters: gathered before a block needs them, let go of after (Rajbhandari et al. 2020).

    stage 3, prefetch 1        F0      F1      F2   ...     B2      B1      B0
    lane dp            [g0][g1]    [g2]    [g3]         [g2][g1]    [g0]
    held                 0 1     1 2     2 3             2 1     1 0     0

At most 1 + prefetch blocks' weights are there at a time; with `data.prefetch=0` nothing travels under
compute, gradients neither: least memory. So it is for a block of which a gather, only started, would not
move while this rank computes (`Comm.moves`: shared memory beyond a chunk): it is gathered when it is needed.
`reshard_after_forward=false` gathers once a step, at the first use, and keeps them until the last backward
(FSDP's SHARD_GRAD_OP). Stages 1 and 2 store working weights whole: after the update each rank rounds its
shard and gathers the others'. What is gathered has the compute dtype: bf16 weights travel as bf16, their
gradients are summed in fp32. Stage 3 stores no bf16 shard beside its fp32 masters: a rank rounds its part
into the gathered unit, each time.

A shard that lies elsewhere is brought for its gather, and asked for a block ahead of that.

Sends all_gather of a unit's shard over the axes that cut it, site '<unit>:gather'.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from partita.comm.protocol import Handle, Where
from partita.parallel.backward_call import Passed
from partita.parallel.dp.replicate import Reducer, UnitComms
from partita.parallel.units import Shards, Unit


@dataclass(frozen=True)
class Needs:
    """The stage-3 units a block gathers, as its laid regions say: before F, again before B, or once a
    step."""

    forward: tuple[Unit, ...] = ()
    backward: tuple[Unit, ...] = ()
    once: tuple[Unit, ...] = ()


@dataclass
class Parameters:
    """A rank's units: whose whole values are there, and who uses them."""

    units: Sequence[Unit]
    comms: Mapping[str, UnitComms]
    where: Where
    away: Shards | None = None  # where the shards of stage 3 lie, if elsewhere than on the device
    _users: dict[str, int] = field(default_factory=dict)
    _whole: dict[str, Tensor] = field(default_factory=dict)

    def refresh(self, rounded: bool = False, units: Sequence[Unit] | None = None) -> None:
        """Masters have changed, all or those of `units`: rounds them into the working weights, unless they
        are `rounded` already, and gathers those stored whole."""
        started: list[Handle] = []
        with self.where.at("step"):
            for unit in self.units if units is None else units:
                start = time.perf_counter()
                if not rounded:
                    unit.round_working()
                if self.away is not None and unit.spec.stage == 3:
                    self.away.changed(unit)
                    if not (rounded or unit.spec.frozen):
                        self.away.sent(unit, start)
                if unit.spec.stage in (1, 2):
                    started.append(self._gather(unit, unit.working))
        for handle in started:
            handle.wait()

    def bring(self, units: Sequence[Unit]) -> list[tuple[Unit, Handle]]:
        """Starts to gather units for one user more."""
        found = []
        for unit in units:
            self._users[unit.name] = self._users.get(unit.name, 0) + 1
            if unit.name not in self._whole:
                made = unit.values  # whose device a shard that lies elsewhere is brought to
                self._whole[unit.name] = torch.empty(
                    made.size, dtype=made.dtype, device=made.device
                )
            found.append((unit, self._gather(unit, self._whole[unit.name])))
        return found

    def arrive(self, started: Sequence[tuple[Unit, Handle]]) -> None:
        """Their values can be used."""
        for unit, handle in started:
            handle.wait()
            if unit.values.tensor is None:
                unit.values.lend(self._whole[unit.name])

    def release(self, units: Sequence[Unit]) -> None:
        """One user less of each; the last one's memory is free."""
        for unit in units:
            self._users[unit.name] -= 1
            if not self._users[unit.name]:
                del self._users[unit.name], self._whole[unit.name]
                unit.values.take()

    def forget(self) -> None:
        """What was gathered is not right any more, and has no user."""
        for unit in self.units:
            if unit.name in self._users:
                del self._users[unit.name], self._whole[unit.name]
                unit.values.take()

    def move(self, units: Sequence[Unit]) -> bool:
        """Whether gathers of them, only started, move under compute."""
        comms = (self.comms[unit.name].shard for unit in units)
        sizes = (unit.values.size * unit.working.element_size() for unit in units)
        return all(c is None or c.moves(n // c.size) for c, n in zip(comms, sizes, strict=True))

    def has(self, unit: Unit) -> bool:
        """Whether anybody uses it."""
        return unit.name in self._users

    def _gather(self, unit: Unit, out: Tensor) -> Handle:
        comm = self.comms[unit.name].shard
        assert comm is not None
        away = self.away if unit.spec.stage == 3 else None
        mine = unit.handed_in(out) if away is None else away.bring(unit)
        return comm.start_all_gather(mine, site=f"{unit.name}:gather", out=out)

    def expect(self, units: Sequence[Unit]) -> None:
        """They will be brought soon."""
        if self.away is not None:
            self.away.expect(units)


@dataclass
class Gatherer:
    """Brings and lets go of a stage's parameters. `needs[i]` are those of its i-th block."""

    parameters: Parameters
    needs: Sequence[Needs]
    prefetch: int
    _under_way: dict[tuple[str, int], list[tuple[Unit, Handle]]] = field(default_factory=dict)

    @cached_property
    def gathers(self) -> bool:
        """Whether any block needs something."""
        return any(n.forward or n.backward or n.once for n in self.needs)

    def forward(self, at: int) -> None:
        """Block `at` is about to run: its weights are there, the next blocks' on their way."""
        if not self.gathers:
            return
        for i in range(at, min(at + 1 + self.prefetch, len(self.needs))):
            self._start("F", i, self.needs[i].forward, ahead=i != at)
            with self.parameters.where.at("step"):
                missing = [u for u in self.needs[i].once if not self.parameters.has(u)]
                self._start("step", i, missing, ahead=i != at)
        self._expect(at + 1 + self.prefetch, "F")
        self._arrive("F", at)
        self._arrive("step", at)

    def forward_done(self, at: int, backward_follows: bool) -> None:
        """Lets go of what its backward gathers again; without a backward, behind the last block, of all."""
        self.parameters.release(self.needs[at].forward)
        if not backward_follows and at == len(self.needs) - 1:
            self.parameters.release([u for n in self.needs for u in n.once])

    def backward(self, at: int) -> None:
        """Block `at`'s backward is about to run."""
        for i in range(at, max(at - 1 - self.prefetch, -1), -1):
            self._start("B", i, self.needs[i].backward, ahead=i != at)
        self._expect(at - 1 - self.prefetch, "B")
        self._arrive("B", at)

    def backward_done(self, at: int) -> None:
        """Its input's gradient is there."""
        self.parameters.release(self.needs[at].backward)

    def step_done(self, at: int) -> None:
        """The block's last backward of the step is over."""
        self.parameters.release(self.needs[at].once)

    def _start(self, phase: str, at: int, units: Sequence[Unit], ahead: bool) -> None:
        if not units or (phase, at) in self._under_way:
            return
        if not ahead or self.parameters.move(units):
            self._under_way[phase, at] = self.parameters.bring(units)

    def _expect(self, at: int, phase: str) -> None:
        """Block `at` is the next whose weights will be brought."""
        if 0 <= at < len(self.needs):
            needs = self.needs[at]
            self.parameters.expect(needs.forward if phase == "F" else needs.backward)

    def _arrive(self, phase: str, at: int) -> None:
        self.parameters.arrive(self._under_way.pop((phase, at), ()))


@dataclass(frozen=True)
class DataParallel:
    """What data parallelism does around the blocks of a stage: explicit calls in the block loop, and two
    identities where backward needs an entry."""

    names: tuple[str, ...]
    reducer: Reducer
    gatherer: Gatherer

    @cached_property
    def comes_and_goes(self) -> bool:
        """Whether a backward brings weights, or memory for their gradients."""
        gradients = any(map(self.reducer.comes_and_goes, self.gatherer.parameters.units))
        return gradients or any(needs.backward for needs in self.gatherer.needs)

    def before(self, at: int, x: Tensor | None) -> Tensor | None:
        """Block `at` is about to run on x."""
        if torch.is_grad_enabled() and self.reducer.reduces:
            entry = torch.empty(0, requires_grad=True) if x is None else x
            x = Passed.apply(entry, partial(self.backward_done, at))  # type: ignore[assignment]
        self.gatherer.forward(at)
        return x

    def after(self, at: int, x: Tensor) -> Tensor:
        """Block `at` has made x."""
        follows = torch.is_grad_enabled()
        self.gatherer.forward_done(at, follows)
        if follows and self.comes_and_goes:
            x = Passed.apply(x, partial(self.backward, at))  # type: ignore[assignment]
        return x

    def backward(self, at: int) -> None:
        """Its backward begins."""
        self.gatherer.backward(at)
        self.reducer.queue.add(self.reducer.block_begins, self.names[at])

    def backward_done(self, at: int) -> None:
        """Its backward is over; its weights' gradients are behind it in the queue."""
        self.gatherer.backward_done(at)
        self.reducer.queue.add(self._gradients_done, at)

    def _gradients_done(self, at: int) -> None:
        if self.reducer.block_done(self.names[at]):
            self.gatherer.step_done(at)
