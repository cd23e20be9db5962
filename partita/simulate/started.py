"""What programs of an era start for a kernel or a call of a block, and how long that takes.

A graph of kernels (CUDA graphs, a compiled program) takes no host; one that holds a layer but for what lies
between its router and where rows are added leaves those kernels to the host, which knows how many rows each
expert has only when the device does: it starts none of them before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from partita.cost.empirical import HOST_S
from partita.cost.kernels import Kernel, kernel_seconds, launches
from partita.cost.machine import Machine, Software
from partita.cost.pieces import BACK
from partita.parallel.read import Call
from partita.simulate.work import STATE_BYTES, BlockWork
from partita.spec.program import Block

UNFUSED = {
    "F": (3, 4, 4, 4, 3),
    "B": (3, 6, 4, 4, 3),
}  # passes over 16-bit scores of each kernel of an unfused softmax
UNFUSED_LOSS = {
    "F": (8, 8, 8, 8),
    "I": (8, 6),
}  # bytes a logit: widened, less the wide maximum, exponentials, over their sum; scaled, narrowed
# of eager PyTorch: kernels, and bytes an element, of a norm in 32 bits (widened, squared, averaged, scaled,
# narrowed, times its weights), a rotation (complex numbers in 32 bits), and a gate; forward, backward
OP_BY_OP = {
    "norm": ((6, 36), (9, 76)), "rotate": ((3, 20), (3, 20)), "gate": ((2, 10), (3, 18)),
}  # fmt: skip
# kernels that Megatron-Core starts for an op beside those priced here, forward and backward, where nothing
# captures them: router.py, moe_utils.py (top-k, masks and maps of it, the balance loss and its tracking),
# token_dispatcher.py (counts, masked selections, chunks put in order), multi_latent_attention.py (a rotation
# of halves, parts joined and laid side by side), as they stood in the spring of 2025; each small
SMALL = {
    "router.gate": (2, 2), "router.scores": (1, 1), "router.choose": (37, 19), "dispatch.count": (12, 0),
    "dispatch.send": (15, 10), "combine.sum": (5, 5),
}  # fmt: skip
SMALL_LATENT = {"attention.rope_q": (11, 11), "attention.rope_k": (14, 14)}
FRESH_BYTES = 2  # of a gradient that a 16-bit matmul writes
GATES = (
    "gate",
    "gate" + BACK,
)  # the piece that an activation of (gate, up) is, forward and backward


def host_seconds(started: Kernel | Call, machine: Machine) -> float:
    """Seconds of the host for a kernel or a call. Of kernels that one call of the program starts, as those of
    experts one by one, each further one takes what starting a kernel does."""
    era, more = machine.software, 0
    if isinstance(started, Kernel):
        routed, more = started.routed, launches(started, era) - 1
    else:
        routed = is_exchange(started)
    call_s = HOST_S if routed and era.starts_experts else era.host_s
    return call_s + more * machine.constants.launch_s if call_s else 0.0


def small_kernels(block: Block) -> tuple[int, int]:
    """How many small kernels Megatron-Core starts for a block beside those priced, forward and backward."""
    names = [op.name for op in block.ops()]
    known = SMALL | (SMALL_LATENT if "attention.kv_a" in names else {})
    each = [known[name] for name in names if name in known]
    return sum(f for f, _ in each), sum(b for _, b in each)


def kernel_times(kernel: Kernel, era: Software) -> float:
    """How many times as long a kernel takes in a program of the era."""
    return era.experts if kernel.routed and kernel.kind != "matmul" else 1.0


def call_times(call: Call, era: Software) -> float:
    """How many times as long a call takes in a program of the era."""
    return era.experts if is_exchange(call) else 1.0


def is_exchange(call: Call) -> bool:
    """Whether it moves rows to experts, or back."""
    return call.axes == ("ep",) and call.collective == "all_to_all"


def started_kernels(kernels: Iterable[Kernel], part: str, era: Software) -> list[Kernel]:
    """What a program of the era starts for the kernels of a block's forward ('F'), or of a half of its
    backward. Where experts' matmuls are one kernel that activates what it made and writes it in 8 bits, no
    other kernel does."""
    found: list[Kernel] = []
    activated = False
    for k in kernels:
        gate = era.fuses_experts and k.routed and any(name in GATES for name, _ in k.pieces)
        if not (gate or (activated and k.kind == "cast")):
            found += unfused_kernels(k, part, era)
        activated = gate
    return found


def unfused_kernels(kernel: Kernel, part: str, era: Software) -> Sequence[Kernel]:
    """A softmax whose matrices do not come in the number that a fused kernel works on (0: nothing does) is
    five kernels: widened to fp32, scaled, masked, normalised, narrowed; and their backward. A loss that is
    not fused (Megatron-LM's mpu/cross_entropy.py) passes over its logits in fp32 step by step. A weight's
    gradient that its matmul does not add to those before it is written, then added."""
    if kernel.adds and era.added_bytes:
        elements = kernel.m * kernel.n * kernel.count
        alone = replace(kernel, bytes=kernel.bytes - (STATE_BYTES - FRESH_BYTES) * elements)
        return alone, Kernel("memory", float(era.added_bytes * elements), dtype=kernel.dtype)
    if (
        era.eager
        and kernel.pieces
        and all(n.removesuffix(BACK) in era.eager for n, _ in kernel.pieces)
    ):
        return [k for name, size in kernel.pieces for k in _op_by_op(kernel, name, size)]
    if kernel.kind == "cast":
        return (replace(kernel, bytes=float(era.cast_bytes * kernel.m)),)
    if kernel.kind == "loss" and not era.fuses_loss:
        steps = UNFUSED_LOSS["I" if part == "I" else "F"]
        return [replace(kernel, kind="memory", bytes=float(n * kernel.m)) for n in steps]
    if kernel.kind != "softmax" or (era.softmax_of and kernel.m % era.softmax_of == 0):
        return (kernel,)
    passes, scores = UNFUSED["B" if part == "I" else "F"], kernel.bytes / (3 if part == "I" else 2)
    return [replace(kernel, kind="memory", bytes=n * scores) for n in passes]


def _op_by_op(kernel: Kernel, piece: str, size: float) -> list[Kernel]:
    """The kernels that eager PyTorch starts for a piece of so many elements."""
    times, moved = OP_BY_OP[piece.removesuffix(BACK)][piece.endswith(BACK)]
    return [replace(kernel, bytes=moved * size / times, pieces=())] * times


@dataclass(frozen=True, slots=True)
class Ran:
    """What a machine runs `of` some kernels: those that it starts, kind and seconds of each, seconds of all,
    and of the host."""

    machine: Machine
    of: Sequence[Kernel]
    kernels: list[Kernel]
    each: list[tuple[str, float]]
    seconds: float
    host_s: float


def ran_kernels(work: BlockWork, kernels: Sequence[Kernel], part: str, machine: Machine) -> Ran:
    """Prices a part of a block's work, which remembers what its last machine took: what is made again changes
    nothing of the rest."""
    key = part, id(kernels)  # which are kept
    known = work.known.get(key)
    if isinstance(known, Ran) and known.machine is machine:
        return known
    era = machine.software
    started = started_kernels(kernels, part, era)
    each = [(k.kind, kernel_times(k, era) * kernel_seconds(k, machine)) for k in started]
    host_s = sum(host_seconds(k, machine) for k in started)
    found = Ran(machine, kernels, started, each, sum(s for _, s in each), host_s)
    work.known[key] = found
    return found


def host_of(ran: Mapping[str, Ran], small: tuple[int, int], era: Software) -> dict[str, float]:
    """Seconds of the host for a block's kernels, forward and backward; its calls not counted."""
    forward, backward = small if era.small_kernels else (0, 0)
    back = sum(x.host_s for part, x in ran.items() if part != "F")
    return {"F": ran["F"].host_s + forward * era.host_s, "B": back + backward * era.host_s}
