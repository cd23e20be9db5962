"""How ranks of several hosts learn of a death that no collective meets: a connection from every rank to
rank 0, held from its first moment to its last.

    rank 0     listens, and says where in the store that torchrun's agent keeps (wire.py: no torch yet)
    rank r     connects and says who it is; then where it is in its step, as that changes
    r ends     its system closes the connection, whatever ended it: rank 0 tells all the others
    0 ends     each rank sees so itself

Who leaves says so first, and why where it fails: that is no death. A rank that hears of a loss has GRACE_S to
say itself what it waited for, then its thread ends the process with 71: it may be loading torch, preparing
data, or in a call that nothing ends. While ranks start one that fails is a loss too, since no others can
begin without it; later those that fail together end each by itself. A stopped process or a cut
link closes nothing: the timeouts of rollcall.py are for those.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from partita.comm.processes import is_one_host, leave_without, torchrun_agent, torchrun_rank
from partita.comm.processes import torchrun_store as environment
from partita.comm.wire import StoreWire

GRACE_S = 3.5  # from a loss to the end of a rank that is still there
LOOK_S = 0.2  # between two looks at where this rank is, and two tries to reach the store
LINK_S = 5.0  # for a rank that leaves at once to be linked first
ANSWER_S = 1.0  # for the store to answer one that leaves, or is left
LEAVES: dict[str, Any] = {"leaves": ""}  # in order
STARTING = "starting"  # what a rank does until its first step
LONGEST = 4096  # bytes of a message; who sends more is no rank


@dataclass(frozen=True)
class Lost:
    """The first rank that was lost, how it is told, and whether it died without a word."""

    rank: int
    text: str
    died: bool


@dataclass
class _Link:
    """One end of a connection; at rank 0 with who the other is, `rank` -1 until that is said."""

    socket: socket.socket
    rank: int = -1
    host: str = ""
    mates: tuple[int, ...] = ()  # the ranks of its host
    where: str = ""
    left: bool = False
    rest: bytes = b""

    def take(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None at the end of the connection, or where it is no rank's."""
        try:
            came = self.socket.recv(LONGEST)
        except TimeoutError:
            return []
        except OSError:
            came = b""
        *lines, self.rest = (self.rest + came).split(b"\n")
        try:
            found = [json.loads(line) for line in lines]
        except ValueError:
            return None
        whole = came and len(self.rest) < LONGEST and all(isinstance(x, dict) for x in found)
        return found if whole else None

    def send(self, message: dict[str, Any]) -> None:
        """One line; who is gone wants nothing more."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")


class Lifeline:
    """One rank's hold. `lost` is the first loss; `where` tells the rank's step and what it does in it; `last`
    is called with a loss before the process is ended. `store` None: all ranks are under one agent, which
    ends them itself."""

    def __init__(self, rank: int, mates: range, key: str, store: tuple[str, int] | None) -> None:
        self.rank, self.mates, self.host = rank, mates, socket.gethostname()
        self.where: Callable[[], tuple[int, str]] = lambda: (0, STARTING)
        self.lost: Lost | None = None
        self.last: Callable[[Lost], None] = lambda lost: None
        self._key, self._store = key, store
        self._left, self._linked = False, threading.Event()
        self._links: list[_Link] = []  # of rank 0; of another the one to it
        self._came = {rank}  # to rank 0
        self._deadline = 0.0
        if store is not None:
            work = partial(self._hold, store)
            threading.Thread(target=work, name="lifeline", daemon=True).start()

    @staticmethod
    def hold() -> Lifeline | None:
        """That of this process, if torchrun (or an environment like its) started it; ties it to its agent
        too. Call it once. Raises CommError where the agent is gone."""
        place = torchrun_rank()
        if place is None:
            return None
        env, (rank, _, local) = environment(), place
        store = None
        if not is_one_host() and "MASTER_PORT" in env:
            store = env["MASTER_ADDR"], int(env["MASTER_PORT"])
        mates = range(rank - local, rank - local + int(env.get("LOCAL_WORLD_SIZE", "1")))
        attempt = env.get("TORCHELASTIC_RESTART_COUNT", "0")
        line = Lifeline(rank, mates, f"partita/lifeline/{attempt}", store)
        leave_without(torchrun_agent(), lambda: line.leave("its launcher is gone", died=True))
        return line

    def leave(self, word: str = "", died: bool = False) -> None:
        """This rank ends: in order, or for the reason that `word` tells; `died`, where others cannot do the
        same. Once told it is told."""
        if self._left or self._store is None:
            return
        self._left, word = True, word[: LONGEST // 4]
        linked = self._linked.wait(LINK_S) if word else self._linked.is_set()
        if self.rank == 0:
            self._let_go(self._loss(0, self.host, f"failed: {word}", died) if word else LEAVES)
        elif linked:
            for link in list(self._links):
                link.send({"leaves": word, "died": died})
        elif word and 0 in self.mates:  # rank 0 never came, and was what stopped this one
            how = f"did not start; beside it rank {self.rank}: {word}"
            self._leave_in_store(self._loss(0, self.host, how))

    # The thread ----------------------------------------------------------------------------------

    def _hold(self, store: tuple[str, int]) -> None:
        try:
            wire = _reach(store)
            if self.rank == 0:
                self._serve(wire, is_named=not store[0].startswith(("127.", "localhost")))
            else:
                self._follow(wire)
        except Exception:  # a store of another kind: timeouts are left, and rank 0 has not died
            if self.rank == 0 and self.lost is None:
                self._let_go(LEAVES)
        while self.lost is not None:
            self._mind()
            time.sleep(LOOK_S)

    def _serve(self, wire: StoreWire, is_named: bool) -> None:
        """Rank 0: takes the others' connections, and tells all of the first that ends without a word. A name
        of this host may stand for a loopback address here, and elsewhere for that which others reach."""
        own = wire.socket.getsockname()[0]
        by_name = own.startswith("127.") and is_named
        family = socket.AF_INET6 if ":" in own else socket.AF_INET
        with (
            socket.create_server(("" if by_name else own, 0), family=family, backlog=4096) as door,
            selectors.DefaultSelector() as sources,
        ):
            sources.register(door, selectors.EVENT_READ)
            token = os.urandom(8).hex()
            place = {"host": own, "port": door.getsockname()[1], "token": token}
            if not self._left:
                wire.set(self._key, json.dumps(place))
            self._linked.set()
            while True:
                for key, _ in sources.select(LOOK_S):
                    if key.fileobj is door:
                        self._admit(door, sources)
                    elif not self._hear(key.data, token):
                        sources.unregister(key.fileobj)
                        self._links.remove(key.data)
                        key.data.socket.close()
                self._mind()

    def _hear(self, link: _Link, token: str) -> bool:
        """What a rank says to rank 0; False where it has gone, or is none."""
        came = link.take()
        for message in came or ():
            if message.get("token") == token:
                link.rank, link.host = int(message["rank"]), str(message["host"])
                link.mates = tuple(message["mates"])
                self._came.add(link.rank)
                if self.lost is not None:
                    link.send(asdict(self.lost))
            elif link.rank > 0 and "leaves" in message:
                link.left = True
                if message["leaves"]:
                    self._lose(self._failed(link, message))
            elif link.rank > 0 and "where" in message:
                link.where = str(message["where"])
        if came is None and link.rank > 0 and not link.left:
            where = link.where or f"step 0 ({STARTING})"
            self._lose(self._loss(link.rank, link.host, f"has died in {where}", died=True))
        return came is not None and (link.rank > 0 or not came)

    def _failed(self, link: _Link, message: dict[str, Any]) -> dict[str, Any]:
        """The loss of a rank that says so. One whose neighbour never came was stopped on its account."""
        word = message["leaves"]
        absent = [r for r in link.mates if r not in self._came]
        if absent:
            how = f"did not start; beside it rank {link.rank}: {word}"
            return self._loss(absent[0], link.host, how)
        return self._loss(link.rank, link.host, f"failed: {word}", bool(message.get("died")))

    def _admit(self, door: socket.socket, sources: selectors.BaseSelector) -> None:
        """Takes a connection; where there is no room for one, what is held goes on."""
        try:
            link = _Link(door.accept()[0])
        except OSError:
            return time.sleep(LOOK_S)
        self._links.append(link)
        sources.register(link.socket, selectors.EVENT_READ, link)
        return None

    def _follow(self, wire: StoreWire) -> None:
        """Another rank: holds on to rank 0, and hears of losses."""
        told = json.loads(wire.get(self._key))
        wire.socket.settimeout(ANSWER_S)
        if "port" not in told:
            return self._first_is_gone(wire)
        host = told["host"]
        if host.startswith("127."):  # rank 0 and the store share a host: as this one names that
            host = wire.socket.getpeername()[0]
        try:
            link = _Link(socket.create_connection((host, told["port"])))
        except ConnectionRefusedError:
            return self._first_is_gone(wire)
        link.socket.settimeout(LOOK_S)
        mates = list(self.mates)
        link.send({"token": told["token"], "rank": self.rank, "host": self.host, "mates": mates})
        self._links.append(link)
        self._linked.set()
        said = ""
        while (came := link.take()) is not None:
            for message in came:
                if "leaves" in message:
                    return None
                self._lose(message)
            if (now := self._place()) != said:
                said = now
                link.send({"where": said})
            self._mind()
        return self._first_is_gone(wire)

    def _first_is_gone(self, wire: StoreWire) -> None:
        """Rank 0 has left in order, or failed, and said so in the store; or it has died."""
        self._linked.set()
        told: dict[str, Any] = {}
        with suppress(OSError, ValueError):
            told = json.loads(wire.get(self._key))
        if "leaves" not in told:
            died = self._loss(0, "the first host", f"has died by {self._place()}", died=True)
            self._lose(told if "text" in told else died)

    # What both do --------------------------------------------------------------------------------

    def _loss(self, rank: int, host: str, how: str, died: bool = False) -> dict[str, Any]:
        return asdict(Lost(rank, f"rank {rank} on {host} {how}", died))

    def _lose(self, told: dict[str, Any]) -> None:
        """Notes the first loss; rank 0 tells it to all."""
        if self.lost is not None:
            return
        self._deadline = time.monotonic() + GRACE_S
        self.lost = Lost(**told)
        for link in self._links if self.rank == 0 else ():
            link.send(told)

    def _let_go(self, told: dict[str, Any]) -> None:
        """Rank 0: the last that the others are told, those too that are not linked yet."""
        self._leave_in_store(told)
        for link in list(self._links):
            link.send(told)

    def _leave_in_store(self, told: dict[str, Any]) -> None:
        """For those who are not linked yet."""
        assert self._store is not None
        with suppress(OSError):
            wire = StoreWire(*self._store, ANSWER_S)
            wire.set(self._key, json.dumps(told))
            wire.close()

    def _place(self) -> str:
        return "step {} ({})".format(*self.where())

    def _mind(self) -> None:
        """Ends the process some time after a loss that it does not survive."""
        lost = self.lost
        if lost is None or self._left or time.monotonic() < self._deadline:
            return
        if not lost.died and self.where()[1] != STARTING:
            return
        sys.stderr.write(
            f"partita: {lost.text}; rank {self.rank} leaves in {self._place()}: start the job again "
            "to resume\n"
        )
        sys.stderr.flush()
        with suppress(Exception):
            self.last(lost)
        os._exit(71)


def _reach(store: tuple[str, int]) -> StoreWire:
    """The store, once it is there: without an agent rank 0 itself keeps it, when it has loaded torch."""
    while True:
        try:
            return StoreWire(*store)
        except OSError:
            time.sleep(LOOK_S)
