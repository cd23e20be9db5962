"""Lines below what a block takes for a microbatch of any size, from one that is endless:

    seconds of s samples  >=  start + s / ENDLESS * grow

Each kernel is started, and each collective that compute waits for has its latency, however few the samples:
what an endless microbatch takes beside those grows at least as fast as the samples do. A weight's gradient is
read and written as it grows: a line of the weight half takes such kernels for what that takes, where it is
more than their share of the endless time, for each of some sizes (TANGENTS); a last line none of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from partita.cost.kernels import Kernel, kernel_seconds, launches
from partita.cost.machine import Machine, Software
from partita.parallel.laid import Laid
from partita.parallel.read import Call
from partita.simulate.stage import Part, StageTime, call_seconds, hides
from partita.simulate.started import call_times, kernel_times
from partita.simulate.work import STATE_BYTES

TANGENTS = (1, 4)  # samples
NONE = (0.0,) * 11


def lines_of(
    part: Part, took: StageTime, samples: int, laid: Laid, machine: Machine
) -> tuple[float, ...]:
    """Of forward, input half and three of weight half what starts, then what grows, in seconds of a
    microbatch of so many samples, which took so long; and of what rows travel what starts, as `Cost.lines`
    has them. Backward waits in its weight half."""
    if machine.cluster.piece_seconds is not None or machine.class_ == "CPU":
        return NONE
    era, work = machine.software, part.work
    launch_s = machine.constants.launch_s
    forward, waits, travel = _latencies(part, laid, machine)
    forward += launch_s * _launches(work.forward, era)
    back = launch_s * _launches((*work.input, *work.again), era)
    weight = waits + launch_s * _launches(work.weight, era)
    there, here = took.paths_s
    grows = here - took.input_s - weight
    lines, grown = [(weight, grows)], _grown(work.weight, machine)
    for size in TANGENTS:
        flat = [
            (moves, seconds)
            for kernel, moves in grown
            if moves > size / samples * (seconds := kernel_seconds(kernel, machine))
        ]
        start, grow = (sum(x) for x in zip(*flat, strict=True)) if flat else (0.0, 0.0)
        lines.append((weight + start, grows - grow))
    starts, growing = zip(*lines, strict=True)
    return forward, back, *starts, there - forward, took.input_s - back, *growing, travel


def _latencies(part: Part, laid: Laid, machine: Machine) -> tuple[float, float, float]:
    """Of the collectives that compute waits for, forward and backward; of them those that move rows."""
    known = dict[tuple[object, ...], float]()
    forward, backward, travel = 0.0, 0.0, 0.0
    for call in part.calls:
        if not _is_waited_for(call, machine.software):
            continue
        key = call.axes, call.collective
        if key not in known:
            known[key] = call_seconds(replace(call, bytes=0), laid, machine)
        seconds = call_times(call, machine.software) * part.times_of(call) * known[key]
        forward += seconds if call.phase == "F" else 0.0
        backward += 0.0 if call.phase == "F" else seconds
        travel += seconds if call.axes == ("ep",) else 0.0
    return forward, backward, travel


def _grown(kernels: Iterable[Kernel], machine: Machine) -> list[tuple[Kernel, float]]:
    """Kernels that add to gradients as large as their weights, with the seconds that this takes
    (simulate/work.py); none where another kernel adds."""
    if machine.software.added_bytes:
        return []
    rate = machine.memory_rate / STATE_BYTES
    return [(k, k.m * k.n * k.count / rate) for k in kernels if k.adds]


def _launches(kernels: Iterable[Kernel], era: Software) -> float:
    return sum(kernel_times(k, era) * launches(k, era) for k in kernels)


def _is_waited_for(call: Call, era: Software) -> bool:
    """Whether nothing of its lane ever runs beside compute."""
    if call.parts > 1:
        return False
    if call.lane == "ep":
        return not era.overlaps_exchanges
    return call.lane == "tp" and not hides(call)
