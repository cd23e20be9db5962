"""Asynchronous pipelines (Narayanan et al. 2019, arXiv 1806.03377; 2020, 2006.09503): no flush between steps,
and the weight versions that this costs.

    stage 0   F0 F1 B0 U F2 B1 U | F3 B2 U F4 B3 U | ...      m = 2: a step ends with its last update
              v0 v0 v0   v1 v0     v2 v1   v3 v2              the version of the weights in use

A stage runs ahead into the next step's microbatches. Versions are counted in updates of the stage since the
pipeline was last empty. Masters are the newest one; a version that some microbatch will still use is stashed;
`working` holds whichever is in use. Evaluation, checkpoints and the end of training drain: the step runs
without the next one's microbatches, and counting starts anew.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from partita.parallel.pp.executor import Executor
from partita.parallel.units import Unit
from partita.schedule.ir import Action, Schedule
from partita.schedule.make.pipedream import lengthened
from partita.schedule.passes import with_communication


def version_rule(schedule: Schedule) -> Callable[[int, int], int]:
    """(microbatch since the last drain, newest version of the stage) -> the version it uses."""
    ahead, batch = schedule.num_ranks - 1, schedule.num_microbatches
    return {
        "newest": lambda k, newest: newest,
        "vertical": lambda k, newest: max(0, k - ahead),
        "previous": lambda k, newest: max(0, k // batch - 1),
    }[schedule.versions]


@dataclass
class Versions:
    """The weights of one rank's stage by version. `staleness` is how many updates lay between the
    weights of a gradient and those it was applied to: the largest since it was last set to 0."""

    units: Sequence[Unit]
    rule: Callable[[int, int], int]
    newest: int = 0
    staleness: int = 0
    stash: dict[int, list[Tensor]] = field(default_factory=dict)
    _used: dict[int, int] = field(default_factory=dict)
    _loaded: int = 0
    _seen: int = -1
    _spent: bool = False

    def forward(self, microbatch: int) -> None:
        """Puts the microbatch's version in place."""
        self._seen = microbatch
        self._used[microbatch] = self.rule(microbatch, self.newest)
        self._load(self._used[microbatch])

    def backward(self, microbatch: int) -> None:
        """Puts the version its forward used in place; the first after an update starts from zero."""
        if self._spent:
            for unit in self.units:
                unit.gradient.zero_()
            self._spent = False
        version = self._used.pop(microbatch)
        self.staleness = max(self.staleness, self.newest - version)
        self._load(version)

    def update(self, apply: Callable[[], None]) -> None:
        """Runs `apply`, which changes the masters; what is still needed of before is stashed."""
        self.stash[self.newest] = [
            unit.master.detach().to(unit.working.dtype, copy=True) for unit in self.units
        ]
        apply()
        self.newest += 1
        self._spent = True
        first = self.rule(self._seen + 1, self.newest)
        needed = {*self._used.values(), *range(first, self.newest)}
        self.stash = {v: held for v, held in self.stash.items() if v in needed}

    def restart(self) -> None:
        """The pipeline is empty: the newest version is in place, and is version 0."""
        assert not self._used, "a microbatch is under way"
        self._load(self.newest)
        self.stash.clear()
        self.newest = self._loaded = 0
        self._seen = -1

    def _load(self, version: int) -> None:
        if version == self._loaded:
            return
        held = self.stash.get(version)
        for i, unit in enumerate(self.units):
            unit.working.copy_(unit.master if held is None else held[i])
        self._loaded = version


@dataclass
class Flow:
    """Runs an asynchronous schedule step by step; `update(stage)` applies a stage's gradient.

    A stage's list repeats every step, a step's microbatches later, from the second step on; while the
    pipeline fills, in the first, a stage has more forwards. The last step before a drain leaves out
    what belongs to the next one.
    """

    executor: Executor
    versions: Versions
    steps: int = 0  # since the pipeline was last empty

    def __post_init__(self) -> None:
        schedule = self.executor.schedule
        self.per_step = sum(a.kind == "U" for a in schedule.ranks[self.executor.place])
        whole = with_communication(lengthened(schedule, 3))[self.executor.place]
        m = schedule.num_microbatches
        ends = [i + 1 for i, a in enumerate(whole) if a.kind == "U" and (a.microbatch + 1) % m == 0]
        self._first, self._next = whole[: ends[0]], whole[ends[0] : ends[1]]
        self.executor.weights = self.versions
        self.executor.seed = float(self.per_step)

    def run(self, batches: Sequence[Any], following: Sequence[Any]) -> Tensor:
        """One step; without `following` the pipeline is empty afterwards."""
        m = len(batches)
        first = self.steps * m
        numbered: Mapping[int, Any] = dict(enumerate([*batches, *following], first))
        end = first + m if not following else first + 2 * m
        actions = [a for a in self._list() if a.microbatch < end]
        loss = self.executor.run(numbered, actions, settle=not following)
        self.steps += 1
        if not following:
            self.versions.restart()
            self.steps = 0
        return loss

    def _list(self) -> list[Action]:
        shift = (self.steps - 1) * self.executor.schedule.num_microbatches
        if self.steps == 0:
            return list(self._first)
        return [a._replace(microbatch=a.microbatch + shift) for a in self._next]
