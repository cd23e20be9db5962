"""Experts that are not chosen evenly: who gets how much, what is dropped, and the place that all wait for.

The rows of a rank are data (`Dim.local`): the straggler is the laid program at the rows of the fullest place
of ep. Its kernels, exchanges, kept activations and traffic follow by the readers that also serve a run.
Every block waits for it in `combine`; the others idle meanwhile. Within a place, rows are taken to lie
evenly over its experts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from partita.base.errors import UsageError
from partita.parallel.ep.counts import experts_of
from partita.parallel.laid import Laid
from partita.spec.program import distinct

RECEIVED = ("arrivals", "gathered", "padded", "spread")  # dims that grow with what a place receives
SEED = 0


@dataclass(frozen=True)
class Load:
    """The share of all routed rows that each expert gets; they sum to 1, or to what is not dropped."""

    shares: tuple[float, ...]

    @staticmethod
    def balanced(experts: int) -> Load:
        """All alike."""
        return Load((1 / experts,) * experts)

    @staticmethod
    def zipf(experts: int, exponent: float) -> Load:
        """The k-th most chosen gets a share as k^-exponent; which expert that is, is drawn once. Raises
        ValueError below 0 and above 100, where no second expert gets any."""
        if not 0 <= exponent <= 100:
            raise ValueError(exponent)
        weights = [k**-exponent for k in range(1, experts + 1)]
        random.Random(SEED).shuffle(weights)
        return Load.counts(weights)

    @staticmethod
    def counts(rows: Sequence[float]) -> Load:
        """What was measured: rows of each expert. Raises UsageError where there are none."""
        total = sum(rows)
        if min(rows, default=-1) < 0 or total <= 0:
            raise UsageError("counts of routed rows are >= 0 and not all 0", key="routing")
        return Load(tuple(r / total for r in rows))

    @staticmethod
    def parse(text: str, experts: int) -> Load:
        """'balanced', 'zipf:1.2', or 'counts:FILE', a JSON list of rows by expert. Raises UsageError."""
        kind, _, rest = text.partition(":")
        if not experts:
            raise UsageError(f"'{text}': the model has no experts to route to", key="routing")
        if text == "balanced":
            return Load.balanced(experts)
        try:
            if kind == "zipf":
                return Load.zipf(experts, float(rest))
            if kind == "counts":
                return Load.counts(_read(Path(rest), experts))
        except ValueError:
            pass
        wanted = "balanced, zipf:EXPONENT (0 to 100) or counts:FILE"
        raise UsageError(f"'{text}' is no routing: {wanted}", key="routing")

    def limited(self, capacity_factor: float | None) -> Load:
        """What stays where an expert takes so many times its even share at most."""
        if capacity_factor is None:
            return self
        most = capacity_factor / len(self.shares)
        return Load(tuple(min(s, most) for s in self.shares))

    @property
    def dropped(self) -> float:
        """The share of rows that no expert takes."""
        return max(1 - sum(self.shares), 0.0)

    def busiest(self, ep: int) -> tuple[int, float]:
        """The place of ep with most rows, and its rows over an even share."""
        places = [sum(self.shares[slice(*experts_of(len(self.shares), ep, p))]) for p in range(ep)]
        top = max(range(ep), key=lambda p: places[p])
        return top, places[top] * ep


def _read(path: Path, experts: int) -> list[float]:
    import msgspec

    if not path.is_file():
        raise UsageError(f"no such file: {path}", file=str(path), key="routing")
    try:
        rows = msgspec.json.decode(path.read_bytes(), type=list[float])
    except msgspec.DecodeError as error:
        raise UsageError(f"{path}: {error}", file=str(path), key="routing") from None
    if len(rows) != experts:
        text = f"{path}: {len(rows)} counts for {experts} experts"
        raise UsageError(text, file=str(path), key="routing")
    return rows


def straggler(laid: Laid, load: Load) -> Laid:
    """The laid program as the fullest place of ep runs it; itself where the model has no experts."""
    _, factor = load.busiest(laid.sizes["ep"])
    rows = {
        d.name: int(-(-d.local(laid.sizes) * factor // 1))
        for s in laid.stages
        for b, _ in distinct(s.blocks)
        for t in b.tensors.values()
        for d in t.dims
        if d.name in RECEIVED and d.of
    }
    return replace(laid, rows=rows)
