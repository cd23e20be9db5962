"""Where ranks find each other: a file on one host, torchrun's store between hosts."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from partita.base.errors import CommError, UsageError
from partita.comm.liveness.lifeline import Lifeline
from partita.comm.liveness.rollcall import RollCall
from partita.comm.processes import torchrun_store

CALLS = itertools.count()  # of `rendezvous`: a program may train twice


def file_store(path: Path, size: int) -> Any:
    """A store in a file that all ranks see: nobody listens."""
    return dist.FileStore(str(path), size)


def rendezvous(timeout_s: float, line: Lifeline | None = None) -> RollCall:
    """The store of the ranks that torchrun (or an environment like its) started; each restart and each call
    has keys of its own, since the agent's store outlives both. Every rank calls it as often."""
    env = torchrun_store()
    try:
        found = dist.rendezvous("env://", timeout=timedelta(seconds=timeout_s))
        store, rank, size = next(iter(found))
    except ValueError:
        raise UsageError(
            f"RANK={env.get('RANK')} and WORLD_SIZE={env.get('WORLD_SIZE')} make this a rank of several, and "
            f"MASTER_ADDR={env.get('MASTER_ADDR', '')} MASTER_PORT={env.get('MASTER_PORT', '')} do not tell "
            "where their store is: set all four, as torchrun does, or none"
        ) from None
    except RuntimeError as error:
        place = f"{env.get('MASTER_ADDR')}:{env.get('MASTER_PORT')}"
        text = str(error).splitlines()[0]
        raise CommError(
            f"rank {env.get('RANK')} cannot reach the store of rank 0's host at {place}: {text}"
        ) from None
    attempt = f"attempt{env.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if line is not None:
        attempt = line.attempt(attempt, timeout_s)
    prefix = f"{attempt}/{next(CALLS)}"
    return RollCall(dist.PrefixStore(prefix, store), rank, size, timeout_s, line)
