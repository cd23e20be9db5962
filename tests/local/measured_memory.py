"""Trains three steps of a job on one rank, then prints how much ledger and C allocator grew, as JSON."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import torch
import torch._dynamo  # torch.optim loads it with its first optimizer; a run's ranks have it beforehand

from partita.comm.single import SingleWorld
from partita.spec.job import Job
from partita.train.build import assemble
from partita.train.recorder import StepRecorder


class MallInfo2(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
        "fordblks", "keepcost",
    )]  # fmt: skip


LIBRARY = ctypes.CDLL(None)
LIBRARY.mallinfo2.restype = MallInfo2


def in_use() -> int:
    """Bytes handed out by malloc, from its arenas and mapped."""
    info = LIBRARY.mallinfo2()
    return info.uordblks + info.hblkhd


def main(job: Job, folder: Path) -> None:
    torch.set_num_threads(1)
    before = in_use()
    built = assemble(job, SingleWorld())
    recorder = StepRecorder(built, folder, 3)
    peaks = {}

    def note() -> None:
        if recorder.allocations.total >= max(peaks, default=0):
            peaks[recorder.allocations.total] = in_use()

    recorder.allocations.on_peak = note
    for step in range(3):
        with recorder.step(step):
            built.model.forward_backward(built.batch(step))
            built.update.step()
    largest = max(peaks)
    ledger = recorder.record.ledger
    found = {"ledger": largest, "malloc": peaks[largest] - before, "at_peak": dict(ledger.at_peak)}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Job.load(json.loads(sys.argv[1])), Path(sys.argv[2]))
