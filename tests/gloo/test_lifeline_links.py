"""The connections of a lifeline: who may come, where rank 0 listens, what an old store says.

Lifelines of this process over torch's store, on loopback; none of them comes to end it.
"""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch.distributed as dist

from partita.base.errors import UsageError
from partita.comm.distributed.stores import rendezvous
from partita.comm.liveness.lifeline import Lifeline
from partita.comm.liveness.link import LONGEST, WORD, is_loopback, listening
from partita.comm.processes import is_one_host
from partita.comm.ranks import _leave

KEY, WAIT_S = "partita/lifeline/0", 60  # for a busy machine
pytestmark = pytest.mark.timeout(150)


class Ranks:
    """Those of a run, and their store."""

    def __init__(self) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.held: list[Lifeline] = []

    def hold(self, rank: int, restarts: bool = False) -> Lifeline:
        """A rank alone on its host, in its first step: what fails there ends no other."""
        place = ("127.0.0.1", self.store.port)
        line = Lifeline(rank, range(rank, rank + 1), KEY, place, restarts)
        line.where = lambda: (1, "forward")
        self.held.append(line)
        return line

    def connect(self, sent: bytes) -> socket.socket:
        """Somebody who knows where rank 0 listens, and says that."""
        place = json.loads(self.store.get(KEY))
        found = socket.create_connection((place["host"], place["port"]), WAIT_S)
        found.sendall(sent)
        return found


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks()
    yield made
    for line in reversed(made.held):
        line.leave()
        line.thread.join(WAIT_S)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_closed(end: socket.socket) -> bool:
    """Whether the other side lets go of it."""
    with end, suppress(ConnectionResetError):
        return end.recv(1) == b""
    return True


GARBAGE = [
    b"GET / HTTP/1.1\r\n\r\n", b"\xff\xfe\x00\n", b"[" * (LONGEST - 2) + b"\n", b"7\n", b"{}\n",
    b'{"token": "guessed", "rank": 1, "host": "", "mates": [1]}\n', b"x" * LONGEST,
]  # fmt: skip


def test_who_is_no_rank_ends_its_own_connection_alone(ranks: Ranks) -> None:
    first = ranks.hold(0)
    for sent in GARBAGE:
        assert is_closed(ranks.connect(sent)), sent
    second = ranks.hold(1)
    assert second._linked.wait(WAIT_S) and first.lost is None
    token = json.loads(ranks.store.get(KEY))["token"]
    again = {"token": token, "rank": 1, "host": "", "mates": [1]}
    assert is_closed(ranks.connect(json.dumps(again).encode() + b"\n"))  # of another attempt
    assert first.lost is None


def test_the_longest_word_arrives_whole_and_moves_no_terminal(ranks: Ranks) -> None:
    first, second = ranks.hold(0), ranks.hold(1)
    second.leave("\x1b[2J" + "\U0001f600" * 2 * WORD)
    until(lambda: first.lost is not None)
    assert first.lost is not None and first.lost.text.endswith(
        "failed: \\x1b[2J" + "\U0001f600" * (WORD - 4)
    )


def test_the_word_of_a_rank_that_was_gone_before_rank_0_came_is_heard(ranks: Ranks) -> None:
    ranks.hold(1).leave("job.toml: no such file")
    first = ranks.hold(0)
    until(lambda: first.lost is not None)
    assert first.lost is not None and first.lost.text.endswith("failed: job.toml: no such file")
    assert first.lost.rank == 1


@pytest.mark.parametrize(
    "left",
    [
        {"host": "127.0.0.1", "port": 0, "token": "old"},
        {"leaves": ""},
        {"rank": 0, "text": "rank 0 on host-0 failed: it", "died": False},
    ],
)
def test_what_an_attempt_has_left_in_the_store_is_no_loss_of_the_next(ranks: Ranks, left) -> None:
    with socket.socket() as nobodys:  # none other comes to listen there
        nobodys.bind(("127.0.0.1", 0))
        port = {"port": nobodys.getsockname()[1]} if "port" in left else {}
        ranks.store.set(KEY, json.dumps({**left, **port}))
        second = ranks.hold(1, restarts=True)
        first = ranks.hold(0, restarts=True)
        names = {line.attempt(f"attempt{i}", WAIT_S) for i, line in enumerate((first, second))}
    assert names == {json.loads(ranks.store.get(KEY))["token"]}
    assert second.lost is None and first.lost is None


@pytest.mark.parametrize(
    ("own", "is_named", "everywhere"),
    [("127.0.0.1", False, False), ("127.0.0.1", True, True), ("127.0.1.1", True, True), ("::1", True, True)],
)  # fmt: skip
def test_rank_0_listens_where_others_reach_it_and_nowhere_else(own, is_named, everywhere) -> None:
    with listening(own, is_named) as door:
        assert is_loopback(door.getsockname()[0]) != everywhere
        hosts = ["127.0.0.1"]
        if everywhere and door.family == socket.AF_INET6:
            with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
                hosts.append("::1")
        for host in hosts:
            socket.create_connection((host, door.getsockname()[1]), WAIT_S).close()


def test_names_of_loopback() -> None:
    assert all(
        map(is_loopback, ("127.0.0.1", "127.0.1.1", "::1", "localhost", "localhost.localdomain"))
    )
    assert not any(map(is_loopback, ("10.0.0.1", "fe80::1%eth0", "host-0", "localhosts", "")))


def test_an_environment_that_tells_half_is_a_mistake_of_its_own(monkeypatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for port in ("", "a port"):
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(UsageError, match=r"RANK=1 and WORLD_SIZE=2 .* set all four"):
            rendezvous(1.0)
    assert not is_one_host()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert is_one_host()  # which opens nothing to others


class _Said:
    """A line, and a world that is left."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def leave(self, word: str, died: bool) -> None:
        self.said.append((word, died))

    def close(self, drain: bool) -> None:
        self.said.append(drain)


@pytest.mark.parametrize(
    ("error", "said"), [(None, [True]), (ValueError("a\nb"), [False, ("ValueError: a", True)])]
)
def test_a_loop_that_fails_tells_the_others_why(monkeypatch, error, said) -> None:
    if error is not None:
        monkeypatch.setattr(sys, "last_value", error, raising=False)
    else:
        monkeypatch.delattr(sys, "last_value", raising=False)
    both: Any = _Said()
    _leave(both, both)
    assert both.said == said
