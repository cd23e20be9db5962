"""Runs a laid plan on all its ranks in exact arithmetic (integers modulo a prime), without torch: stages,
microbatches and steps, weights, gradients and momentum stored as the units say.

It proves what no count of bytes proves: that the regions the rooms inserted, the axes gradients are
summed over and the places weights lie in make the same numbers as one device. A tensor used where it is
not whole is an ExecuteError; a sum left out or done twice is another number. What ranks send is recorded
in the form Laid.traffic declares it.

    execute_algebra.py     local tensors that know their global indices
    execute_ops.py         each kind of op on one rank; execute_attention.py that one
    execute_block.py       one block on all ranks of a stage
    execute.py             states, microbatches, steps
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from partita.parallel.execute_algebra import ExecuteError, Local, P, Values, inverse, noise
from partita.parallel.execute_block import BlockRun, Parts, World
from partita.parallel.laid import Laid, Unit, local_shape
from partita.parallel.read import BYTES, tensor_bytes
from partita.parallel.room import ACROSS
from partita.record.transfer import TrafficLine
from partita.spec.program import Op, Tensor

ROLES = ("parameter", "gradient", "momentum")


@dataclass
class Outcome:
    """What a run leaves: by step the loss and squared gradient norm of every rank, each weight's gradient
    by step and (rank, full name), the weights after the last step, and the last step's traffic by rank and
    what its routers chose: by block and microbatch each rank's rows for every expert."""

    losses: list[dict[int, int]] = field(default_factory=list)
    norms: list[dict[int, int]] = field(default_factory=list)
    gradients: list[dict[tuple[int, str], Local]] = field(default_factory=list)
    weights: dict[tuple[int, str], Local] = field(default_factory=dict)
    auxiliary: list[dict[int, int]] = field(default_factory=list)  # by step: every rank's sum
    routed: dict[tuple[str, int], dict[int, tuple[int, ...]]] = field(default_factory=dict)
    traffic: dict[int, list[TrafficLine]] = field(default_factory=dict)


