"""Seconds of compute by a plain roofline: an op takes what binds, its FLOPs or its bytes.

    seconds = launch + max(flops / rate(dtype), bytes / memory rate)

Rates are the cluster's: published peaks, or what `partita calibrate` measured on this machine. The model
is false where a matmul is too small to fill the device, or caches hold an operand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rates:
    """What one device does alone: FLOP/s by dtype, bytes/s of its memory, seconds a launch."""

    flops_per_s: Mapping[str, float]
    bytes_per_s: float
    launch_s: float = 0.0

    def of(self, dtype: str) -> float:
        """FLOP/s of a dtype; one that is not stated runs at the nearest wider one's, fp64 at half."""
        for name in (dtype, *_WIDER.get(dtype, ())):
            if name in self.flops_per_s:
                return self.flops_per_s[name]
        if dtype == "fp64":
            return self.of("fp32") / 2
        return max(self.flops_per_s.values())

    def seconds(self, flops: float, num_bytes: float, dtype: str) -> float:
        """The roofline of one op."""
        work = flops / self.of(dtype) if flops else 0.0
        return self.launch_s + max(work, num_bytes / self.bytes_per_s)


_WIDER = {
    "bf16": ("fp16", "tf32", "fp32"),
    "fp16": ("bf16", "tf32", "fp32"),
    "fp8": ("bf16", "fp16"),
    "fp32": ("tf32",),
}
