"""The connections of a lifeline (lifeline.py): a message is a line of JSON; and where rank 0 listens.

Anybody may connect: what is no message, or too long for one, ends a connection and nothing else.
"""

from __future__ import annotations

import ipaddress
import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

WORD = 1024  # characters of what a rank says at its end, up to 12 bytes each
LONGEST = 16 * WORD  # bytes of a message; who sends more is no rank
BACKLOG = 4096  # ranks that connect at once
QUIET_S = 60  # until the system sees to it that a firewall does not forget a silent connection


@dataclass
class Link:
    """One end of a connection; at rank 0 with who the other is, `rank` -1 until that is said."""

    socket: socket.socket
    rank: int = -1
    host: str = ""
    mates: tuple[int, ...] = ()  # the ranks of its host
    where: str = ""
    left: bool = False
    rest: bytes = b""

    def __post_init__(self) -> None:
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_KEEPIDLE"):
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, QUIET_S)

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
        except (ValueError, RecursionError):
            return None
        whole = came and len(self.rest) < LONGEST and all(isinstance(x, dict) for x in found)
        return found if whole else None

    def send(self, message: dict[str, Any]) -> None:
        """One line; who is gone wants nothing more."""
        with suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")


def is_loopback(host: str) -> bool:
    """Whether an address, or a name that is one everywhere, is of loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.partition(".")[0] in ("localhost", "ip6-localhost")


def listening(own: str, is_named: bool) -> socket.socket:
    """A socket on the address by which this host has reached the store. Where that is of loopback and the
    store has a name, other hosts reach another address by it, of either family: it is on all of them."""
    if is_named and is_loopback(own):
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        return socket.create_server(("", 0), family=family, backlog=BACKLOG, dualstack_ipv6=both)
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    return socket.create_server((own, 0), family=family, backlog=BACKLOG)
