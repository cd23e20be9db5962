"""PipeDream: no flush. Each stage updates its own weights and keeps the versions that are in flight."""

from __future__ import annotations

from dataclasses import replace

from partita.schedule.ir import Action, Schedule, Versions
from partita.schedule.make.families import require
from partita.schedule.make.one_f_one_b import one_f_one_b


def pipedream(num_ranks: int, num_microbatches: int, vertical_sync: bool = False) -> Schedule:
    """PipeDream (Harlap et al. 2018, arXiv 1806.03377). One stage a rank, asynchronous; any m >= 1.

    1F1B's order, U_k right behind B_k, no flush. F uses the newest weights; B uses the version that its
    own F used, which is stashed until then. Stage s holds p-s versions, the current one included, and
    its gradients are p-1-s updates old. With `vertical_sync` every stage uses the version that stage 0
    used for the microbatch.

    Period F+B a microbatch, F+B + 2c(p-1)/p with message latency c. Stashed weights are most where
    activations are, on stage 0.

    >>> from partita.plots.timeline import draw
    >>> print(draw(pipedream(2, 3), F=1, I=0.5, W=0.5))
    rank 0 | 0F0 0F1     0B0 0F2 0B1     0B2
    rank 1 |     1F0 1B0 1F1 1B1 1F2 1B2
    >>> print(pipedream(2, 2))
    0F0,0F1,0B0,0U0,0B1,0U1
    1F0,1B0,1U0,1F1,1B1,1U1
    """
    versions = "vertical" if vertical_sync else "newest"
    return _asynchronous("pipedream", num_ranks, num_microbatches, 1, versions)


def pipedream_2bw(num_ranks: int, num_microbatches: int, updates: int = 1) -> Schedule:
    """PipeDream-2BW (Narayanan et al. 2020, arXiv 2006.09503). One stage a rank, asynchronous.

    1F1B's order over `updates` batches of d = `num_microbatches`, one U each, no flush between. Batch b
    uses version max(0, b-1) on *every* stage, the last one too, though it has newer weights: so
    w(b+1) = w(b) - lr grad(w(b-1)), gradients are exactly one update old, and two versions are held.
    Needs d >= p: else stage 0 starts batch b before version b-1 exists. It is not PipeDream-Flush,
    which is synchronous 1F1B.

    >>> print(pipedream_2bw(2, 2, updates=2))
    0F0,0F1,0B0,0F2,0B1,0U1,0F3,0B2,0B3,0U3
    1F0,1B0,1F1,1B1,1U1,1F2,1B2,1F3,1B3,1U3
    """
    p, d = num_ranks, num_microbatches
    require(d >= p, "pipedream_2bw", f"p={p}, m={d}", f"m >= p = {p}", "pipedream takes fewer")
    return _asynchronous("pipedream_2bw", p, d * updates, d, "previous")


def _asynchronous(name: str, p: int, m: int, per_update: int, versions: Versions) -> Schedule:
    made = one_f_one_b(p, m)

    def updated(action: Action) -> tuple[Action, ...]:
        ends = action.kind == "B" and action.microbatch % per_update == per_update - 1
        return (action, action._replace(kind="U")) if ends else (action,)

    ranks = tuple(tuple(new for a in actions for new in updated(a)) for actions in made.ranks)
    return replace(made, name=name, ranks=ranks, versions=versions)


def lengthened(schedule: Schedule, steps: int) -> Schedule:
    """An asynchronous schedule run on over `steps` times its microbatches: no flush between."""
    total = schedule.num_microbatches * steps
    batches = sum(a.kind == "U" for a in schedule.ranks[0])
    per_update = schedule.num_microbatches // batches
    return _asynchronous(schedule.name, schedule.num_ranks, total, per_update, schedule.versions)
