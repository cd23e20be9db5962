"""What every Comm can do: one group of ranks, one axis, one lane.

A collective returns a new tensor, or a Handle when it is started with `start_...`; `Handle.wait()`
means "work issued after this on the current lane sees the result" and never blocks a CUDA host. The
handle keeps the buffers alive until then. All ranks of a group issue a lane's collectives in one
order. Collectives never modify their argument, unless they are told to write there: `out` of the started
ones takes the result, and may be the argument or a part of it. Sums go in rank order where the
implementation can (local, shm, single), so that a run repeats bit for bit.

Every call names its `site` ('blocks.3.attention.wo:reduce_from'): the recorder writes it, and an
error shows it. The phase and the step come from `Where`, which the executor moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

ReduceOp = Literal["sum", "max"]


@dataclass(slots=True)
class Where:
    """Where a rank is in its step; moved by the executor, read by recorders and error messages."""

    step: int = 0
    phase: str = "F"  # F B I W step
    stage: int = -1
    microbatch: int = -1
    activity: str = "starting"  # "data", "forward", "backward", "optimizer", "checkpoint", ...
    arena: str = "device"  # of the memory being allocated

    @contextmanager
    def on(self, arena: str) -> Iterator[None]:
        """For memory of another arena than the device's."""
        before, self.arena = self.arena, arena
        try:
            yield
        finally:
            self.arena = before

    @contextmanager
    def at(self, phase: str) -> Iterator[None]:
        """For what belongs to another phase than the one under way."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before


@dataclass(frozen=True, slots=True)
class Key:
    """Names a point-to-point message: what it is, for which stage's consumption, which microbatch.

    kind is F (an activation going to `stage`) or B (a gradient going to `stage`); `slot` counts
    tensors of one message.
    """

    kind: str
    stage: int
    microbatch: int
    slot: int = 0


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> Tensor:
        """The result; later work on this lane sees it. May be called once or more."""
        ...


class Sent(Handle, Protocol):
    """A message under way, which holds what was sent until it is waited for."""

    @property
    def has_gone(self) -> bool:
        """Whether nothing need be held any longer and `wait` returns at once; asks, never waits."""
        ...


@dataclass(frozen=True, slots=True)
class Done:
    """A handle of work that is already done."""

    value: Tensor

    @property
    def has_gone(self) -> bool:
        """It is."""
        return True

    def wait(self) -> Tensor:
        """The result."""
        return self.value


@runtime_checkable
class Comm(Protocol):
    """One group of ranks on one axis and lane. `rank` is this rank's place in the group."""

    axis: str
    lane: str
    ranks: tuple[int, ...]
    rank: int
    size: int

    def all_reduce(self, x: Tensor, *, site: str, op: ReduceOp = "sum") -> Tensor:
        """Sum (or maximum) over the group, in a new tensor of x's shape."""
        ...

    def all_gather(self, x: Tensor, *, site: str, dim: int = 0) -> Tensor:
        """The ranks' equal shards, concatenated along `dim` in rank order."""
        ...

    def reduce_scatter(self, x: Tensor, *, site: str, dim: int = 0) -> Tensor:
        """This rank's 1/size of the sum, cut along `dim`; `x.shape[dim]` divides by size."""
        ...

    def all_to_all(
        self,
        x: Tensor,
        *,
        site: str,
        send_counts: Sequence[int] | None = None,
        receive_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Rows of dim 0 to each rank in order; equal shares unless counts are given."""
        ...

    def counts(self, x: Tensor, *, site: str) -> list[list[int]]:
        """Every rank's vector x of int64, on the host and in rank order: the one host read that a block
        may make. Recorded as all_gather of x."""
        ...

    def broadcast(self, x: Tensor, *, site: str, root: int = 0) -> Tensor:
        """`x` of the group's rank `root`; other ranks hand in a tensor of the same shape."""
        ...

    def barrier(self, *, site: str) -> None:
        """Returns when all ranks of the group have entered. Moves no bytes, is not recorded."""
        ...

    def moves(self, size: int) -> bool:
        """Whether a collective that is handed `size` bytes and only started moves while this rank computes.
        Else all of it happens in `wait`, and to start it early holds memory for nothing."""
        ...

    def start_all_reduce(
        self, x: Tensor, *, site: str, op: ReduceOp = "sum", out: Tensor | None = None
    ) -> Handle:
        """As all_reduce, under way; x must not change until `wait`, nor `out` be read. `out`, contiguous
        and shaped as the result, takes it; it may be x itself (in place)."""
        ...

    def start_all_gather(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """As all_gather, under way. x may be this rank's part of `out`."""
        ...

    def start_reduce_scatter(
        self, x: Tensor, *, site: str, dim: int = 0, out: Tensor | None = None
    ) -> Handle:
        """As reduce_scatter, under way. `out` may be this rank's part of x; the rest of x stays."""
        ...

    def start_all_to_all(
        self, x: Tensor, *, site: str, send_counts: Sequence[int], receive_counts: Sequence[int]
    ) -> Handle:
        """As all_to_all with counts, under way."""
        ...

    def send(self, x: Tensor, to: int, *, key: Key, site: str) -> Sent:
        """Sends to the group's rank `to` without waiting for it; recorded as op 'send'."""
        ...

    def receive(self, like: Tensor, source: int, *, key: Key, site: str) -> Handle:
        """Posts a receive of a tensor shaped and typed like `like`; not recorded."""
        ...


class World(Protocol):
    """All ranks of a run, as one rank sees them: makes groups. Every rank makes all groups in the
    same order, those it is not in too (`make` then returns None)."""

    @property
    def rank(self) -> int:
        """This rank."""
        ...

    @property
    def size(self) -> int:
        """The number of ranks."""
        ...

    def make(self, ranks: Sequence[int], *, axis: str, lane: str) -> Comm | None:
        """A Comm over `ranks` (in that order), or None where this rank is not among them."""
        ...

    def check(self) -> None:
        """Between steps, on all ranks: raises CommError where ranks have called unlike collectives, if
        the calls themselves are not compared."""
        ...

    def close(self, drain: bool = True) -> None:
        """Frees groups, segments and files, once what was sent has gone out; without `drain`, after a
        failure, at once. Safe to call twice."""
        ...


@dataclass(frozen=True, slots=True)
class Message:
    """What the recorder of collectives and errors knows of one call (used in mismatch tables)."""

    op: str
    shape: tuple[int, ...]
    dtype: str
    site: str
    extra: tuple[int, ...] = field(default=())

    @property
    def tensor(self) -> str:
        """'f32[4, 128]'."""
        return _tensor_text(self.shape, self.dtype)

    def __str__(self) -> str:
        return f"{self.op:<14} {self.tensor}"


@lru_cache(maxsize=4096)
def message_of(
    op: str, shape: tuple[int, ...], dtype: object, site: str, extra: tuple[int, ...] = ()
) -> Message:
    """What a call is told as: the same calls come back in every step."""
    return Message(op, tuple(shape), str(dtype), site, extra)


@lru_cache(maxsize=4096)
def _tensor_text(shape: tuple[int, ...], dtype: str) -> str:
    short = dtype.replace("torch.", "").replace("float", "f")
    return f"{short}[{', '.join(map(str, shape))}]"
