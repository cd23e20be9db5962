"""How long a rank waits for another: counted in looks that were made, not on the clock alone.

A run that is stopped as a whole (Ctrl-Z, a laptop's lid, a notebook's kernel) has lost nobody: what passed
meanwhile is no time in which a peer could have come.
"""

from __future__ import annotations

import time

STALL_S = 1.0  # a look that takes longer counts as that: this process did not run


class Patience:
    """`timeout_s` of waiting, from now on. Whoever waits asks after each of its looks, which are shorter
    than STALL_S."""

    def __init__(self, timeout_s: float) -> None:
        self.left_s, self._last = timeout_s, time.monotonic()

    def is_over(self) -> bool:
        """Whether the peer has had its time."""
        now = time.monotonic()
        self.left_s -= min(now - self._last, STALL_S)
        self._last = now
        return self.left_s <= 0
