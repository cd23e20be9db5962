"""A socket, and uvicorn on it until a signal: what runs is finished first."""

from __future__ import annotations

import signal
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from partita.base.errors import UsageError

BACKLOG = 2048
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class Secret:
    """What https needs: a certificate (PEM, its chain behind it) and its key."""

    certificate: Path
    key: Path | None = None

    @staticmethod
    def of(certificate: Path | None, key: Path | None) -> Secret | None:
        """None without a certificate. Raises UsageError for files that are no such pair."""
        if certificate is None:
            if key is not None:
                raise UsageError("--ssl-keyfile goes with --ssl-certfile", key="ssl_certfile")
            return None
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: "")
        except (OSError, ValueError) as error:
            files = certificate if key is None else f"{certificate} and {key}"
            text = f"{files}: no certificate and its key in PEM without a password: {error}"
            raise UsageError(text, key="ssl_certfile") from None
        return Secret(certificate, key)


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


def address_of(listener: socket.socket, secret: Secret | None = None) -> str:
    """http://HOST:PORT, or https."""
    host, port = listener.getsockname()[:2]
    kind = "http" if secret is None else "https"
    return f"{kind}://[{host}]:{port}" if ":" in host else f"{kind}://{host}:{port}"


def serve(
    app: FastAPI, listener: socket.socket, drain_s: int, secret: Secret | None = None
) -> None:
    """Answers until SIGTERM or Ctrl-C; then takes no connections, gives requests `drain_s` seconds to end
    and cuts off the rest. A second Ctrl-C does not wait."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=drain_s,
        backlog=BACKLOG, server_header=False,
        ssl_certfile=secret and secret.certificate, ssl_keyfile=secret and secret.key,
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
