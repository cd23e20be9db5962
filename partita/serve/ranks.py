"""A runner of several ranks: threads of this process, or processes of this host.

Every rank waits for pieces and runs its part; the first rank of the last stage answers. Nobody waits for a
step to end before the next is handed out, so that stages of a pipeline work on several.

    caller --pieces--> rank 0 ... rank n-1          collectives among them as the laid program says
           <--logits-- the answering rank

A rank that raises, dies or hangs ends the runner: the caller is told which, and the others are ended. Who
waits for another longer than a step may take says for whom and where; where nobody does, the caller stops
waiting after twice that.
"""

from __future__ import annotations

import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from partita.base.errors import CommError, PartitaError, RankLostError, UsageError
from partita.comm.processes import end_ranks, start_ranks
from partita.comm.protocol import Where, World
from partita.comm.shm import shm
from partita.comm.threads.local import LocalRanks, LocalWorld
from partita.serve.part import Opening, Part
from partita.serve.piece import Piece

JOIN_S = 300.0  # for all ranks to come, on slow cores and disks
GRACE_S = 0.3  # for a rank's death to be seen, where another has told of it
CLOSE_S = 2.0  # for ranks to leave by themselves
PRELOAD = ("torch", "partita.serve.ranks")
SEGMENT, SCRATCH = "segment", "partita-serve-"


@dataclass
class Failed:
    """What a rank says that cannot go on."""

    rank: int
    error: PartitaError

    @staticmethod
    def of(rank: int, error: BaseException) -> Failed:
        """Another's fault is told as its own words."""
        if isinstance(error, PartitaError):
            return Failed(rank, error)
        return Failed(rank, PartitaError(f"{type(error).__name__}: {error}"))

    @property
    def lost(self) -> RankLostError:
        """As the caller is told while it serves: of one that did not come by who waited for it."""
        text = self.error.message
        if not isinstance(self.error, CommError):
            text = f"rank {self.rank} is lost: {text}"
        error = RankLostError(text)
        error.rank = self.rank if self.error.rank is None else self.error.rank
        return error


class Way(Protocol):
    """How pieces reach the ranks, and logits the caller."""

    def hand_out(self, pieces: Sequence[Piece]) -> None:
        """To every rank. Raises LostError where one is gone."""
        ...

    def answer(self) -> Tensor:
        """The logits of the oldest step that was not answered yet."""
        ...

    def close(self, asks: bool = True) -> None:
        """Ends the ranks, at once or after it `asks` them to leave."""
        ...


class LostError(Exception):
    """A rank is gone."""

    def __init__(self, failed: Failed) -> None:
        super().__init__(failed.error.message)
        self.failed = failed


@dataclass
class _Started:
    """A step handed out."""

    runner: RanksRunner
    number: int

    def result(self) -> Tensor:
        """Its logits, once those before it are there."""
        return self.runner.result(self.number)


class RanksRunner:
    """A Runner of the ranks of a plan; `way` has started them."""

    def __init__(self, opening: Opening, way: Way) -> None:
        self._room = room = opening.room
        self.vocab, self.max_len = room.vocab, room.max_len
        self.pages, self.page_size = room.pages, room.page_size
        self.depth = opening.request.plan.mesh.pp
        self._way: Way | None = way
        self._lost: RankLostError | None = None
        self._handed = self._answered = 0
        self._results: dict[int, Tensor] = {}

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """One step; see Runner."""
        return self.start(pieces).result()

    def start(self, pieces: Sequence[Piece]) -> _Started:
        """Hands a step out."""
        self._room.require(pieces)
        way = self._open()
        try:
            way.hand_out(pieces)
        except LostError as lost:
            raise self._end(lost) from None
        self._handed += 1
        return _Started(self, self._handed - 1)

    def result(self, number: int) -> Tensor:
        """The logits of a step that was handed out, once."""
        while number not in self._results:
            way = self._open()
            try:
                self._results[self._answered] = way.answer()
            except LostError as lost:
                raise self._end(lost) from None
            self._answered += 1
        return self._results.pop(number)

    def close(self) -> None:
        """Ends the ranks."""
        way, self._way = self._way, None
        if way is not None:
            way.close()

    def _open(self) -> Way:
        if self._lost is not None:
            raise self._lost
        if self._way is None:
            raise UsageError("the runner is closed")
        return self._way

    def _end(self, lost: LostError) -> RankLostError:
        self._lost = lost.failed.lost
        way, self._way = self._way, None
        if way is not None:
            way.close(asks=False)
        return self._lost


