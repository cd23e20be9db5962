"""The C heap of a rank: freed memory stays with the process.

Every step frees and asks again for the same activations and gathered weights. Glibc hands large blocks back
to the kernel, which gives them out again page by page, zeroed: 50 to 190 thousand page faults a step of a 30M
model, 2 to 5 % of it on one rank and more where weights are gathered. What a rank needs at its peak it
will need in the next step too.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # malloc.h
ALWAYS = (1 << 31) - 1


def keep_freed_memory() -> None:
    """Tells glibc to serve large blocks from the heap and not to shrink it; elsewhere nothing."""
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(TRIM_THRESHOLD, ALWAYS)
        libc.mallopt(TOP_PAD, 1 << 26)
