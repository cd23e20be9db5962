"""Asynchronous pipelines (Narayanan et al. 2019, arXiv 1806.03377; 2020, 2006.09503): no flush between steps,
and the weight versions that this costs.

    stage 0   F0 F1 B0 U F2 B1 U | F3 B2 U F4 B3 U | ...      m = 2: a step ends with its last update
              v0 v0 v0   v1 v0     v2 v1   v3 v2              the version of the weights in use

A stage runs ahead into the next step's microbatches. Versions are counted in updates of the stage since the
pipeline was last empty. Masters are the newest one; a version that some microbatch will still use is stashed;
`working` holds whichever is in use. Evaluation, checkpoints and the end of training drain: the step runs
without the next one's microbatches, and counting starts anew.

ZeRO 1 updates shards, and gathers the newest version at once: what the stage then works on is stashed too.
Weights without masters (stochastic rounding) are updated where they are used: the newest version is put in
place for it.

A file whose U stand before the last backward (`stated`) ends its step empty: F uses what the U before it in
the list have made, and counting starts anew in every step.

A tied table lies on the first stage and the last one, and takes the sum of both gradients of the same
microbatches. The first stage's comes p - 1 stages of backward later, so both use the version that stage 0
has (`vertical`), and the last stage updates its copy later (`Late`), at the latest when the step ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from partita.parallel.pp.executor import Executor
from partita.parallel.units import Unit
from partita.schedule.ir import Action, Schedule
from partita.schedule.make.pipedream import lengthened
from partita.schedule.passes import with_communication


def version_rule(schedule: Schedule, tied: bool = False) -> Callable[[int, int], int]:
    """(microbatch since the last drain, newest version of the stage) -> the version it uses; `tied`: of a
    table that two stages hold."""
    ahead, batch = schedule.num_ranks - 1, schedule.num_microbatches
    name = "vertical" if tied and schedule.versions == "newest" else schedule.versions
    return {
        "newest": lambda k, newest: newest,
        "stated": lambda k, newest: newest,
        "vertical": lambda k, newest: max(0, k - ahead),
        "previous": lambda k, newest: max(0, k // batch - 1),
    }[name]


def updates_behind(schedule: Schedule) -> int:
    """Updates that the last stage's copy of a tied table waits for the first stage, so that neither stands:
    with F = 1, B = 2 the first stage ends B of a microbatch when the last one is 2(p-1)/3 further on."""
    return 0 if schedule.versions == "previous" else 2 * (schedule.num_ranks - 1) // 3


@dataclass
class Versions:
    """Weights of one rank's stage by version. `staleness` is how many updates lay between the weights of a
    gradient and those it was applied to: the largest since it was last set to 0. `refresh` brings the newest
    version into the working weights, where ranks hold shards of the masters. `away`: masters lie elsewhere,
    and an update has brought the newest version when it is over. `alone`: there are no masters, and an
    update is of the working weights. `renew`: gradients start anew. `changed` is called when a version has
    been stashed, and when an update is over (a recorder)."""

    units: Sequence[Unit]
    rule: Callable[[int, int], int]
    refresh: Callable[..., None] | None = None
    away: bool = False
    alone: bool = False
    renew: Callable[[Sequence[Unit]], None] = lambda units: None
    changed: Callable[[], None] = lambda: None
    newest: int = 0
    staleness: int = 0
    added: int = 0  # microbatches whose gradients are there since the last update
    stash: dict[int, list[Tensor]] = field(default_factory=dict)
    _used: dict[int, int] = field(default_factory=dict)
    _taken_at: dict[int, int] = field(default_factory=dict)  # of gradients that are still to come
    _loaded: int = 0
    _seen: int = -1
    _spent: bool = False

    def __post_init__(self) -> None:
        if all(unit.spec.stage == 0 for unit in self.units) and not self.away:
            self.refresh = None

    @property
    def in_place(self) -> bool:
        """Whether the newest version is to be found in the working weights alone."""
        return self.refresh is not None or self.alone

    def forward(self, microbatch: int) -> None:
        """Puts the microbatch's version in place."""
        self._seen = microbatch
        self._used[microbatch] = self.rule(microbatch, self.newest)
        self._load(self._used[microbatch])

    def backward(self, microbatch: int) -> None:
        """Puts the version its forward used in place."""
        self._taken_at[microbatch] = version = self._used.pop(microbatch)
        self._load(version)

    def adds(self, microbatch: int) -> None:
        """Its gradient comes: the first after an update starts from zero."""
        if self._spent:
            self.renew(self.units)
            self._spent, self.added = False, 0
        self.added += 1
        self.staleness = max(self.staleness, self.newest - self._taken_at.pop(microbatch))

    def spend(self, taken: Callable[[Unit], Tensor]) -> list[Tensor]:
        """Gradients since the last update, `taken`: the next backward starts from zero."""
        self._spent = True
        return [taken(unit) for unit in self.units]

    def update(self, apply: Callable[[], None]) -> None:
        """Runs `apply`, which changes the masters; what is still needed of before is stashed."""
        if self.alone:
            self._load(self.newest)
        first = self.rule(self._seen + 1, self.newest + 1)
        needed = {*self._used.values(), *range(first, self.newest + 1)}
        self.stash = {v: held for v, held in self.stash.items() if v in needed}
        if self.newest in needed:
            self._keep_newest()
        apply()
        self.newest += 1
        self._spent = True
        if self.refresh is not None:
            self.refresh(rounded=self.away, units=self.units)
        if self.in_place:
            self._loaded = self.newest
        self.changed()

    def restart(self) -> None:
        """The pipeline is empty: the newest version is in place, and is version 0."""
        assert not self._used, "a microbatch is under way"
        self._load(self.newest)
        self.stash.clear()
        self.newest = self._loaded = 0
        self._seen = -1

    def _keep_newest(self) -> None:
        """Stashes the newest version: of the masters, or, where these are shards, lie elsewhere or are none,
        of the working weights."""
        if self.newest not in self.stash:
            self.stash[self.newest] = [
                (u.working if self.in_place else u.master).detach().to(u.working.dtype, copy=True)
                for u in self.units
            ]
            self.changed()

    def _load(self, version: int) -> None:
        if version == self._loaded:
            return
        if self.in_place and self._loaded == self.newest:
            self._keep_newest()
        held = self.stash.get(version)
        for i, unit in enumerate(self.units):
            unit.working.copy_(unit.master if held is None else held[i])
        self._loaded = version


