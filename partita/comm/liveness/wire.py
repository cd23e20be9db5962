"""A client of torch's TCPStore that needs no torch: what a rank can say before it has loaded it.

    VALIDATE   0, the magic number, 4 bytes                 as every client begins
    SET        1, key, value                                no answer
    GET        3, key -> value                              of a key that is there
    WAIT       6, count (8 bytes), keys -> 0, 1 byte        once all are there

Numbers are little-endian, keys and values led by their length in 8 bytes; torch's own clients put a slash
before a key (torch/csrc/distributed/c10d/TCPStoreBackend.hpp). Both of its servers speak it.
"""

from __future__ import annotations

import socket
import struct

_MAGIC = 0x3C85F7CE
_VALIDATE, _SET, _GET, _WAIT = 0, 1, 3, 6


class StoreWire:
    """One connection to the store at an address. Every method raises OSError where it is out of reach."""

    def __init__(self, host: str, port: int, timeout_s: float | None = None) -> None:
        self.socket = socket.create_connection((host, port), timeout_s)
        self.socket.sendall(struct.pack("<BI", _VALIDATE, _MAGIC))

    def set(self, key: str, value: str) -> None:
        """Sets a key."""
        self.socket.sendall(bytes([_SET]) + _text("/" + key) + _text(value))

    def ask(self, key: str) -> None:
        """Asks for a key; the answer comes once there is one."""
        self.socket.sendall(bytes([_WAIT]) + struct.pack("<Q", 1) + _text("/" + key))

    def answer(self, key: str) -> str:
        """The value of what was asked for."""
        if self._take(1) != b"\0":
            raise ConnectionError("the store gave up a wait")
        self.socket.sendall(bytes([_GET]) + _text("/" + key))
        (size,) = struct.unpack("<Q", self._take(8))
        return self._take(size).decode()

    def get(self, key: str) -> str:
        """The value of a key, once there is one."""
        self.ask(key)
        return self.answer(key)

    def _take(self, size: int) -> bytes:
        found = b""
        while len(found) < size:
            more = self.socket.recv(size - len(found))
            if not more:
                raise ConnectionError("the store closed the connection")
            found += more
        return found

    def close(self) -> None:
        """Lets it go."""
        self.socket.close()


def _text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw
