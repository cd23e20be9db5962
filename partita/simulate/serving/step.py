"""Seconds of a serving step at each stage, and of what they are made.

    stage   = kernels + collectives, or the host that starts them, where that is longer (block by block)
    cycle   = max(steps under way * dearest stage, all stages and their messages)

A pipeline works on several steps at once, each of other sequences: a sequence's next token is a cycle away.
Causes: `weights` of products whose rows are too few to wait for anything but their weights, `compute` of all
others and of attention's, `keys` of attention that waits for its keys and values, `passes` of what passes
through memory, `launch` of the starts on the device, `host`, and collectives by axis.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from partita.cost.kernels import Kernel, kernel_seconds, launches
from partita.cost.machine import Machine
from partita.parallel.laid import Laid
from partita.parallel.read import Call
from partita.parallel.room import axis_name
from partita.simulate.serving.cut import Shape, calls_of, message, pieces_of
from partita.simulate.serving.works import Server, kernels_of
from partita.simulate.stage import call_seconds, send_s
from partita.simulate.started import host_seconds
from partita.spec.program import Block, distinct

ROUNDING = 1e-9


@dataclass(frozen=True)
class StageStep:
    """One stage's part of a step: seconds by cause, and the bytes that its kernels move."""

    causes: Mapping[str, float]
    bytes: float

    @property
    def seconds(self) -> float:
        """All of them."""
        return sum(self.causes.values())


@dataclass(frozen=True)
class Step:
    """A step by stage, with what each message to the next stage takes."""

    stages: tuple[StageStep, ...]
    sends_s: tuple[float, ...]

    def cycle_s(self, under_way: float) -> float:
        """From a sequence's token to its next, where so many steps are under way."""
        dearest = max(s.seconds for s in self.stages)
        return max(under_way * dearest, self.latency_s)

    @property
    def latency_s(self) -> float:
        """From the first stage to the last."""
        return sum(s.seconds for s in self.stages) + sum(self.sends_s)


@dataclass
class Steps:
    """Prices steps of one of so many engines of a laid plan on a machine, and remembers them."""

    laid: Laid
    machine: Machine
    server: Server
    engines: int = 1
    known: dict[object, StageStep] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.server.graphs:
            era = replace(self.machine.software, host_s=0.0)
            self.machine = replace(self.machine, software=era)

    def step(self, shape: Shape, under_way: float = 1.0) -> Step:
        """A step, while others are at other stages, and other engines at theirs."""
        busy = self._busy(under_way)
        stages = tuple(self._stage(i, shape, busy) for i in range(len(self.laid.stages)))
        sends = tuple(self._send_s(i, shape) for i in range(len(stages) - 1))
        return Step(stages, sends)

    def _stage(self, stage: int, shape: Shape, busy: float) -> StageStep:
        found: defaultdict[str, float] = defaultdict(float)
        moved = 0.0
        for block, times in distinct(self.laid.stages[stage].blocks):
            if block.name == "head" and not shape.wanted:
                continue
            one = self._block(block, shape)
            for name, s in one.causes.items():
                found[name] += busy * times * s
            moved += times * one.bytes
        return StageStep(dict(found), moved)

    def _block(self, block: Block, shape: Shape) -> StageStep:
        """One block, on cores of its own."""
        key = id(block), shape
        if key not in self.known:
            found: defaultdict[str, float] = defaultdict(float)
            moved = 0.0
            for piece in pieces_of(block, (block.name,), self.laid, shape.tokens, shape.wanted):
                kernels = kernels_of(piece, self.laid, shape, self.server)
                causes, size = self._piece(kernels, calls_of(piece, self.laid))
                for name, s in causes.items():
                    found[name] += s
                moved += size
            self.known[key] = StageStep(dict(found), moved)
        return self.known[key]

    def _piece(self, kernels: list[Kernel], calls: list[Call]) -> tuple[dict[str, float], float]:
        """One block's seconds by cause, and what its kernels move."""
        causes: defaultdict[str, float] = defaultdict(float)
        host = 0.0
        for k in kernels:
            for name, s in causes_of(k, self.machine).items():
                causes[name] += s
            host += host_seconds(k, self.machine)
        for call in calls:
            causes[axis_name(call.axes)] += call.times * call_seconds(call, self.laid, self.machine)
            host += call.times * host_seconds(call, self.machine)
        causes["host"] = max(host - sum(causes.values()), 0.0)
        return causes, sum(k.bytes for k in kernels)

    def _send_s(self, stage: int, shape: Shape) -> float:
        call = message(self.laid, stage, shape.tokens)
        assert call is not None
        return send_s(call, stage, self.laid, self.machine)[0]

    def _busy(self, under_way: float) -> float:
        """How many times longer ranks take that share the cores of their node, and its caches."""
        cluster, plan = self.machine.cluster, self.laid.request.plan
        if not cluster.cores_shared:
            return 1.0
        own = self.laid.mesh.world_size
        alike = own / plan.mesh.pp * min(under_way, plan.mesh.pp)
        beside = min(self.engines, max(cluster.devices_per_node // own, 1))
        ranks = min(alike * beside, cluster.devices_per_node)
        return cluster.crowded(round(ranks)) * max(ranks / cluster.cores_shared, 1.0)


def causes_of(kernel: Kernel, machine: Machine) -> dict[str, float]:
    """Seconds of a kernel by what it waits for."""
    whole = kernel_seconds(kernel, machine)
    started = launches(kernel, machine.software) * machine.constants.launch_s
    rest = whole - started
    moving = kernel.bytes / machine.rates(kernel.dtype).memory
    name = "passes"
    if kernel.kind in ("matmul", "attention"):
        waits = moving >= rest * (1 - ROUNDING)
        name = ("keys" if kernel.kind == "attention" else "weights") if waits else "compute"
    return {name: rest, "launch": started} if started else {name: rest}
