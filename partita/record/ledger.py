"""A Ledger is bytes by category in one arena of one rank, at the moment of its peak."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "buffers", "untagged")


@dataclass(frozen=True)
class Ledger:
    """Bytes held by one rank in one arena (device, host or disk), predicted or measured.

    `at_peak` holds the categories at the moment their sum was largest; `peak_bytes` is that sum.
    optimizer = moments and fp32 masters; buffers = gathered parameters, communication buffers and
    the loss's scratch; untagged = measured storages that nobody claimed (zero when predicted).
    """

    rank: int
    arena: str = "device"
    at_peak: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """Sum over categories at the peak."""
        return sum(self.at_peak.values())