@dataclass
class Late:
    """The last stage's copy of a tied table: `join` adds up its gradient, as `taken`, with the first stage's
    and applies the sum, `behind` updates after its own."""

    versions: Versions
    behind: int
    taken: Callable[[Unit], Tensor]
    join: Callable[[Versions, Sequence[Tensor]], None] = lambda versions, spent: None
    _waiting: deque[list[Tensor]] = field(default_factory=deque)

    def update(self) -> None:
        """The stage's U: this gradient waits, one that has waited long enough is joined."""
        self._waiting.append(self.versions.spend(self.taken))
        while len(self._waiting) > self.behind:
            self._join()

    def settle(self) -> None:
        """The step ends: nothing waits."""
        while self._waiting:
            self._join()

    def _join(self) -> None:
        spent = self._waiting.popleft()
        self.versions.update(lambda: self.join(self.versions, spent))


@dataclass
class Flow:
    """Runs an asynchronous schedule step by step, on stages whose weights have versions (`own`, by stage),
    and on the last one those of a tied table (`late`).

    A stage's list repeats every step, a step's microbatches later, from the second step on; while the
    pipeline fills, in the first, a stage has more forwards. The last step before a drain leaves out
    what belongs to the next one. Where the schedule does not run ahead every step drains.
    """

    executor: Executor
    own: Mapping[int, Versions]
    late: Late | None = None
    steps: int = 0  # since the pipeline was last empty

    def __post_init__(self) -> None:
        schedule, place = self.executor.schedule, self.executor.place
        updated = [a.stage for a in schedule.ranks[place] if a.kind == "U"]
        self.per_step = updated.count(updated[0])  # of each stage as many
        self.runs_ahead = schedule.runs_ahead
        self._first = self._next = tuple(self.executor.actions)
        if self.runs_ahead:
            self._first, self._next = _steps_of(schedule, place)
        self.executor.weights = self
        self.executor.seed = float(self.per_step)

    @property
    def versions(self) -> Versions:
        """Of the weights of its first stage."""
        return next(iter(self.own.values()))

    @property
    def staleness(self) -> int:
        """The largest of its stages' so far."""
        return max(versions.staleness for versions in self.own.values())

    @property
    def first(self) -> int:
        """The number of the next step's first microbatch since the pipeline was last empty."""
        return self.steps * self.executor.schedule.num_microbatches

    def number(self, versions: Versions) -> int:
        """Which update of the step under way is the next of a stage's weights, from 0."""
        return versions.newest - self.steps * self.per_step

    def share(self, versions: Versions) -> float:
        """Microbatches in an update that is about to be, each as often as updates a step, over the step's."""
        return versions.added * self.per_step / self.executor.schedule.num_microbatches

    @property
    def each(self) -> list[Versions]:
        """Of its stages' own weights, and of a tied table's copy."""
        return [*self.own.values()] + ([] if self.late is None else [self.late.versions])

    def forward(self, stage: int, microbatch: int) -> None:
        """Puts the versions in place that the microbatch uses."""
        for versions in self._at(stage):
            versions.forward(microbatch)

    def backward(self, stage: int, microbatch: int) -> None:
        """Puts the versions in place that its forward used."""
        for versions in self._at(stage):
            versions.backward(microbatch)

    def adds(self, stage: int, microbatch: int) -> None:
        """Its gradients are about to come."""
        for versions in self._at(stage):
            versions.adds(microbatch)

    def _at(self, stage: int) -> list[Versions]:
        return [self.own[stage]] + ([] if self.late is None else [self.late.versions])

    def run(self, batches: Sequence[Any], following: Sequence[Any]) -> Tensor:
        """One step; without `following` the pipeline is empty afterwards, and always where it does not run
        ahead."""
        m, first = len(batches), self.first
        numbered: Mapping[int, Any] = dict(enumerate([*batches, *following], first))
        end = first + m if not following else first + 2 * m
        actions = [a for a in self._list() if a.microbatch < end]
        loss = self.executor.run(numbered, actions, settle=not following)
        if self.late is not None:
            self.late.settle()
        self.steps += 1
        if not following:
            for versions in self.each:
                versions.restart()
            self.steps = 0
        return loss

    def _list(self) -> list[Action]:
        shift = (self.steps - 1) * self.executor.schedule.num_microbatches
        if self.steps == 0:
            return list(self._first)
        return [a._replace(microbatch=a.microbatch + shift) for a in self._next]


def _steps_of(schedule: Schedule, place: int) -> tuple[tuple[Action, ...], tuple[Action, ...]]:
    """Of a place's list the first step, and the second, which comes again."""
    whole, m = with_communication(lengthened(schedule, 3))[place], schedule.num_microbatches
    ends = [i + 1 for i, a in enumerate(whole) if a.kind == "U" and (a.microbatch + 1) % m == 0]
    return tuple(whole[: ends[0]]), tuple(whole[ends[0] : ends[1]])
