"""Packed documents: attention within each document only, so every microbatch costs what its documents do.

    share of a sequence = sum over its documents of l (l + 1) / 2   over   L (L + 1) / 2
    where tokens attend both ways                     of l^2         over   L^2

of fused attention's seconds, forward and backward; the rest of the step does not change. The first
step's microbatches are played with their own durations on every replica; replicas meet at its end. Under
context parallelism the share is taken to lie evenly over the ranks. Explicit attention computes its whole
square whatever the documents are.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from partita.base.errors import DataError
from partita.cost.kernels import kernel_seconds
from partita.cost.machine import Machine
from partita.schedule.order import turns
from partita.simulate.jitter import played
from partita.simulate.predict import Prediction
from partita.simulate.stage import Work
from partita.simulate.unequal import machine_at
from partita.spec.job import Job

if TYPE_CHECKING:
    import numpy as np


def sequence_shares(documents: np.ndarray, seq_len: int, causal: bool = True) -> np.ndarray:
    """The share of whole attention of each sequence of so many tokens, from the documents' ids by
    token, in order."""
    import numpy as np

    whole = len(documents) // seq_len
    ids = documents[: whole * seq_len].reshape(whole, seq_len)
    starts = np.ones_like(ids, dtype=bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = np.arange(seq_len)
    first = np.maximum.accumulate(np.where(starts, place, 0), axis=1)
    before = (place - first).sum(axis=1)  # pairs of two tokens; each way one
    ways = 1 if causal else 2
    return (ways * before + seq_len) / (seq_len + ways * (seq_len * (seq_len - 1) / 2))


def microbatch_shares(job: Job) -> np.ndarray:
    """[microbatch, replica] of the first step, from the job's file of documents. Raises DataError."""
    import numpy as np

    path = Path(job.data.documents or "")
    try:
        documents = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {error}") from None
    length, batch = job.train.seq_len, job.train.global_batch_size
    sequences = max((len(documents) - 1) // length, 1)
    needed = np.asarray(documents[: min(sequences, batch) * length])
    share = sequence_shares(needed, length, job.model.causal)
    if not len(share):
        raise DataError(f"{path}: {len(documents)} tokens are less than one sequence of {length}")
    each = share[np.arange(batch) % len(share)]
    m, dp = job.plan.num_microbatches, job.plan.data_parallel_size
    return each.reshape(m, dp, -1).mean(axis=2)


def attention_seconds(work: Work, machine: Machine) -> dict[str, float]:
    """Seconds of fused attention in one microbatch of a stage: F, and B with what it plays again."""
    found = {"F": 0.0, "B": 0.0}
    for part in work.parts:
        again = part.work.again
        if machine.software.replays_layers and part.unplayed is not None:
            again = part.work.forward
        for phase, kernels in (("F", part.work.forward), ("B", (*part.work.input, *again))):
            fused = (k for k in kernels if k.kind == "attention")
            found[phase] += part.times * sum(kernel_seconds(k, machine) for k in fused)
    return found


def outlook(p: Prediction) -> dict[str, Any]:
    """The answer's `packed`: attention's share, and the step that its microbatches make."""
    assert p.job is not None and p.timed is not None and p.schedule is not None
    assert p.step_time_s is not None and p.laid is not None
    t, share = p.timed, microbatch_shares(p.job)
    stages = zip(t.works.stages, p.laid.stages, strict=True)
    saved = [attention_seconds(w, machine_at(p.laid, s.places, t.machine)) for w, s in stages]

    def seconds(stage: int, kind: str, microbatch: int) -> Any:
        whole = t.costs.stages[stage].of(kind)
        phase = {"F": "F", "B": "B", "I": "B"}.get(kind)
        if phase is None:
            return whole
        return whole - (1 - share[microbatch]) * saved[stage][phase] * t.busy

    order = turns(p.schedule)
    ends = played(order, (seconds(*turn.action) for turn in order), t.costs)
    alike = played(
        order, (t.costs.stages[x.action.stage].of(x.action.kind) for x in order), t.costs
    )
    step_s = p.step_time_s - t.pipeline_s * (1 - float(ends.max()) / float(alike))
    return {
        "attention_share": {"mean": float(share.mean()), "max": float(share.max())},
        "step_time_s": step_s,
    }
