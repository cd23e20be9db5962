"""What a rank knows about itself: plan, mesh, rank, comms, device, seed, where it is, its recorder.

Given once at construction. `context.comm(*axes, lane=...)` serves any axis, product of axes, or named group:
'tied' and 'pp/copy' (the two places of pp that hold one weight), 'tp/share' (tp ranks that hold the same
key/value head), 'world'.
Groups are made eagerly, all of them on every rank, in one order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from partita.comm.protocol import Comm, Where, World
from partita.comm.recording import Recorder, RecordingComm
from partita.comm.single import SingleComm
from partita.parallel.room import ACROSS, axis_name
from partita.spec.mesh import DENSE, EXPERT, Mesh
from partita.spec.plan import Plan

Wanted = tuple[tuple[str, ...], str]  # axes, lane


@dataclass(frozen=True)
class Named:
    """Who meets in groups that are no axis: ranks that hold the same of `kv_heads` heads ('tp/share'),
    the places of pp in `pairs` ('tied', 'pp/copy')."""

    kv_heads: int = 0
    pairs: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """A rank's place in a run. See the module."""

    plan: Plan
    mesh: Mesh
    rank: int
    world: World
    coords: Mapping[str, int]
    device: torch.device
    seed: int
    where: Where
    recorder: Recorder
    comms: Mapping[tuple[str, str], Comm]

    @staticmethod
    def create(
        plan: Plan,
        mesh: Mesh,
        world: World,
        *,
        groups: Sequence[Wanted],
        named: Named | None = None,
        seed: int = 0,
        where: Where | None = None,
        recorder: Recorder | None = None,
    ) -> Context:
        """Makes every group of `groups`; all ranks call it with the same list. It computes on the CPU."""
        where = where or Where()
        recorder = recorder or Recorder(world.rank)
        comms: dict[tuple[str, str], Comm] = {}
        for axes, lane in groups:
            name = axis_name(axes)
            for ranks in group_ranks(mesh, axes, named or Named()):
                made = world.make(ranks, axis=name, lane=lane)
                if made is not None:
                    alone = made.size == 1
                    comms[name, lane] = made if alone else RecordingComm(made, recorder, where)
        at = mesh.coords(world.rank)
        cpu = torch.device("cpu")
        return Context(plan, mesh, world.rank, world, at, cpu, seed, where, recorder, comms)

    def comm(self, *axes: str, lane: str = "compute") -> Comm:
        """The Comm over a product of axes on a lane; a group of one where nothing moves."""
        name = axis_name(axes)
        return self.comms.get((name, lane)) or SingleComm(name, lane, (self.rank,))


def group_ranks(mesh: Mesh, axes: Sequence[str], named: Named) -> tuple[tuple[int, ...], ...]:
    """All groups over the axes, named ones among them, in one order."""
    if tuple(axes) == ("world",):
        return (tuple(range(mesh.world_size)),)
    across = [a for a in axes if a in ACROSS]
    plain = [a for a in axes if a not in (*ACROSS, "tp/share")]
    free = {*plain, *(("pp",) if across else ()), *(("tp",) if "tp/share" in axes else ())}
    share = max(mesh.sizes["tp"] // named.kv_heads, 1) if "tp/share" in axes else 1
    met = {place: i for a in across for i, pair in enumerate(named.pairs[a]) for place in pair}
    view = EXPERT if set(plain) - set(DENSE) else DENSE
    found: dict[tuple[int, ...], list[int]] = {}
    for rank in range(mesh.world_size):
        at = mesh.coords(rank)
        if across and at["pp"] not in met:
            continue
        fixed = [at[a] for a in view if a not in free]
        head = at["tp"] // share if "tp/share" in axes else 0
        pair = met[at["pp"]] if across else 0
        found.setdefault((*fixed, head, pair), []).append(rank)
    order = [*plain, *(["pp"] if across else []), *(["tp"] if "tp/share" in axes else [])]
    return tuple(
        tuple(sorted(g, key=lambda r: tuple(mesh.coords(r)[a] for a in order)))
        for g in found.values()
    )
