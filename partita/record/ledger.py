"""A Ledger is bytes by category in one arena of one rank, at the moment of its peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "buffers", "untagged")


@dataclass(frozen=True)
class Ledger:
    """Bytes held by one rank in one arena (device, host or disk), predicted or measured.

    `at_peak` holds the categories at the moment their sum was largest; `peak_bytes` is that sum.
    `most` holds each category's own largest, whatever the others were then: where two moments are all but as
    high, a rounding decides which is the peak, and what is there of each category, not what is ever kept.
    optimizer = moments and fp32 masters; buffers = gathered parameters, communication buffers and
    the loss's scratch; untagged = measured storages that nobody claimed (zero when predicted).
    """

    rank: int
    arena: str = "device"
    at_peak: Mapping[str, int] = field(default_factory=dict)
    most: Mapping[str, int] = field(default_factory=dict)  # predicted: but for buffers

    @property
    def peak_bytes(self) -> int:
        """Sum over categories at the peak."""
        return sum(self.at_peak.values())
