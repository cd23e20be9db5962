"""Runs a contract body on real processes, one World each; results or error texts come back."""

from __future__ import annotations

import time
import traceback
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from partita.comm.processes import start_ranks

JOINED_S = 60  # for ranks to start on a busy machine, whatever their collectives may take


def enter(rank: int, writer: Connection, kind: str, size: int, path: str, body, args) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        world = join(rank, kind, size, Path(path), args[0])
        writer.send(("ok", body(world, *args[1:])))
        world.close()
    except Exception as error:
        writer.send(("error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


def join(rank: int, kind: str, size: int, path: Path, timeout_s: float):
    """A World of a kind: shm, gloo; hosts: gloo whose ranks share a store and nothing else; hierarchy: as
    those, two ranks a host."""
    from partita.comm.distributed.hierarchical import join_hosts
    from partita.comm.distributed.stores import file_store
    from partita.comm.distributed.torch import TorchWorld
    from partita.comm.liveness.rollcall import RollCall
    from partita.comm.processes import on_loopback
    from partita.comm.shm.shm import ShmWorld

    if kind not in ("hosts", "hierarchy"):
        return (ShmWorld if kind == "shm" else TorchWorld)(rank, size, path, timeout_s=timeout_s)
    on_loopback()
    roll = RollCall(file_store(path, size), rank, size, JOINED_S)
    between = TorchWorld(rank, size, None, timeout_s=timeout_s, roll=roll)
    return between if kind == "hosts" else join_hosts(between, f"host {rank // 2}", timeout_s)


def run(
    kind: str,
    size: int,
    folder: Path,
    body,
    *args: Any,
    timeout_s: float = 30,
    while_running=None,
    enough: int | None = None,
):
    """[(how, what)] by rank; a rank that died without a word is ('dead', exit code). The rest is not
    waited for when `enough` have told how they fared."""
    # As runs start theirs: the server that comes first serves all tests of a process
    ranks = start_ranks(size, enter, (kind, size, str(folder / "world"), body, (timeout_s, *args)))
    if while_running is not None:
        while_running([p.pid for p, _ in ranks])
    found: dict[int, tuple[str, Any]] = {}
    try:
        last_word = time.monotonic()
        while True:
            missing = [r for r in range(size) if r not in found]
            quiet = time.monotonic() - last_word
            told = sum(how != "dead" for how, _ in found.values())
            if (
                not missing
                or told == enough
                or quiet > (timeout_s + 3 if found else timeout_s + 30)
            ):
                break  # a stopped rank says nothing
            before = len(found)
            wait([ranks[r][1] for r in missing] + [ranks[r][0].sentinel for r in missing], 0.2)
            for r in missing:
                process, reader = ranks[r]
                try:
                    if reader.poll():
                        found[r] = reader.recv()
                        continue
                except EOFError:
                    pass
                if not process.is_alive():
                    found[r] = ("dead", process.exitcode)
            if len(found) > before:
                last_word = time.monotonic()
    finally:
        for process, _ in ranks:
            process.kill()
            process.join(5)
    return [found.get(r, ("silent", None)) for r in range(size)]