class Threads:
    """Ranks as threads of this process, which share its device."""

    def __init__(self, opening: Opening) -> None:
        self._opening, self._answers = opening, opening.answers
        self._inboxes = [queue.SimpleQueue[Any]() for _ in range(opening.ranks)]
        self._outbox = queue.SimpleQueue[Any]()
        self._ranks = threading.Thread(target=self._enter, name="ranks", daemon=True)
        self._ranks.start()
        heard = [self._outbox.get() for _ in range(opening.ranks)]
        failed = [h for h in heard if isinstance(h, Failed)]
        if failed:
            self.close()
            raise next((f for f in failed if not f.error.echoes), failed[0]).error

    def hand_out(self, pieces: Sequence[Piece]) -> None:
        """To every rank."""
        for inbox in self._inboxes:
            inbox.put(tuple(pieces))

    def answer(self) -> Tensor:
        """What the answering rank says."""
        try:
            found = self._outbox.get(timeout=2 * self._opening.step_s)
        except queue.Empty:
            raise LostError(_silent(self._opening)) from None
        if isinstance(found, Failed):
            raise LostError(found)
        return found

    def close(self, asks: bool = True) -> None:
        """Ends the ranks: each is through with what it was handed, or has failed."""
        for inbox in self._inboxes:
            inbox.put(None)
        self._ranks.join(CLOSE_S)

    def _enter(self) -> None:
        with suppress(Exception):  # each rank has told its own
            LocalRanks(self._opening.ranks, self._opening.step_s, lambda world: world).run(
                self._rank
            )

    def _rank(self, world: LocalWorld) -> None:
        try:
            part = Part(self._opening, world, world.where)
            self._outbox.put(world.rank)
            while (pieces := self._inboxes[world.rank].get()) is not None:
                logits = part.run(pieces)
                if world.rank == self._answers:
                    assert logits is not None
                    self._outbox.put(logits.cpu())
        except BaseException as error:
            self._outbox.put(Failed.of(world.rank, error))
            raise


