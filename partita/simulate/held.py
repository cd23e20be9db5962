"""What a rank holds over a step: the ledger's categories along the schedule's clock, and who holds the peak.

parameters, optimizer and gradients stay, but gradients that ZeRO cuts come as the first B of their stage (W
where halves are split) lets go of what it kept; activations live from F to the end of B (W); buffers, at the
worst moment inside any of the rank's actions, while one runs. The curve's top is the ledger's peak, of each
category its own figure, by construction and by a test.

A device shows more than its tensors: the context of its runtime and of its communicators, and what the
allocator cannot give back. `peak_interval` is of tensors alone, `shown_bytes` of all that a device shows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from partita.cost.empirical import CONTEXT_BYTES, FRAGMENTATION, LEDGER
from partita.parallel.laid import Laid
from partita.parallel.precision.rules import is_before
from partita.parallel.read import tensor_bytes
from partita.record.ledger import CATEGORIES, Ledger
from partita.record.span import Span
from partita.schedule.clock import held_over_time
from partita.schedule.ir import Schedule
from partita.simulate.away import leaves, levels
from partita.simulate.memory import (
    brought_bytes,
    chunk_bytes,
    deferred_bytes,
    kept_at_once,
    lent_parts,
    picture_bytes,
    standing_gradients,
    waiting_bytes,
    worst_moment,
)
from partita.spec.cluster import Cluster


@dataclass(frozen=True)
class Held:
    """A step of the ranks at one place of pp: from each time on, bytes of activations, of buffers and of
    gradients; and the parameters and optimizer that stay. `peak_s`: when the sum is largest, for the first
    time; `during`: what runs then."""

    times_s: tuple[float, ...]
    activations: tuple[int, ...]
    buffers: tuple[int, ...]
    gradients: tuple[int, ...]
    stays: int
    peak_s: float
    during: str

    def total(self) -> list[tuple[float, int]]:
        """(time, bytes held from then on)."""
        parts = zip(self.times_s, self.activations, self.buffers, self.gradients, strict=True)
        return [(t, self.stays + a + b + g) for t, a, b, g in parts]


def held(laid: Laid, place: int, schedule: Schedule, spans: Iterable[Span], ledger: Ledger) -> Held:
    """The curve of a place, on the spans that were played."""
    own = [s for s in spans if s.rank == place]
    (kept, coming), waits = chunk_bytes(laid, place), deferred_bytes(laid, place)
    away = leaves(laid)
    level = (
        _leaving(laid, place, schedule, own)
        if away
        else {t: int(n) for t, n in held_over_time(schedule, own, kept, waits)[place]}
    )
    pictures, stands = picture_bytes(laid, place), standing_gradients(laid, place)
    at, most = ledger.at_peak, kept_at_once(laid, place, schedule)[0]
    gone = most - (at["activations"] - pictures)  # at the worst moment inside an action
    runs = {s.end_s: False for s in own} | {s.start_s: True for s in own}
    come = Counter({0.0: int(sum(coming))}) if away else _come(own, kept, coming, waits)
    times = sorted({0.0, *level, *runs})
    activations, buffers, gradients = [], [], []
    a, g, inside = 0, stands, False
    for time in times:
        a, g, inside = level.get(time, a), g + come.get(time, 0), runs.get(time, inside)
        less = min(gone, a) if inside else 0
        activations.append(a - less + pictures)
        buffers.append(at["buffers"] - gone + less if inside else 0)
        gradients.append(g)
    top = max(range(len(times)), key=lambda i: activations[i] + buffers[i] + gradients[i])
    stays = sum(at.get(c, 0) for c in ("parameters", "optimizer"))
    during = next((s.name for s in own if s.start_s <= times[top] < s.end_s), "")
    return Held(
        tuple(times), tuple(activations), tuple(buffers), tuple(gradients), stays, times[top], during
    )  # fmt: skip


def _leaving(laid: Laid, place: int, schedule: Schedule, own: Sequence[Span]) -> dict[float, int]:
    """Time -> bytes kept from then on, where they leave between forward and backward."""
    found: dict[float, int] = {}
    at = {str(s.action): s for s in levels(laid, place, schedule)}
    for span in sorted(own, key=lambda s: s.start_s):
        if span.name in at:
            found[span.start_s], found[span.end_s] = at[span.name].during, at[span.name].after
    return found


def _come(
    own: Sequence[Span], kept: Sequence[float], coming: Sequence[float], waits: Sequence[float]
) -> Counter[float]:
    """Bytes of gradients by when they come: as far as a stage's first backward does not let go of as much (a
    weight half of what it reads, where that is more than was kept), at its start, the others at its end."""
    found: Counter[float] = Counter()
    first: dict[int, Span] = {}
    for s in own:
        if s.kind in ("B", "W"):
            first.setdefault(s.stage, s)
    for stage, s in first.items():
        goes = max(kept[stage], waits[stage]) if s.kind == "W" else kept[stage]
        early = max(int(coming[stage] - goes), 0)
        found[s.start_s] += early
        found[s.end_s] += int(coming[stage]) - early
    return found


def holders(laid: Laid, place: int, ledger: Ledger, cluster: Cluster) -> dict[str, int]:
    """Who holds a place's peak: the ledger's sum by finer names, largest first."""
    at = {c: ledger.at_peak.get(c, 0) for c in CATEGORIES}
    request, stages = laid.request, laid.stages_of(place)
    masters, words, precision = 0, request.state_words, request.plan.precision
    before = [t for s in stages for b in s.blocks for n, t in b.tensors.items() if is_before(n)]
    saved = sum(tensor_bytes(t, laid.sizes) for t in before if t.arena == "device")
    apart = laid.schedule.is_asynchronous or precision.dtype not in ("fp32", "fp64")
    if apart and precision.rounding == "nearest":
        masters = (at["optimizer"] - saved) // (words + 1)
    worst = max((worst_moment(laid, s.blocks, laid.schedule) for s in stages), key=lambda x: x.size)
    lent = max((lent_parts(laid, s.blocks, cluster) for s in stages), key=lambda x: sum(x.values()))
    waits, pictures = waiting_bytes(laid, place), picture_bytes(laid, place)
    brought = brought_bytes(laid, place)
    scratch = at["buffers"] - sum(lent.values()) - waits - brought
    found = {
        "parameters": at["parameters"], "gradients": at["gradients"],
        "moments": at["optimizer"] - masters - saved, "masters": masters, "to undo an update": saved,
        "activations": at["activations"] - pictures, "a step's pictures": pictures,
        **lent, f"inside {worst.block.name}": scratch, "a forward whose rows travel": waits,
        "an output's gradient": brought,
    }  # fmt: skip
    return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda x: -x[1]))


def peak_interval(peak: int) -> tuple[int, int]:
    """Between which bytes tensors will peak of which the ledger says so many."""
    return int(peak * (1 - LEDGER)), math.ceil(peak * (1 + LEDGER))


def shown_bytes(peak: int, is_cpu: bool) -> tuple[int, int]:
    """Between which bytes a device will show a peak of so many bytes of tensors."""
    if is_cpu:
        return peak_interval(peak)
    low = peak * (1 - LEDGER) + CONTEXT_BYTES[0]
    return int(low), int(peak * (1 + LEDGER + FRAGMENTATION) + CONTEXT_BYTES[1])
