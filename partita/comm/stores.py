"""Where ranks find each other: a file on one host, torchrun's store between hosts; and the last words that
ranks without a common board leave there."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from partita.comm.processes import torchrun_store
from partita.comm.table import Status

WORD_S = 1.0  # for the ranks of other hosts to leave their last word


def file_store(path: Path, size: int) -> Any:
    """A store in a file that all ranks see: nobody listens."""
    return dist.FileStore(str(path), size)


def rendezvous() -> Any:
    """The store of the ranks that torchrun (or an environment like its) started; each restart has keys of
    its own, since the agent's store outlives an attempt. Call it once."""
    store, _, _ = next(iter(dist.rendezvous("env://")))
    attempt = torchrun_store().get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"attempt{attempt}", store)


def last_words(store: Any, own: Status, size: int) -> Sequence[Status | None]:
    """Every rank's last call: a rank that fails leaves its own and waits a moment for the others'; None
    where one says nothing. Clocks of hosts differ: a call's age is told."""
    names = [f"partita/last/{r}" for r in range(size)]
    found: list[Status | None] = [None] * size
    with contextlib.suppress(RuntimeError):  # the store's host may be the one that is lost
        now = time.monotonic()
        store.set(names[own.rank], json.dumps({**asdict(own), "at": now - own.at}))
        for r, name in enumerate(names):
            left = max(now + WORD_S - time.monotonic(), 0.05)
            with contextlib.suppress(RuntimeError):
                store.wait([name], timedelta(seconds=left))
                told = json.loads(store.get(name))
                found[r] = Status(**{**told, "at": time.monotonic() - told["at"]})
    found[own.rank] = own
    return found
