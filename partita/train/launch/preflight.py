"""Whether ranks can work together: what each runs, and where, told to all before anything is built."""

from __future__ import annotations

import json
import platform
import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import psutil
import torch
import xxhash

import partita
from partita.base.errors import UsageError
from partita.comm.protocol import Comm, World

SITE = "preflight"


@dataclass(frozen=True)
class Facts:
    """A rank's host, the versions it runs (its code among them, by digest), its clock, and what is free of
    the run folder's disk and of the host's memory."""

    rank: int
    host: str
    versions: dict[str, str]
    clock_s: float
    disk_free_bytes: int
    memory_free_bytes: int


@lru_cache(maxsize=1)
def code_digest() -> str:
    """Of every Python file of the package."""
    root = Path(partita.__file__).parent
    state = xxhash.xxh3_64()
    for path in sorted(root.rglob("*.py")):
        state.update(f"{path.relative_to(root)}\n".encode())
        state.update(path.read_bytes())
    return state.hexdigest()


def facts(rank: int, folder: Path) -> Facts:
    """This rank's."""
    versions = {
        "partita": partita.__version__,
        "code": code_digest(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }
    free = shutil.disk_usage(folder).free
    memory = psutil.virtual_memory().available
    return Facts(rank, socket.gethostname(), versions, time.time(), free, memory)


def tell_all(comm: Comm, text: str) -> list[str]:
    """Every rank's text, by rank. Communicates its length and then the text, padded to the longest."""
    raw = text.encode()
    lengths = [n for (n,) in comm.all_gather(torch.tensor([[len(raw)]]), site=SITE).tolist()]
    padded = raw.ljust(-(-max(lengths) // 8) * 8, b" ")
    words = torch.from_numpy(np.frombuffer(padded, np.int64).copy()).unsqueeze(0)
    rows = comm.all_gather(words, site=SITE).numpy()
    return [row.tobytes()[:n].decode() for row, n in zip(rows, lengths, strict=True)]


def exchange(comm: Comm, folder: Path) -> list[Facts]:
    """Every rank's facts; clocks are read as all leave a barrier."""
    code_digest()
    comm.barrier(site=SITE)
    mine = facts(comm.rank, folder)
    return [Facts(**json.loads(text)) for text in tell_all(comm, json.dumps(asdict(mine)))]


def mismatches(found: Sequence[Facts]) -> dict[int, str]:
    """By rank, in what it differs from rank 0."""
    first = found[0]
    return {
        x.rank: "; ".join(
            f"{name} {x.versions.get(name)}, rank 0 on {first.host} has {stated}"
            for name, stated in first.versions.items()
            if x.versions.get(name) != stated
        )
        for x in found
        if x.versions != first.versions
    }


@dataclass(frozen=True)
class Met:
    """Ranks that have met: the whole world's Comm, and what each has told."""

    comm: Comm
    about: Sequence[Facts]


def preflight(world: World, folder: Path) -> Met | None:
    """Raises UsageError on all ranks where one runs another version than rank 0; None where a rank is alone.
    A collective of the whole world, before its other groups are made."""
    comm = world.make(range(world.size), axis="world", lane=SITE)
    if comm is None or comm.size == 1:
        return None
    found = exchange(comm, folder)
    different = mismatches(found)
    if different:
        rank = min(different)
        raise UsageError(
            f"ranks are not alike: rank {rank} on {found[rank].host} has {different[rank]} "
            f"({len(different)} of {len(found)} ranks differ): install the same everywhere; "
            "`partita doctor` says more, --no-preflight runs all the same"
        )
    return Met(comm, found)
