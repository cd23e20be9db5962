"""The C heap of a rank: freed memory stays with the process, in huge pages where Linux lets a program ask.

Every step frees and asks again for the same activations and gathered weights. Glibc hands large blocks back
to the kernel, which gives them out again page by page, zeroed: 50 to 190 thousand page faults a step of a 30M
model, 2 to 5 % of it on one rank and more where weights are gathered. What a rank needs at its peak it
will need in the next step too.

A step's memory is more pages of 4 KB than a core keeps addresses of. Linux gives pages of 2 MB to who asks
by madvise (`transparent_hugepage/enabled`; with `always` all have them, with `never` nobody). Glibc's heap
grows piece by piece, and nothing asks for what it will grow by: so its addresses are taken at the start.
Memory is what is touched, rounded up to 2 MB where the heap ends.
"""

from __future__ import annotations

import ctypes
import os
import resource
from contextlib import suppress
from pathlib import Path

TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD = -1, -2, -3  # malloc.h
NEVER = -1
MADV_HUGEPAGE = 14
HUGE = 1 << 21
BLOCK = 1 << 29  # below the threshold, so that glibc takes it from the heap
KERNEL = Path("/sys/kernel/mm/transparent_hugepage")
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


def keep_freed_memory() -> None:
    """Tells glibc to serve large blocks from the heap, not to shrink it, and Linux to use huge pages
    there; elsewhere nothing. For a process's main thread: others have heaps of their own."""
    with suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        whole = libc.mallopt(MMAP_THRESHOLD, 2 * BLOCK)  # an old glibc takes no more than 32 MB
        libc.mallopt(TRIM_THRESHOLD, NEVER)
        libc.mallopt(TOP_PAD, 1 << 26)
        if whole and asks_for_huge_pages():
            _take_addresses(libc, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)


def addresses_are_limited() -> bool:
    """Whether this process may take only so many (`ulimit -v`, `-d`)."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    return any(limit != resource.RLIM_INFINITY for limit in limits)


def asks_for_huge_pages(
    kernel: Path = KERNEL, overcommit: Path = OVERCOMMIT, limited: bool | None = None
) -> bool:
    """Whether pages of 2 MB are for who asks, and addresses cost nothing: they are not limited, nor
    counted as memory (vm.overcommit_memory = 2). Raises OSError where this is no Linux."""
    return (
        "[madvise]" in (kernel / "enabled").read_text()
        and int((kernel / "hpage_pmd_size").read_text()) == HUGE  # larger where pages are of 64 KB
        and overcommit.read_text().strip() != "2"
        and not (addresses_are_limited() if limited is None else limited)
    )


def _take_addresses(libc: ctypes.CDLL, size: int) -> None:
    """Grows the heap by about `size` bytes of address, which it keeps as its free end."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = -(-libc.sbrk(0) // HUGE) * HUGE
    blocks = [libc.malloc(BLOCK) for _ in range(size // BLOCK)]
    end = libc.sbrk(0) // HUGE * HUGE
    if end > start:
        libc.madvise(start, end - start, MADV_HUGEPAGE)
    for block in reversed(blocks):
        libc.free(block)