@dataclass
class Buffer:
    """One flat unit on one rank: its weights lie side by side, each with its padding."""

    unit: Unit
    values: dict[str, Values]  # role -> flat buffer
    boxes: dict[str, tuple[int, tuple[range, ...]]]  # full name -> (start, indices held)

    def view(self, name: str, role: str) -> Local:
        """A weight's part of the buffer, without its padding; writing to it writes to the buffer."""
        start, spans = self.boxes[name]
        tensor = next(t for n, t, _ in self.unit.weights if n == name)
        shape = [len(s) for s in spans]
        flat = self.values[role][start : start + int(np.prod(shape))]
        return Local(tuple(d.name for d in tensor.dims), spans, flat.reshape(shape))


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
        self.pending: dict[tuple[int, str], Values] = {}  # reduced, not yet seen: all hand in first
        self.world, self.outcome = World(laid), Outcome()
        self.num_microbatches = laid.request.plan.num_microbatches
        self.batch = laid.request.micro_batch_size * laid.request.plan.data_parallel_size
        self.schedule, self.last = laid.schedule, len(laid.stages) - 1
        self.split = {(a.stage, a.microbatch) for a in laid.schedule.actions() if a.kind == "I"}
        self.places = range(laid.sizes["pp"])
        self.judging = [r for p in self.places if laid.holds_loss(p) for r in self.world.ranks(p)]
        self.units = {
            (r, u.name): self._store(r, u)
            for p in self.places
            for u in laid.units(p)
            for r in self.world.ranks(p)
        }
        self.home = {(r, n): b for (r, _), b in self.units.items() for n in b.boxes}

    def _store(self, rank: int, unit: Unit) -> Buffer:
        """Weights are drawn by name and place; padding holds other numbers on every rank."""
        boxes, start = {}, 0
        for name, tensor, layout in unit.weights:
            pieces = layout.pieces(self.laid.mesh, rank)
            if len(pieces) > 1 or any(p.start for p in pieces):
                raise ExecuteError(f"{name} lies in {len(pieces)} pieces on rank {rank}")
            spans = self.world.share(tensor, rank)
            held = tuple(range(a, b) for a, b in pieces[0].box) if pieces else None
            if held != spans and (held is not None or all(spans)):
                raise ExecuteError(f"{name} is stored as {held}, used as {spans}")
            boxes[name] = (start, spans)
            start += int(np.prod(local_shape(tensor, self.laid.sizes)))
        values = {role: noise(f"padding {role} {rank}", (range(start),)) for role in ROLES}
        buffer = Buffer(unit, values, boxes)
        for name, (_, spans) in boxes.items():
            buffer.view(name, "parameter").values[...] = noise(name, spans)
            for role in ROLES[1:]:
                buffer.view(name, role).values[...] = 0
        return buffer

    # A step

    def train_step(self, step: int) -> None:
        """Microbatches forward and backward, reductions, norm, update."""
        self.world.sent.clear()
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
        self._reduce()
        norms = self._once("step.norm", {r: self._square(r) for r in range(len(self.world.at))})
        self.outcome.norms.append(norms)
        self._update(norms)
        ranks = range(len(self.world.at))
        self.outcome.traffic = {r: self.world.traffic(r) for r in ranks}

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
                members = [r for r in range(len(self.world.at)) if r in values or "pp" in op.axes]
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
        counts = (x.values % 3 > 0) & (sample % 4 != 1)[:, None]
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
                env = {r: self._enter(name, block.tensors, r, (step, m)) for r in ranks}
                for r, x in (carried or {}).items():
                    env[r][block.input] = x
                first = m * self.batch
                split = (s, m) in self.split
                run = BlockRun(self.world, name, block, ranks, step, first, env, self.lost, split)
                carried = run.forward()
                runs[-1].append(run)
                for r, x in run.auxiliary.items():
                    self.auxiliary[r] = (self.auxiliary[r] + x) % P
                if run.loads:
                    self.outcome.routed[name, m] = run.loads
        losses = dict(carried or {})
        gradient: Parts = {r: Local((), (), np.array(scale[r], np.int64)) for r in losses}
        for s in range(self.last, -1, -1):
            for run in reversed(runs[s]):
                run.backward(gradient)
                self._collect(run)
                gradient = run.input_gradient() if run.name != "embedding" else {}
            gradient = self._hand_over(s, s - 1, m, gradient) if s else {}
        return losses

    def _enter(
        self, name: str, tensors: Mapping[str, Tensor], rank: int, at: tuple[int, int]
    ) -> dict[str, Local]:
        """A block's weights, from what is stored; token ids and labels."""
        found = {}
        for t in tensors.values():
            if t.role == "weight":
                full = self.laid.full_name(name, t.name)
                found[t.name] = self.home[rank, full].view(full, "parameter")
            elif t.role in ("index", "label"):
                found[t.name] = self._data(t, rank, *at)
        return found

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
        phase = "I" if phase == "B" and (s, m) in self.split else phase
        arrived = {}
        for r, x in carried.items():
            size = x.values.size * BYTES[block.tensors[event.of].dtype]
            self.world.record(r, op, event, self.laid.site(name, op.name), phase, size)
            arrived[self.laid.mesh.rank_of({**self.world.at[r], "pp": place})] = x
        return arrived

    def _collect(self, run: BlockRun) -> None:
        """Weight gradients are added to the stored ones."""
        for r in run.ranks:
            for w in run.block.weights():
                if w.name in run.grads[r]:
                    full = self.laid.full_name(run.name, w.name)
                    view = self.home[r, full].view(full, "gradient").values
                    view[...] = (view + run.grads[r][w.name].values) % P

    # Once a step

    def _reduce(self) -> None:
        """Every unit's reduction; then what the two places of pp that hold a weight add up."""
        for across in (False, True):
            for place in self.places:
                for stage in self.laid.stages_of(place):
                    for name, block in zip(stage.names, stage.blocks, strict=True):
                        for op in block.regions:
                            if (op.axes[0] in ACROSS) == across and op.kind != "send":
                                self._reduce_unit(place, name, op, block.tensors)
            if across:
                self._settle()

    def _reduce_unit(self, place: int, block: str, op: Op, tensors: Mapping[str, Tensor]) -> None:
        unit = op.reads[0].removesuffix(".gradient")
        unit = unit if unit in self.laid.program.tied else f"{block}.{unit}"
        summed = {}
        for event in op.events:
            for r in self.world.ranks(place):
                mine = self.units[r, unit]
                across = op.axes[0] in ACROSS
                group = self._pair(unit, r) if across else self.world.group(r, op.axes)
                others = [self.units[q, unit] for q in group]
                if any(b.boxes != mine.boxes for b in others):
                    raise ExecuteError(f"{unit}: ranks {group} hold other elements")
                if mine.values["gradient"].size != tensors[event.of].local(self.laid.sizes):
                    raise ExecuteError(f"{unit}: not what is declared is handed in")
                summed[r] = sum(b.values["gradient"] for b in others) % P
                size = summed[r].size * BYTES[tensors[event.of].dtype]
                self.world.record(r, op, event, self.laid.site(block, op.name), "step", size)
        self.pending.update({(r, unit): v for r, v in summed.items()})
        if op.axes[0] not in ACROSS:
            self._settle()

    def _settle(self) -> None:
        for key, gradient in self.pending.items():
            self.units[key].values["gradient"] = gradient
        self.pending.clear()

    def _pair(self, unit: str, rank: int) -> tuple[int, ...]:
        at, weight = self.world.at[rank], self.units[rank, unit].unit.weights[0][0]
        return tuple(self.laid.mesh.rank_of({**at, "pp": p}) for p in self.laid.holders(weight))

    def _square(self, rank: int) -> int:
        """The squares of the elements that this rank's place on pp and tp counts; replicas alike."""
        at, found = self.world.at[rank], 0
        norm = [op for op in self.laid.program.step if op.name.startswith("step.norm")]
        home = self.laid.mesh.rank_of({a: at[a] for op in norm for a in op.axes})
        for (r, _), buffer in self.units.items():
            for name, _, layout in buffer.unit.weights if r == rank else ():
                if any(p.primary for p in layout.pieces(self.laid.mesh, home)):
                    g = buffer.view(name, "gradient").values
                    found += int((g * g % P).sum())
        return found % P

    def _update(self, norms: Mapping[int, int]) -> None:
        found = {}
        for (r, unit), buffer in self.units.items():
            for name in buffer.boxes:
                g = buffer.view(name, "gradient")
                found[r, name] = Local(g.dims, g.spans, g.values.copy())
                self.outcome.weights[r, name] = buffer.view(name, "parameter")
            v = buffer.values
            v["momentum"][:] = (3 * v["momentum"] + v["gradient"] * norms[r]) % P
            v["parameter"][:] = (v["parameter"] - 7 * v["momentum"]) % P
            v["gradient"][:] = noise(f"padding {unit} {r}", (range(v["gradient"].size),))
            for name in buffer.boxes:
                buffer.view(name, "gradient").values[...] = 0
        self.outcome.gradients.append(found)
