"""Opens a runner: a checkpoint or a Hugging Face folder on the ranks of a plan line.

with closing(open_runner("runs/mine", "tp2", pages=256)) as runner:
    logits = runner.run([Piece(tokens=(5, 7, 9), start=0, pages=(0,))])    # [1, vocab]

One rank is the thread that calls it; several are threads of this process ("local") or processes of this
host ("processes").
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from partita.base.errors import UsageError
from partita.base.units import format_bytes
from partita.comm.single import SingleWorld
from partita.parallel.laid import lay
from partita.serve.part import STEP_S, Opening, Part
from partita.serve.piece import Pending, Piece, Room, Runner
from partita.serve.ranks import Processes, RanksRunner, Threads
from partita.serve.weights import found
from partita.simulate.serving.kept import page_bytes
from partita.simulate.serving.served import request_of
from partita.spec.plan import Plan

Backend = Literal["local", "processes"]
TOKENS = 32_768  # that pages hold, where nothing is said
__all__ = ["Pending", "Piece", "Room", "Runner", "SingleRunner", "open_runner"]


class Ready:
    """A step that is done."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def result(self) -> Tensor:
        """Its logits."""
        return self._logits


class SingleRunner:
    """A runner of one rank, which is the thread that calls it."""

    def __init__(self, opening: Opening) -> None:
        if opening.ranks > 1:
            raise UsageError(
                f"{opening.request.plan} has {opening.ranks} ranks, here is one", key="plan"
            )
        self._room = room = opening.room
        self.vocab, self.max_len = room.vocab, room.max_len
        self.pages, self.page_size = room.pages, room.page_size
        self.depth = 1
        self._part: Part | None = Part(opening, SingleWorld())

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """One step; see Runner."""
        self._room.require(pieces)
        if self._part is None:
            raise UsageError("the runner is closed")
        logits = self._part.run(pieces)
        assert logits is not None
        return logits.cpu()

    def start(self, pieces: Sequence[Piece]) -> Ready:
        """As run, which is done at once."""
        return Ready(self.run(pieces))

    def close(self) -> None:
        """Lets go of weights and pages."""
        self._part = None


def open_runner(
    folder: str | Path,
    plan: str | Plan = "",
    *,
    pages: int | None = None,
    memory: int | None = None,
    page_size: int = 16,
    dtype: str = "fp32",
    backend: Backend = "local",
    device: str = "cpu",
    step_s: float = STEP_S,
) -> Runner:
    """A model on the ranks of a plan. `pages`, or bytes of `memory` for them on every rank; left out, four
    sequences of the model's longest, or TOKENS, whichever is less. No sequence is longer than all pages.
    `step_s`: a rank for which another waits longer is lost.

    Raises CheckpointError for a folder that is none, UsageError and PlanError for a plan that cannot be."""
    spec, weights = found(folder)
    stated = Plan.parse(plan) if isinstance(plan, str) else plan
    request = request_of(spec, stated, dtype)
    if page_size < 1:
        raise UsageError(f"a page of {page_size} tokens: it holds at least 1", key="page_size")
    if pages is None and memory is not None:
        one = page_bytes(lay(request), page_size)
        pages = memory // one
        if not pages:
            raise UsageError(
                f"{format_bytes(memory)} hold no page of keys and values, which takes {format_bytes(one)} on "
                f"a rank of {request.plan}",
                key="memory",
            )
    if pages is None:
        pages = -(-min(4 * spec.max_seq_len, TOKENS) // page_size)
    if pages < 1:
        raise UsageError(f"{pages} pages: at least 1 is wanted", key="pages")
    return started(Opening(request, weights, pages, page_size, device, step_s), backend)


def started(opening: Opening, backend: Backend = "local") -> Runner:
    """The runner of an opening; returns when all ranks have their weights."""
    if backend not in ("local", "processes"):
        raise UsageError(f"'{backend}' is neither local nor processes", key="backend")
    if opening.ranks == 1:
        return SingleRunner(opening)
    return RanksRunner(opening, (Threads if backend == "local" else Processes)(opening))
