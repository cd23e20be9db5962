"""Numbers of the cost model that no first principle, data sheet or source code gives, that hold for every
device and program, and that no fit moves.

Beside them stand the constants of a device and of a software era (constants.toml): `partita validate` prints
all of them, and docs/validation.md; a test holds that no other file of the cost model has one.
"""

from __future__ import annotations

TILE = 0.4
RAMP = 96
WEIGHT_WELL = 0.87
UNALIGNED = 0.52
DIAGONAL = 128
OLD_UNITS = 0.63
SLOW = 0.2
BASE, HOP = 3.0, 0.3
FILL = 0.4
HOST_S = 5e-5
RESTART = 8
LEDGER = 0.05
FRAGMENTATION = 0.08
CONTEXT_BYTES = (0.3e9, 1.5e9)

# Where each comes from
READ = "read off published steps, as the constants of a device are, but for all of them"
OTHERS = "measured by others, or follows from how the device works"
GUESS = "an era's first guess, beside its own constant"
MEMORY = "of memory's interval: in no step"
SAYS = {
    "TILE": (READ, "exponent: how a tile does, by its FLOPs a byte of operands beside the largest tile's"),
    "RAMP": (OTHERS, "elements of k that filling and draining a matmul's tile takes: three stages of 32"),
    "WEIGHT_WELL": (
        OTHERS, "of a matmul's rate, by weight gradients, which read operands across (korthikanti-t4)",
    ),
    "UNALIGNED": (
        READ, "of a matmul's rate, where rows begin between multiples of 4 bytes (vtrain-single, tp 1)",
    ),
    "DIAGONAL": (OTHERS, "keys of a tile of fused attention, which on the diagonal is computed whole"),
    "OLD_UNITS": (
        OTHERS, "of fused attention's rate after Ampere, by kernels of Ampere's instructions: mma.sync"
        " reaches so much of Hopper's peak (Luo et al. 2024, 2402.13499)",
    ),
    "SLOW": (
        OTHERS, "of a hidden collective's time is lost by the compute beside it: NCCL's 24 channels, each on"
        " a compute unit, of 108 to 148",
    ),
    "BASE": (OTHERS, "latencies of its link that a collective takes beside its hops (nccl-tests, A100)"),
    "HOP": (OTHERS, "latencies of its link that a hop takes (nccl-tests, A100)"),
    "FILL": (OTHERS, "a ring of n ranks in a node reaches n / (n + this) of the link (nccl-tests, A100)"),
    "HOST_S": (GUESS, "seconds of the host a kernel, where it launches each"),
    "RESTART": (GUESS, "kernels' worth of host time from a message to the next, where it waited for it"),
    "LEDGER": (MEMORY, "of the memory's peak, either way (tests/local/test_measured_memory.py)"),
    "FRAGMENTATION": (MEMORY, "of the memory's peak, at most, lies in blocks that do not fit again"),
    "CONTEXT_BYTES": (MEMORY, "of CUDA's context and NCCL's channels, at least and at most"),
}  # fmt: skip


def told() -> dict[str, tuple[object, str, str]]:
    """Each with where it comes from and what it says."""
    return {name: (globals()[name], *text) for name, text in SAYS.items()}
