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

Agents of several hosts count restarts each by itself, and the store outlives an attempt. So where one may
restart, what the store says may be of ranks that are gone: rank r asks again until rank 0 welcomes it, the
token of that connection names the attempt, and who dies before is its agent's.
"""

from __future__ import annotations

import itertools
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from partita.base.errors import CommError
from partita.base.text import printable
from partita.comm.liveness.link import WORD, Link, is_loopback, listening
from partita.comm.liveness.wire import StoreWire
from partita.comm.processes import is_one_host, leave_without, torchrun_agent, torchrun_rank
from partita.comm.processes import torchrun_store as environment

GRACE_S = 3.5  # from a loss to the end of a rank that is still there
LOOK_S = 0.2  # between two looks at where this rank is, and two tries to reach the store
LINK_S = 2.0  # for a rank that leaves at once to be linked first
ANSWER_S = 1.0  # for the store to answer one that leaves, or is left
LEAVES: dict[str, Any] = {"leaves": ""}  # in order
WELCOME: dict[str, Any] = {"welcome": ""}  # the answer to a rank's first message
FAILED = "/failed"  # behind the key: what one that rank 0 never met has said
STARTING = "starting"  # what a rank does until its first step
CALLS = itertools.count()  # of `hold`: a program may train twice


@dataclass(frozen=True)
class Lost:
    """The first rank that was lost, how it is told, and whether it died without a word."""

    rank: int
    text: str
    died: bool


class Lifeline:
    """One rank's hold. `lost` is the first loss; `where` tells the rank's step and what it does in it; `last`
    is called with a loss before the process is ended. `store` None: all ranks are under one agent, which
    ends them itself. `restarts`: an agent may start ranks anew."""

    def __init__(
        self,
        rank: int,
        mates: range,
        key: str,
        store: tuple[str, int] | None,
        restarts: bool = False,
    ) -> None:
        self.rank, self.mates, self.host = rank, mates, socket.gethostname()
        self.where: Callable[[], tuple[int, str]] = lambda: (0, STARTING)
        self.lost: Lost | None = None
        self.last: Callable[[Lost], None] = lambda lost: None
        self._key, self._store, self._restarts = key, store, restarts
        self._token = ""  # of the connections
        self._left, self._linked, self._over = False, threading.Event(), threading.Event()
        self._links: list[Link] = []  # of rank 0; of another the one to it
        self._came = {rank}  # to rank 0
        self._deadline = 0.0
        if store is not None:
            work = partial(self._hold, store)
            self.thread = threading.Thread(target=work, name="lifeline", daemon=True)
            self.thread.start()

    @staticmethod
    def hold() -> Lifeline | None:
        """That of this process, if torchrun (or an environment like its) started it; ties it to its agent
        too. Every rank calls it as often. Raises CommError where the agent is gone."""
        place = torchrun_rank()
        if place is None:
            return None
        env, (rank, _, local) = environment(), place
        store = None if is_one_host() else _store_of(env)
        mates = range(rank - local, rank - local + int(env.get("LOCAL_WORLD_SIZE", "1")))
        restarts = env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        line = Lifeline(rank, mates, f"partita/lifeline/{next(CALLS)}", store, restarts)
        leave_without(torchrun_agent(), lambda: line.leave("its launcher is gone", died=True))
        return line

    def attempt(self, own: str, timeout_s: float) -> str:
        """The name that all ranks have for this attempt; `own` is the agent's, which does where there is one
        agent. Raises CommError where rank 0 is waited for in vain."""
        if self._store is None or not self._restarts:
            return own
        if not (self._linked.wait(timeout_s) and self._token):
            raise CommError(f"rank {self.rank} found no rank 0 within {timeout_s:g} s")
        return self._token

    def leave(self, word: str = "", died: bool = False) -> None:
        """This rank ends: in order, or for the reason that `word` tells; `died`, where others cannot do the
        same. Once told it is told."""
        if self._left or self._store is None:
            return
        self._left, word = True, word[:WORD]
        linked = self._linked.wait(LINK_S) if word else self._linked.is_set()
        if self.rank == 0:
            self._let_go(self._loss(0, self.host, f"failed: {word}", died) if word else LEAVES)
        elif linked:
            for link in list(self._links):
                link.send({"leaves": word, "died": died})
        elif word and 0 in self.mates:  # rank 0 never came, and was what stopped this one
            how = f"did not start; beside it rank {self.rank}: {word}"
            self._leave_in_store(self._loss(0, self.host, how))
        elif word and not self._restarts:  # for rank 0, when it comes
            told = self._loss(self.rank, self.host, f"failed: {word}", died)
            self._leave_in_store(told, FAILED)
        self._over.set()

    # The thread ----------------------------------------------------------------------------------

    def _hold(self, store: tuple[str, int]) -> None:
        try:
            with closing(_reach(store)) as wire:
                if self.rank == 0:
                    self._serve(wire, is_named=not is_loopback(store[0]))
                else:
                    self._follow(wire)
        except Exception:  # a store of another kind: timeouts are left, and rank 0 has not died
            if self.rank == 0 and self.lost is None:
                self._let_go(LEAVES)
        while self.lost is not None and not self._over.is_set():
            self._mind()
            time.sleep(LOOK_S)

    def _serve(self, wire: StoreWire, is_named: bool) -> None:
        """Rank 0: takes the others' connections, and tells all of the first that ends without a word. A name
        of this host may stand for a loopback address here, and elsewhere for that which others reach."""
        own, token = wire.socket.getsockname()[0], os.urandom(8).hex()
        with listening(own, is_named) as door, selectors.DefaultSelector() as sources:
            sources.register(door, selectors.EVENT_READ)
            place = {"host": own, "port": door.getsockname()[1], "token": token}
            if not self._left:
                wire.set(self._key, json.dumps(place))
            self._token = token
            self._linked.set()
            wire.ask(self._key + FAILED)
            sources.register(wire.socket, selectors.EVENT_READ)
            while not self._over.is_set():
                for key, _ in sources.select(LOOK_S):
                    if key.fileobj is door:
                        self._admit(door, sources)
                    elif key.fileobj is wire.socket:
                        sources.unregister(wire.socket)
                        with suppress(OSError):  # the store is gone
                            self._lose(json.loads(wire.answer(self._key + FAILED)))
                    elif not self._hear(key.data):
                        sources.unregister(key.fileobj)
                        self._links.remove(key.data)
                        key.data.socket.close()
                self._mind()
            for link in self._links:
                link.socket.close()

    def _hear(self, link: Link) -> bool:
        """What a rank says to rank 0; False where it has gone, or is none."""
        came = link.take()
        for message in came or ():
            if message.get("token") == self._token:
                if message["rank"] in self._came or (self._restarts and self.lost is not None):
                    return False  # of another attempt
                link.rank, link.host = int(message["rank"]), str(message["host"])
                link.mates = tuple(message["mates"])
                self._came.add(link.rank)
                link.send(WELCOME)
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

    def _failed(self, link: Link, message: dict[str, Any]) -> dict[str, Any]:
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
            link = Link(door.accept()[0])
        except OSError:
            return time.sleep(LOOK_S)
        self._links.append(link)
        sources.register(link.socket, selectors.EVENT_READ, link)
        return None

    def _follow(self, wire: StoreWire) -> None:
        """Another rank: finds rank 0, holds on to it, and hears of losses."""
        while not self._held(wire, json.loads(wire.get(self._key))):
            if self._linked.is_set() or not self._restarts:
                return self._first_is_gone(wire)
            time.sleep(LOOK_S)
        return None

    def _held(self, wire: StoreWire, told: dict[str, Any]) -> bool:
        """The connection to the rank 0 that the store tells of, to its end: True where that is in order,
        False where it is not, or never began."""
        if self._over.is_set():
            return True
        if "port" not in told:
            return False
        host = told["host"]
        if is_loopback(host):  # rank 0 and the store share a host: as this one names that
            host = wire.socket.getpeername()[0]
        try:
            link = Link(socket.create_connection((host, told["port"])))
        except OSError as error:
            if self._restarts or isinstance(error, ConnectionRefusedError):
                return False
            raise
        link.socket.settimeout(LOOK_S)
        mates = list(self.mates)
        link.send({"token": told["token"], "rank": self.rank, "host": self.host, "mates": mates})
        said = ""
        with link.socket:
            while not self._over.is_set() and (came := link.take()) is not None:
                for message in came:
                    if "leaves" in message:
                        return True
                    if message == WELCOME:
                        self._token = told["token"]
                        self._links.append(link)
                        self._linked.set()
                    else:
                        self._lose(message)
                if self._links and (now := self._place()) != said:
                    said = now
                    link.send({"where": said})
                self._mind()
        return self._over.is_set()

    def _first_is_gone(self, wire: StoreWire) -> None:
        """Rank 0 has left in order, or failed, and said so in the store; or it has died."""
        self._linked.set()
        wire.socket.settimeout(ANSWER_S)
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
        self.lost = Lost(**{**told, "text": printable(told["text"])})
        for link in self._links if self.rank == 0 else ():
            link.send(told)

    def _let_go(self, told: dict[str, Any]) -> None:
        """Rank 0: the last that the others are told, those too that are not linked yet."""
        self._leave_in_store(told)
        for link in list(self._links):
            link.send(told)

    def _leave_in_store(self, told: dict[str, Any], where: str = "") -> None:
        """For those who are not linked yet."""
        assert self._store is not None
        with suppress(OSError), closing(StoreWire(*self._store, ANSWER_S)) as wire:
            wire.set(self._key + where, json.dumps(told))

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
            f"partita: {lost.text}; rank {self.rank} leaves in {self._place()}: started again, "
            "the job goes on from its newest checkpoint, if one was written\n"
        )
        sys.stderr.flush()
        with suppress(Exception):
            self.last(lost)
        os._exit(71)


def _store_of(env: dict[str, str]) -> tuple[str, int] | None:
    """Where an environment says that the ranks' store is; None where it does not: who needs it says so."""
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT", "")
    return (host, int(port)) if host and port.isdecimal() else None


def _reach(store: tuple[str, int]) -> StoreWire:
    """The store, once it is there: without an agent rank 0 itself keeps it, when it has loaded torch."""
    while True:
        try:
            return StoreWire(*store)
        except OSError:
            time.sleep(LOOK_S)
