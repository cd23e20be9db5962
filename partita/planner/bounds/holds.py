"""What a schedule holds at once, for all sizes of a microbatch in one go; what any order of stages does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from partita.base.errors import PartitaError, Problem
from partita.parallel.pp.rules import schedule_of
from partita.planner.bounds.rough import MADE, Rough
from partita.planner.bounds.table import Probe, probe_of
from partita.planner.space import Leaf, MeshChoice, Shape, Space, Tokens
from partita.spec.plan import Plan


@dataclass(frozen=True)
class Holds:
    """As `Probe` says it of each size: `chunks`, and those that `wait`, [size, moment, rank, stage of its
    own], if any; `later` [size, rank, stage of its own]. Of a size without a probe nothing is held."""

    chunks: np.ndarray
    wait: np.ndarray | None
    later: np.ndarray

    @staticmethod
    def of(probes: Sequence[Probe | None], held: np.ndarray) -> Holds | None:
        """From the probes that are there, if any; `held` [rank, stage of its own] as they have it."""
        known = [p for p in probes if p is not None]
        if not known:
            return None
        moments, ranks = max(len(p.chunks) for p in known), np.arange(len(held))[:, None]
        chunks, wait = np.zeros((2, len(probes), moments, *held.shape))
        later = np.zeros((len(probes), *held.shape))
        for i, p in enumerate(probes):
            if p is not None:
                at = slice(len(p.chunks))
                chunks[i, at], wait[i, at] = p.chunks[:, ranks, held], p.wait[:, ranks, held]
                later[i] = p.later[ranks, held]
        return Holds(chunks, wait if wait.any() else None, later)

    def most(self, kept: np.ndarray, more: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[size, rank] bytes of activations at once, and behind a first backward of all of a rank's stages:
        of a chunk [rank, stage of its own] those `kept`, and what its weight half reads beyond."""
        held = np.einsum("smro,ro->smr", self.chunks, kept)
        if self.wait is not None:
            held += np.einsum("smro,ro->smr", self.wait, more)
        return np.maximum.reduce(held, 1), np.einsum("sro,ro->sr", self.later, kept)


def short_step(schedule: str, ranks: int, m: int) -> int:
    """Microbatches of a step that tells what a schedule holds at once, and that exists where m's does:
    interleaved_zb holds what m's equal rounds say."""
    if schedule == "interleaved_zb" and m > 2 * ranks:
        rounds = m // ranks
        return m if m % rounds else 2 * m // rounds
    return m if m <= 2 * ranks else 2 * ranks + m % ranks


def least_probe(lies: Rough, num_microbatches: int) -> Probe:
    """What any order of such stages holds at least: one microbatch at a time."""
    from partita.schedule.synth.seeds import one_at_a_time  # with all that makes schedules

    held = lies.held.tolist()
    rank = {stage: r for r, mine in enumerate(held) for stage in mine}
    placement = tuple(rank[s] for s in range(lies.num_stages))
    alone = one_at_a_time(len(held), num_microbatches, (placement,))
    found = probe_of(alone)
    return replace(found, later=np.zeros_like(found.later))


def alone(space: Space, ranks: int, leaf: tuple[str, int]) -> Plan:
    """A pipeline and nothing else."""
    return space.plan(MeshChoice(ranks, 1, 1, 1, False), Shape(), Tokens(), Leaf(*leaf, 1))


def made_probe(
    space: Space, lies: Rough, ranks: int, leaf: tuple[str, int], short: int
) -> Probe | Problem:
    """What a schedule says of itself on so short a step, or why it cannot be made."""
    try:
        if leaf[0] in MADE:
            return least_probe(lies, short)
        plan = alone(space, ranks, leaf)
        return probe_of(schedule_of(plan.with_("pipeline", num_microbatches=short)))
    except PartitaError as wrong:
        return Problem("pp", "schedule", wrong.message)
