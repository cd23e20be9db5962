"""Regions: conjugate autograd pairs that only move data (Megatron-LM's f and g, and their sp forms).

    kind          forward               backward
    identity      x                     dx
    copy_to       x                     all_reduce(dx)
    reduce_from   all_reduce(x)         dx
    gather_from   all_gather(x, seq)    reduce_scatter(dx, seq)
    scatter_to    reduce_scatter(x, seq)  all_gather(dx, seq)

A module asks for the region at a site and is given what the laid program says there, so it cannot choose
another collective. seq is dim 1 of [batch, seq, hidden]; channels of images lie elsewhere, and `dim` says
which one is gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from partita.comm.context import Context
from partita.comm.protocol import Comm, Done, Handle
from partita.comm.single import SingleComm
from partita.spec.program import Block, Op

SEQ = 1
OF_ROWS = ("halo", "gather_map")  # kinds of cp/rows.py, which stand beside others behind one op


@dataclass(eq=False)
class Tape:
    """Results of one block's regions, kept so that a replay need not move them again; numbers that the host
    was told are beside them.

    `brought` and `told` are written while `writing`, read in the same order while `reading`."""

    brought: list[Tensor] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)
    writing: bool = False
    reading: bool = False

    def known(self, bring: Callable[[], Tensor]) -> Tensor:
        """What was kept, or what `bring` brings, which is kept."""
        if self.reading:
            return self.brought.pop(0)
        y = bring()
        if self.writing:
            self.brought.append(y)
        return y

    def answer(self, ask: Callable[[], Any]) -> Any:
        """The same of numbers."""
        if self.reading:
            return self.told.pop(0)
        found = ask()
        if self.writing:
            self.told.append(found)
        return found


@dataclass(frozen=True)
class Unplayed:
    """An op that a replay of its layer leaves out: what it made is `kept` on the tape, or nobody wants it."""

    tape: Tape
    kept: bool = False

    @property
    def is_known(self) -> bool:
        """Whether a replay asks for what was kept."""
        return self.kept and self.tape.reading

    @property
    def is_needless(self) -> bool:
        """Whether a replay asks, and may be given anything."""
        return not self.kept and self.tape.reading

    def made(self, make: Callable[[], Tensor]) -> Tensor:
        """What it made."""
        return self.tape.known(make) if self.kept else make()


@dataclass(frozen=True)
class Region:
    """One region bound to its Comm and site. Forward and backward are plain calls, for functions that
    overlap them with a matmul; `Region.apply` is the autograd pair. `tape`: the plan keeps its result
    for the replay."""

    kind: str
    comm: Comm
    site: str
    tape: Tape | None = None
    dim: int = SEQ

    @property
    def is_known(self) -> bool:
        """Whether forward will hand out a result that was kept, whatever it is given."""
        return self.tape is not None and self.tape.reading

    def forward(self, x: Tensor) -> Tensor:
        """Moves a value."""
        return x if self.kind == "identity" else self.known(lambda: self.start_forward(x).wait())

    def known(self, bring: Callable[[], Tensor]) -> Tensor:
        """What was kept of what it brought, or what it brings, which is kept where the plan says so."""
        return bring() if self.tape is None else self.tape.known(bring)

    def told(self, ask: Callable[[], Any]) -> Any:
        """The same of numbers for the host."""
        return ask() if self.tape is None else self.tape.answer(ask)

    def start_forward(self, x: Tensor) -> Handle:
        """Starts to move a value."""
        if self.kind == "reduce_from":
            return self.comm.start_all_reduce(x, site=self.site)
        if self.kind == "gather_from":
            return self.comm.start_all_gather(x, site=self.site, dim=self.dim)
        if self.kind == "scatter_to":
            return self.comm.start_reduce_scatter(x, site=self.site, dim=self.dim)
        return Done(x)

    def start_backward(self, dx: Tensor) -> Handle:
        """Starts to move a gradient."""
        if self.kind == "copy_to":
            return self.comm.start_all_reduce(dx, site=self.site)
        if self.kind == "gather_from":
            return self.comm.start_reduce_scatter(dx, site=self.site, dim=self.dim)
        if self.kind == "scatter_to":
            return self.comm.start_all_gather(dx, site=self.site, dim=self.dim)
        return Done(dx)

    def backward(self, dx: Tensor) -> Tensor:
        """Moves a gradient."""
        return dx if self.kind == "identity" else self.start_backward(dx).wait()

    def shape_after(self, shape: torch.Size) -> torch.Size:
        """The shape of what forward returns."""
        sizes = list(shape)
        if self.kind == "gather_from":
            sizes[self.dim] *= self.comm.size
        elif self.kind == "scatter_to":
            sizes[self.dim] //= self.comm.size
        return torch.Size(sizes)

    def __call__(self, x: Tensor, needless: bool = False) -> Tensor:
        """The autograd pair on x. `needless`: nobody reads the result, whose values may be arbitrary."""
        if self.kind == "identity":
            return x
        return Move.apply(x, self, needless and self.tape is None)  # type: ignore[return-value]


class Move(torch.autograd.Function):
    """Forward: region.forward. Backward: region.backward, its conjugate."""

    @staticmethod
    def forward(ctx, x: Tensor, region: Region, needless: bool = False) -> Tensor:
        """Moves the value, unless it is needless; keeps nothing."""
        ctx.region = region
        return x.new_empty(region.shape_after(x.shape)) if needless else region.forward(x)

    @staticmethod
    def backward(ctx, dx: Tensor) -> tuple[Tensor, None, None]:
        """Moves the gradient."""
        return ctx.region.backward(dx), None, None


IDENTITY = Region("identity", SingleComm("none"), "")


class Regions:
    """The regions of one laid block by the op behind which they stand; those whose results the block
    keeps share its `tape`."""

    def __init__(self, block: Block, name: str, context: Context) -> None:
        found: dict[str, Region] = {}
        kinds: dict[str, list[Region]] = {}
        self.tape = Tape()
        for op in block.ops():
            if op.is_region:
                writer, _, kind = op.name.partition(":")
                site = op.name if writer.startswith(f"{name}.") else f"{name}.{op.name}"
                comm = context.comm(*op.axes, lane=op.lane)
                tape = self.tape if op.writes in block.kept else None
                region = Region(kind, comm, site, tape, _moved(block, op))
                if kind not in OF_ROWS:
                    found[writer] = region if comm.size > 1 else IDENTITY
                kinds.setdefault(kind, []).append(region)
        self._at: Mapping[str, Region] = found
        self._kinds: Mapping[str, list[Region]] = kinds

    def at(self, op: str) -> Region:
        """The region behind `op` ('attention.wo'), or the identity."""
        return self._at.get(op, IDENTITY)

    def of(self, kind: str) -> tuple[Region, ...]:
        """The regions of a kind, in program order."""
        return tuple(self._kinds.get(kind, ()))


def _moved(block: Block, op: Op) -> int:
    """The dim that a region's axes cut on one side of it alone."""
    x, y = (block.tensors[n].dims for n in (op.reads[0], op.writes))
    both = enumerate(zip(x, y, strict=False))
    return next((i for i, (a, b) in both if a.cut != b.cut), SEQ)
