"""What plans send over a cluster's links, before one is laid: who meets to cut and to reduce states, what
that takes, and a message from stage to stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from partita.cost.comm import Group, group_seconds, wire_seconds
from partita.cost.machine import Machine
from partita.planner.space import MeshChoice, Shape
from partita.simulate.groups import place
from partita.spec.model import ModelSpec
from partita.spec.plan import Plan

T = TypeVar("T", float, np.ndarray)


@dataclass(frozen=True, eq=False, slots=True)
class Meeting:
    """The ranks over which a unit is cut (`inner`, `cut` of them), and those that reduce its shards: one
    object for the same ranks."""

    inner: Group
    cut: int
    outer: Group


class Links:
    """The links of a machine, as plans of a model meet on them; groups are kept. `partly`: some of its
    weights are frozen, which ZeRO 1 and 2 neither cut nor gather: the largest unit may be one of them."""

    def __init__(self, machine: Machine, model: ModelSpec, partly: bool = False) -> None:
        self.machine, self.model, self.partly = machine, model, partly
        self.bucket_bytes = Plan().data.bucket_bytes
        self._meetings: dict[object, tuple[Meeting, ...]] = {}
        self._each: dict[object, Meeting] = {}
        self._once: dict[tuple[Meeting, float, float, int], float] = {}
        self._cut: dict[tuple[int, float, float], tuple[float, float]] = {}
        self._groups: dict[tuple[int, int], Group] = {}
        self._hops: dict[tuple[int, int], Group] = {}

    def group(self, stride: int, n: int) -> Group:
        """`n` ranks, each `stride` behind the one before."""
        key = (stride, n)
        if key not in self._groups:
            self._groups[key] = place(tuple(range(0, stride * n, stride)), self.machine)
        return self._groups[key]

    def meetings(
        self, mesh: MeshChoice, shape: Shape, shard: int, zero: int
    ) -> tuple[Meeting, ...]:
        """Who cuts and who reduces the units of all but experts, and those of experts. `zero`: in force. Of
        images on cp nobody is said to meet: kernels are reduced over it, fully connected layers are not."""
        fold, replicas = shape.ep * shape.etp, mesh.dp // shard
        key = (mesh.inner, mesh.cp, fold, shard, replicas, bool(zero))
        if key not in self._meetings and self.model.image is not None and mesh.cp > 1:
            alone = self.group(1, 1)
            self._meetings[key] = (Meeting(alone, 1, alone),)
        elif key not in self._meetings:
            rows = [(mesh.inner, shard * mesh.cp)]
            if self.model.experts:
                rows.append((fold, shard * mesh.cp * mesh.inner // fold))
            found = []
            for stride, ranks in rows:
                cut, rest = (ranks, replicas) if zero else (1, ranks * replicas)
                wide = shard * mesh.cp * mesh.inner if zero else stride
                row = stride, cut, wide, rest
                if row not in self._each:
                    meeting = Meeting(self.group(stride, cut), cut, self.group(wide, rest))
                    self._each[row] = meeting
                found.append(self._each[row])
            self._meetings[key] = tuple(found)
        return self._meetings[key]

    def once_s(self, units: Sequence[float], meetings: Sequence[Meeting], zero: int) -> float:
        """Seconds of a step's collectives on units of a rank, each kind in one call."""
        total = 0.0
        for i, at in enumerate(meetings):
            key = at, units[2 * i], units[2 * i + 1], zero
            if key not in self._once:
                self._once[key] = self._once_s(*key)
            total += self._once[key]
        return total

    def _once_s(self, at: Meeting, weights: float, gradients: float, zero: int) -> float:
        gradients *= min(self.machine.software.gradient_bytes / 4, 1.0)
        total = group_seconds("all_reduce", at.outer, gradients / at.cut)
        if zero == 1:
            total += group_seconds("reduce_scatter", at.inner, gradients)
        if zero in (1, 2) and not self.partly:
            total += group_seconds("all_gather", at.inner, weights / at.cut)
        return total

    def each_s(
        self, units: Sequence[float], meetings: Sequence[Meeting], zero: int, apart: bool = False
    ) -> tuple[float, float]:
        """Seconds of ZeRO's collectives of a microbatch on units, in a call each: forward, backward. `apart`:
        those alone that are too large to be joined with other layers'."""
        forward = backward = 0.0
        least = 1.01 * self.bucket_bytes if apart and zero < 3 else 0.0
        for i, at in enumerate(meetings):
            gathered = units[2 * i] / at.cut if zero == 3 else -1.0
            made = units[2 * i + 1] if zero > 1 and units[2 * i + 1] > least else 0.0
            key = id(at.inner), gathered, made  # groups are kept
            if key not in self._cut:
                gather = group_seconds("all_gather", at.inner, gathered) if zero == 3 else 0.0
                scatter = group_seconds("reduce_scatter", at.inner, made) if made else 0.0
                self._cut[key] = gather, gather + scatter
            there, back = self._cut[key]
            forward, backward = forward + there, backward + back
        return forward, backward

    def send(self, mesh: MeshChoice, sent: T) -> T | float:
        """Seconds of a message of so many bytes between neighbouring stages, at least."""
        hop, shares = self._hop(mesh)
        return 0.0 if hop is None else group_seconds("send", hop, sent / shares)  # type: ignore[arg-type, return-value]

    def wire(self, mesh: MeshChoice, sent: float) -> float:
        """Those of them in which the link out of its rank carries nothing else."""
        hop, shares = self._hop(mesh)
        return 0.0 if hop is None else wire_seconds(hop, sent / shares)

    def _hop(self, mesh: MeshChoice) -> tuple[Group | None, int]:
        """What a message crosses, if it travels beside compute, and in how many shares."""
        if mesh.pp == 1 or self.machine.class_ == "CPU" or self.machine.software.sends_block:
            return None, 1
        stride = mesh.dp * mesh.cp * mesh.inner
        if (stride, mesh.pp) not in self._hops:
            pairs = [(i * stride, (i + 1) * stride) for i in range(mesh.pp - 1)]
            groups = {place(pair, self.machine) for pair in pairs}
            self._hops[stride, mesh.pp] = max(groups, key=lambda g: group_seconds("send", g, 1e6))
        shares = 1 if mesh.sp or not self.machine.software.scatters_sends else mesh.tp
        return self._hops[stride, mesh.pp], shares