class Processes:
    """Ranks as processes of this host: shared memory carries what CPU ranks send, gloo where that is
    missing, nccl what GPUs send. They leave when this process dies."""

    def __init__(self, opening: Opening) -> None:
        self._opening, self._answers = opening, opening.answers
        self._scratch = Path(tempfile.mkdtemp(prefix=SCRATCH))
        pipes = [Pipe(duplex=False) for _ in range(opening.ranks)]
        readers = [reader for reader, _ in pipes]
        self._inboxes = [writer for _, writer in pipes]
        try:
            self.ranks = start_ranks(
                opening.ranks, serve_rank, (opening, self._scratch, readers), PRELOAD
            )
        except BaseException:
            self._clean()
            raise
        finally:
            for reader in readers:
                reader.close()
        try:
            for rank in range(opening.ranks):
                self._hear(rank)
        except LostError as lost:
            self.close(asks=False)
            raise lost.failed.error from None

    def hand_out(self, pieces: Sequence[Piece]) -> None:
        """To every rank."""
        for rank, inbox in enumerate(self._inboxes):
            try:
                inbox.send(tuple(pieces))
            except OSError:
                raise LostError(self._dead(rank)) from None

    def answer(self) -> Tensor:
        """What the answering rank says."""
        return self._hear(self._answers, 2 * self._opening.step_s)

    def _hear(self, rank: int, limit_s: float | None = None) -> Any:
        """What a rank says next, while all live; nobody else is listened to before it has ended. Raises
        LostError where one has failed or is dead, or nothing happens."""
        ends: dict[Any, int] = {process.sentinel: r for r, (process, _) in enumerate(self.ranks)}
        ready = wait([self.ranks[rank][1], *ends], limit_s)
        if not ready:
            raise LostError(_silent(self._opening))
        for r in sorted(ends[e] for e in ready if e in ends):
            raise LostError(self._dead(r))
        try:
            return self._said(rank)
        except (EOFError, OSError):
            raise LostError(self._dead(rank)) from None

    def _said(self, rank: int) -> Any:
        """One thing that a rank says."""
        connection = self.ranks[rank][1]
        said = connection.recv()
        if isinstance(said, Failed):
            raise LostError(self._first(said))
        if not isinstance(said, tuple):
            return said
        (shape, dtype), raw = said, bytearray(connection.recv_bytes())
        return (
            torch.frombuffer(raw, dtype=dtype).view(shape)
            if raw
            else torch.empty(shape, dtype=dtype)
        )

    def _dead(self, rank: int) -> Failed:
        """Of a rank that is gone: what it said last, or how it ended."""
        process, connection = self.ranks[rank]
        process.join(GRACE_S)
        with suppress(Exception):  # what it said may break off
            while connection.poll():
                said = connection.recv()
                if isinstance(said, Failed):
                    return self._first(said)
        code = process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return Failed(rank, RankLostError(f"its process ended ({how})"))

    def _first(self, said: Failed) -> Failed:
        """The rank at fault, where one tells of another's: one that died without a word."""
        until = time.monotonic() + GRACE_S
        while said.error.echoes and time.monotonic() < until:
            for r, (process, _) in enumerate(self.ranks):
                if r != said.rank and process.exitcode not in (None, 0, 1):
                    return self._dead(r)
            time.sleep(0.01)
        return said

    def close(self, asks: bool = True) -> None:
        """Asks the ranks to leave, and kills those that do not."""
        for inbox in self._inboxes:
            with suppress(OSError):
                if asks:
                    inbox.send(None)
            inbox.close()
        until = time.monotonic() + CLOSE_S
        for process, _ in self.ranks if asks else ():
            process.join(max(until - time.monotonic(), 0.0))
        end_ranks(self.ranks)
        for _, connection in self.ranks:
            connection.close()
        self._clean()

    def _clean(self) -> None:
        """Removes what ranks share, which those that died before all had joined leave."""
        name = str(self._scratch / SEGMENT).strip("/").replace("/", "-")
        for left in shm.FAST.glob(f"{name}*"):
            left.unlink(missing_ok=True)
        shutil.rmtree(self._scratch, ignore_errors=True)


def _silent(opening: Opening) -> Failed:
    """Of the rank that answers, where nobody said that he waits for another."""
    text = f"it did not answer within {2 * opening.step_s:g} s, and no rank waits for another; "
    text += f"--step-timeout says how long a step may take ({opening.step_s:g} s)"
    return Failed(opening.answers, RankLostError(text))


def serve_rank(
    rank: int, writer: Connection, opening: Opening, scratch: Path, inboxes: Sequence[Connection]
) -> None:
    """One process: joins, builds its part, runs what it is handed until it is told to leave."""
    torch.set_num_threads(1)
    for other, inbox in enumerate(inboxes):
        if other != rank:
            inbox.close()
    where = Where()
    try:
        world = _join(rank, opening, scratch, where)
        part = Part(opening, world, where)
        if isinstance(world, shm.ShmWorld):
            world.timeout_s = opening.step_s
        writer.send("ready")
        while (pieces := inboxes[rank].recv()) is not None:
            logits = part.run(pieces)
            if rank == opening.answers:
                assert logits is not None
                held = logits.cpu().contiguous()
                writer.send((tuple(held.shape), held.dtype))
                writer.send_bytes(held.view(-1).view(torch.uint8).numpy().data)
        world.close()
    except BaseException as error:
        writer.send(Failed.of(rank, error))
        raise SystemExit(1) from None


def _join(rank: int, opening: Opening, scratch: Path, where: Where) -> World:
    """The world of this rank."""
    size, gpus = opening.ranks, opening.device != "cpu"
    if shm.available() and not gpus:
        return shm.ShmWorld(rank, size, scratch / SEGMENT, timeout_s=JOIN_S, where=where)
    from partita.comm.distributed.torch import TorchWorld

    if gpus:
        torch.cuda.set_device(rank)
    path = scratch / "rendezvous"
    world = TorchWorld(
        rank, size, path, timeout_s=max(JOIN_S, opening.step_s), where=where, gpus=gpus
    )
    world.timeout = timedelta(seconds=opening.step_s)  # of the groups to come
    return world
