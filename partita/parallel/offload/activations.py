"""What blocks keep for backward, away until then: block by block down behind F, up ahead of B.

    F   [embedding][ blocks.0 ][ blocks.1 ][ blocks.2 ]         B   [ blocks.2 ][ blocks.1 ][ blocks.0 ]
    down               [embedding][ blocks.0 ][ blocks.1 ]      up        [ blocks.1 ][ blocks.0 ]

So a microbatch holds what one block keeps while it runs forward, and what two keep while it runs backward,
however many microbatches are under way. A stage's last block stays until its B, which begins with it; where
the schedule runs something else in between, it leaves at OFFLOAD and is back at RELOAD. On a GPU copies go
beside what is computed, so that forward holds two as well: the one before is let go when the next leaves.

Storages are emptied and filled again in place: whoever has a view of one (autograd, the executor, a replay)
finds it as it was. Weights, tables that live for the whole run, and data do not move; nor does a block's
output, which is on its way to the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from partita.parallel.backward_call import Passed
from partita.parallel.offload.cpu import Moves
from partita.parallel.offload.shelves import Shelf
from partita.parallel.units import Unit

Live = tuple[Tensor, ...]
Flow = Generator[Any, Live, Tensor]  # a forward that stops where rows travel
BlockKey = tuple[int, int, int]  # stage, microbatch, place of the block in the stage


@dataclass
class _Kept:
    """Storages that one block keeps for one microbatch, as flat bytes, and how long each is."""

    bytes_: list[Tensor]
    sizes: list[int]
    ticket: Any = None
    is_away: bool = False  # or on its way down


def _flat(storage: torch.UntypedStorage) -> Tensor:
    made = torch.empty(0, dtype=torch.uint8, device=storage.device)
    return made.set_(storage, 0, (storage.nbytes(),))


@dataclass
class Activations:
    """What the blocks of one rank keep: on the device, or on the shelf. `names` are the blocks of each stage.
    `watcher`: is told of every tensor that autograd saves, where somebody measures."""

    shelf: Shelf
    moves: Moves
    names: Mapping[int, Sequence[str]]
    watcher: Callable[[Tensor], Any] | None = None
    _held: dict[BlockKey, _Kept] = field(default_factory=dict)
    _leaving: _Kept | None = None  # whose copy down goes on beside the next block

    def hold(self, at: int, storages: Sequence[torch.UntypedStorage]) -> None:
        """The block at a place of the stage has run, and keeps these."""
        if storages:
            made = _Kept([_flat(s) for s in storages], [s.nbytes() for s in storages])
            self._held[self._key(at)] = made

    def leave(self, at: int) -> None:
        """What a block keeps goes. Its memory is free; where the copy is made beside what is computed, when
        the next one leaves or something comes."""
        self.let_go()
        kept = self._held.get(self._key(at))
        if kept is None or kept.is_away:
            return
        start = time.perf_counter()
        kept.ticket, kept.is_away, self._leaving = self.shelf.put(kept.bytes_), True, kept
        if not self.shelf.lingers(kept.ticket):
            self.let_go()
        for axis in self.shelf.axes:
            self._note(axis, at, "offload" if axis == "host" else "write", kept, start)

    def let_go(self) -> None:
        """The memory of what has left last is free."""
        if self._leaving is None:
            return
        kept, self._leaving = self._leaving, None
        self.shelf.left(kept.ticket)
        for flat in kept.bytes_:
            flat.untyped_storage().resize_(0)
            flat.detach()  # an operation: who counts memory sees that it is gone

    def expect(self, at: int) -> None:
        """A block's backward is the next but one."""
        kept = self._held.get(self._key(at))
        if kept is not None and kept.is_away:
            self.shelf.expect(kept.ticket)

    def come(self, at: int) -> None:
        """What a block keeps is there again, or on its way until `done`."""
        self.let_go()
        kept = self._held.get(self._key(at))
        if kept is None or not kept.is_away:
            return
        start = time.perf_counter()
        self._fill(kept)
        for axis in self.shelf.axes:
            self._note(axis, at, "reload" if axis == "host" else "read", kept, start)

    def done(self, at: int) -> None:
        """A block's backward has begun: what it keeps is there, and autograd's alone."""
        kept = self._held.pop(self._key(at), None)
        if kept is not None and kept.ticket is not None:
            self.shelf.arrived(kept.ticket)

    def last_leaves(self) -> None:
        """OFFLOAD: other work comes before the backward of the stage and microbatch."""
        self.leave(len(self.names[self.moves.where.stage]) - 1)

    def last_comes(self) -> None:
        """RELOAD: its backward is near."""
        self.come(len(self.names[self.moves.where.stage]) - 1)

    def forget(self) -> None:
        """All that is away is there again, and nobody's: a stage's input is used a second time."""
        self.let_go()
        for kept in self._held.values():
            if kept.is_away:
                self._fill(kept)
            if kept.ticket is not None:
                self.shelf.arrived(kept.ticket)
        self._held.clear()

    def _fill(self, kept: _Kept) -> None:
        for flat, size in zip(kept.bytes_, kept.sizes, strict=True):
            flat.untyped_storage().resize_(size)
        self.shelf.take(kept.ticket, kept.bytes_)
        kept.is_away = False

    def _key(self, at: int) -> BlockKey:
        where = self.moves.where
        return where.stage, where.microbatch, at

    def _note(self, axis: str, at: int, kind: str, kept: _Kept, start_s: float) -> None:
        name = self.names[self.moves.where.stage][at]
        self.moves.note(axis, f"{name}.kept:{kind}", sum(kept.sizes), start_s)


@dataclass(frozen=True)
class StageKept:
    """Around the blocks of one stage: sees what each keeps, lets it go behind the block, and has it back a
    block ahead of its backward. `units` and `tables` lie there for the whole run."""

    kept: Activations
    blocks: int
    units: Sequence[Unit]
    tables: Sequence[Tensor]

    def run(self, at: int, flow: Flow, batch: Any) -> Flow:
        """The block's forward, as it flows; what autograd saves of it is seen."""
        found: dict[int, torch.UntypedStorage] = {}
        stays = self._stays(batch)
        if at == self.blocks - 1:  # nothing leaves behind it
            self.kept.let_go()

        def pack(t: Tensor) -> Tensor:
            if self.kept.watcher is not None:
                self.kept.watcher(t)
            storage = t.untyped_storage()
            if storage.nbytes() and storage.data_ptr() not in stays:
                found.setdefault(storage.data_ptr(), storage)
            return t

        live: Any = None
        while True:
            try:
                with saved_tensors_hooks(pack, lambda t: t):
                    live = flow.send(live)
            except StopIteration as end:
                y: Tensor = end.value
                break
            live = yield live
        found.pop(y.untyped_storage().data_ptr(), None)
        self.kept.hold(at, list(found.values()))
        if at < self.blocks - 1:
            self.kept.leave(at)
        return Passed.apply(y, partial(self.backward, at))  # type: ignore[return-value]

    def backward(self, at: int) -> None:
        """A block's backward begins: it finds what it keeps, the one before it is on its way."""
        self.kept.come(at)
        self.kept.done(at)
        if at:
            self.kept.come(at - 1)
        if at > 1:
            self.kept.expect(at - 2)

    def _stays(self, batch: Any) -> set[int]:
        whole = [u.values.tensor for u in self.units]
        data = [getattr(batch, f.name) for f in fields(batch)]
        every = (*whole, *data, *self.tables)
        return {t.untyped_storage().data_ptr() for t in every if isinstance(t, Tensor)}
