"""Runs a laid plan on all its ranks in exact arithmetic (integers modulo a prime), without torch: stages,
microbatches and steps, weights, gradients and momentum stored as the units say.

It proves what no count of bytes proves: that the regions the rooms inserted, the axes gradients are
summed over and the places weights lie in make the same numbers as one device. A tensor used where it is
not whole is an ExecuteError; a sum left out or done twice is another number. What ranks send is recorded
in the form Laid.traffic declares it.

    algebra.py     local tensors that know their global indices
    ops.py         each kind of op on one rank; attention.py that one
    block.py       one block on all ranks of a stage
    state.py       what ranks store, gathers, reductions, update
    execute.py     microbatches and steps
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from partita.parallel.dp.rules import zero_stage
from partita.parallel.exact.algebra import ExecuteError, Local, P, inverse
from partita.parallel.exact.block import BlockRun, Parts, World
from partita.parallel.exact.state import States
from partita.parallel.laid import Laid
from partita.parallel.read import BYTES, tensor_bytes
from partita.record.transfer import TrafficLine
from partita.spec.program import Block, Op, Tensor


@dataclass
class Outcome:
    """What a run leaves: by step the loss and squared gradient norm of every rank, each weight's gradient
    by step and (rank, full name), the weights after the last step, and the last step's traffic by rank and
    what its routers chose: by block and microbatch each rank's rows for every expert. Of a weight a rank
    holds boxes: one, or what its shard of a flat unit cuts out."""

    losses: list[dict[int, int]] = field(default_factory=list)
    norms: list[dict[int, int]] = field(default_factory=list)
    gradients: list[dict[tuple[int, str], tuple[Local, ...]]] = field(default_factory=list)
    weights: dict[tuple[int, str], tuple[Local, ...]] = field(default_factory=dict)
    auxiliary: list[dict[int, int]] = field(default_factory=list)  # by step: every rank's sum
    routed: dict[tuple[str, int], dict[int, tuple[int, ...]]] = field(default_factory=dict)
    traffic: dict[int, list[TrafficLine]] = field(default_factory=dict)


def execute(laid: Laid, steps: int = 2, lost: str = "") -> Outcome:
    """Trains a laid plan for some steps of SGD with momentum, clipped by the squared norm.

    Sample i of a step is sample i of its global batch, whoever computes it: outcomes of different plans
    with equal micro_batch_size * dp * num_microbatches can be compared. `lost` names a tensor that is
    dropped though the program keeps it (a fault to be found). Raises ExecuteError where a laid program
    cannot run.
    """
    run = Execution(laid, lost)
    for step in range(steps):
        run.train_step(step)
    return run.outcome


class Execution:
    """All ranks of one run: their stored states, and one method for each part of a step."""

    def __init__(self, laid: Laid, lost: str = "") -> None:
        self.laid, self.lost = laid, lost
        self.world, self.outcome = World(laid), Outcome()
        self.states = States(laid, self.world)
        self.num_microbatches = laid.request.plan.num_microbatches
        self.batch = laid.request.micro_batch_size * laid.request.plan.data_parallel_size
        self.schedule, self.last = laid.schedule, len(laid.stages) - 1
        self.split = {(a.stage, a.microbatch) for a in laid.schedule.actions() if a.kind == "I"}
        places = range(laid.sizes["pp"])
        self.judging = [r for p in places if laid.holds_loss(p) for r in self.world.ranks(p)]

    # A step

    def train_step(self, step: int) -> None:
        """Microbatches forward and backward, reductions, norm, update."""
        self.world.sent.clear()
        self._gather(first=True)
        scale = self._token_scale(step)
        self.auxiliary = dict.fromkeys(range(len(self.world.at)), 0)
        losses = dict.fromkeys(self.judging, 0)
        for m in range(self.num_microbatches):
            for r, x in self._microbatch(step, m, scale).items():
                losses[r] = (losses[r] + int(x.values)) % P
        self.outcome.losses.append(
            self._once("step.loss", {r: v * scale[r] % P for r, v in losses.items()})
        )
        self.outcome.auxiliary.append(self._once("step.routing", self.auxiliary))
        for at in self.states.each_block():
            self.states.drop(*at, "step")
        self.states.reduce()
        ranks = range(len(self.world.at))
        squares = {r: self.states.square(r, self.laid.norm_axes) for r in ranks}
        self._once("step.known", squares)
        norms = self._once("step.norm", squares)
        self.outcome.norms.append(norms)
        self.outcome.gradients.append(self.states.update(norms))
        self._gather(first=False)
        self.outcome.weights = self.states.held("parameter")
        self.outcome.traffic = {r: self.world.traffic(r) for r in ranks}

    def _gather(self, first: bool) -> None:
        """Gathers of a step: at its beginning those of stage 3, behind the update those before."""
        if (zero_stage(self.laid.request.plan) == 3) == first:
            for ranks, name, block in self.states.each_block():
                self.states.fetch(ranks, name, block, "step")

    def _token_scale(self, step: int) -> dict[int, int]:
        """One over the valid tokens of the step, on the last stage, counted ahead of the microbatches."""
        counts = dict.fromkeys(self.judging, 0)
        block = self.laid.stages[-1].blocks[-1]
        for m in range(self.num_microbatches):
            for r in counts:
                counts[r] += int(self._data(block.tensors["valid"], r, step, m).values.sum())
        counts = self._once("step.count", counts)
        return {r: int(inverse(np.array(n % P, np.int64))) for r, n in counts.items()}

    def _once(self, name: str, values: dict[int, int]) -> dict[int, int]:
        """A number of the step through its regions, in order."""
        for op in self.laid.program.step:
            for e in op.events if op.name.partition(":")[0] == name else ():
                every = range(len(self.world.at))
                members = [r for r in every if r in values or "pp" in op.axes]
                members = [r for r in members if op in self.laid.step_ops(self.world.at[r]["pp"])]
                for r in members:
                    size = tensor_bytes(self.laid.program.tensors[e.of], self.laid.sizes)
                    self.world.record(r, op, e, op.name, "step", size)
                values = {r: self._meet(e.collective, op, r, values) for r in members}
        return values

    def _meet(self, collective: str, op: Op, rank: int, values: Mapping[int, int]) -> int:
        group = self.world.group(rank, op.axes)
        if collective == "broadcast":  # from the last stage
            return next(values[q] for q in group if q in self.judging)
        return sum(values.get(q, 0) for q in group) % P

    # A microbatch

    def _data(self, t: Tensor, rank: int, step: int, m: int) -> Local:
        """Token ids, targets, and which targets count: unevenly, some samples not at all."""
        place = self.world.place("", {t.name: t}, rank, step, m * self.batch)
        x = place.drawn(t.name, t.name)
        if t.role != "label":
            return x
        sample = np.array(x.spans[0]) + m * self.batch
        counts = (x.values % 3 > 0) & (sample % 4 != 1).reshape(-1, *[1] * (x.values.ndim - 1))
        if x.values.ndim > 1:
            counts = counts & (place.real(x.spans[1]) > 0)
        return Local(x.dims, x.spans, counts.astype(np.int64))

    def _microbatch(self, step: int, m: int, scale: Mapping[int, int]) -> dict[int, Local]:
        """Forward over all stages, then backward; returns the loss sums of the last stage."""
        runs: list[list[BlockRun]] = []
        carried: Parts | None = None
        for s, stage in enumerate(self.laid.stages):
            carried = self._hand_over(s - 1, s, m, carried) if carried is not None else None
            ranks = self.world.ranks(self.schedule.rank_of(s, m))
            runs.append([])
            for name, block in zip(stage.names, stage.blocks, strict=True):
                self.states.fetch(ranks, name, block, "F")
                env = {r: self._enter(name, block, r, (step, m)) for r in ranks}
                for r, x in (carried or {}).items():
                    env[r][block.input] = x
                first = m * self.batch
                split = (s, m) in self.split
                run = BlockRun(self.world, name, block, ranks, step, first, env, self.lost, split)
                carried = run.forward()
                run.move("F", (s, m) in self.laid.leaving)
                self.states.drop(ranks, name, block, "F")
                self._lose_weights(run)
                runs[-1].append(run)
                for r, x in run.auxiliary.items():
                    self.auxiliary[r] = (self.auxiliary[r] + x) % P
                if run.loads:
                    self.outcome.routed[name, m] = run.loads
        losses = dict(carried or {})
        gradient: Parts = {r: Local((), (), np.array(scale[r], np.int64)) for r in losses}
        for s in range(self.last, -1, -1):
            for run in reversed(runs[s]):
                first, second = ("I", "W") if (s, m) in self.split else ("B", "B")
                self.states.fetch(run.ranks, run.name, run.block, "B", first)
                for r in run.ranks:
                    run.env[r] |= self.states.weights(run.name, run.block, r)
                run.move("B", (s, m) in self.laid.leaving)
                run.backward(gradient)
                self.states.drop(run.ranks, run.name, run.block, "B")
                self.states.collect(run, second)
                gradient = run.input_gradient() if run.name != "embedding" else {}
            gradient = self._hand_over(s, s - 1, m, gradient) if s else {}
        return losses

    def _enter(self, name: str, block: Block, rank: int, at: tuple[int, int]) -> dict[str, Local]:
        """A block's weights, as far as they are there; token ids and labels."""
        found = self.states.weights(name, block, rank)
        for t in block.tensors.values():
            if t.role in ("index", "label", "data"):
                found[t.name] = self._data(t, rank, *at)
        return found

    def _lose_weights(self, run: BlockRun) -> None:
        """Between F and B a block keeps its weights only where they are stored."""
        for r in run.ranks:
            for w in run.block.weights():
                run.env[r].pop(w.name, None)

    def _hand_over(self, s: int, to: int, m: int, carried: Parts) -> dict[int, Local]:
        """The neighbour gets it: as it is on the same place of pp, elsewhere if a send is declared."""
        stage, phase = self.laid.stages[s], "F" if to > s else "B"
        name, block = list(zip(stage.names, stage.blocks, strict=True))[-1 if phase == "F" else 0]
        sends = [(op, e) for op in block.regions for e in op.events if op.kind == "send"]
        found = [(op, e) for op, e in sends if e.phase == phase]
        place = self.schedule.rank_of(to, m)
        apart = self.schedule.rank_of(s, m) != place
        if len(found) != apart:
            raise ExecuteError(f"{name} sends {len(found)} times in {phase}")
        if not apart:
            return dict(carried)
        op, event = found[0]
        handed, sizes = block.tensors[event.of], self.laid.sizes
        padded = any(d.padded and d.cut for d in handed.dims)  # its padding goes along
        phase = "I" if phase == "B" and (s, m) in self.split else phase
        arrived = {}
        for r, x in carried.items():
            size = tensor_bytes(handed, sizes) if padded else x.values.size * BYTES[handed.dtype]
            self.world.record(r, op, event, self.laid.site(name, op.name), phase, size)
            arrived[self.laid.mesh.rank_of({**self.world.at[r], "pp": place})] = x
        return arrived
