"""A socket, and uvicorn on it until a signal: what runs is finished first."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from partita.base.errors import UsageError

BACKLOG = 2048
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def bound(host: str, port: int) -> socket.socket:
    """A socket of a free port (0: any), which nobody can connect to yet. Raises UsageError where the
    address is none of this host's, or is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        text = (
            f"cannot serve at {host}:{port}: {error.strerror or error}; --port 0 takes a free one"
        )
        raise UsageError(text, key="port") from None
    return made


def address_of(listener: socket.socket) -> str:
    """http://HOST:PORT."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: FastAPI, listener: socket.socket, drain_s: int) -> None:
    """Answers until SIGTERM or Ctrl-C; then takes no connections, gives requests `drain_s` seconds to end
    and cuts off the rest. A second Ctrl-C does not wait."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=drain_s,
        backlog=BACKLOG, server_header=False,
    )  # fmt: skip
    with _taken():
        uvicorn.Server(config).run(sockets=[listener])


@contextmanager
def _taken() -> Iterator[None]:
    """uvicorn raises a signal anew once it has ended for it: here that is the end as it should be."""
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
