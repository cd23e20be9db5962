"""Starts local ranks as processes: one fork server with torch loaded, so that a rank starts in a fraction
of a second; one OpenMP thread a rank; ranks leave when their launcher dies.
"""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType
from typing import Any

from partita.base.errors import CommError

_PR_SET_PDEATHSIG = 1
# torch.optim loads torch._dynamo when it is first used: a second and 26 MB, shared by all ranks this way
PRELOAD = ("torch", "torch._dynamo", "partita.train.launch.rank")
STOPS = (signal.SIGTERM, signal.SIGINT)
MAIN = "__main__"


def start_ranks(
    num_ranks: int,
    target: Callable[..., None],
    args: Sequence[Any],
    preload: Sequence[str] = PRELOAD,
) -> list[tuple[BaseProcess, Connection]]:
    """Starts target(rank, connection, *args) in `num_ranks` processes.

    Returns each process with the launcher's end of a one-way connection from it. `target` must be a
    module's function; no rank runs the main module, unless `target` is of it. Environment:
    OMP_NUM_THREADS=1 where the user did not set it.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    resource_tracker.ensure_running()  # it opens the signals that are held back
    with _held_back():
        forkserver.ensure_running()
    with ExitStack() as hidden:
        if target.__module__ != MAIN:
            hidden.enter_context(_main_hidden())
        return _start(context, num_ranks, target, args)


def _start(
    context: ForkServerContext, num_ranks: int, target: Callable[..., None], args: Sequence[Any]
) -> list[tuple[BaseProcess, Connection]]:
    found: list[tuple[BaseProcess, Connection]] = []
    try:
        for rank in range(num_ranks):
            reader, writer = context.Pipe(duplex=False)
            process = context.Process(
                target=_enter,
                args=(os.getpid(), rank, writer, target, tuple(args)),
                name=f"rank-{rank}",
            )
            process.start()
            writer.close()
            found.append((process, reader))
    except BaseException:
        end_ranks(found)
        raise
    return found


def end_ranks(ranks: Sequence[tuple[BaseProcess, Connection]]) -> None:
    """Kills what still runs, a stopped process too, and waits for all."""
    for process, _ in ranks:
        if process.is_alive():
            process.kill()
    for process, _ in ranks:
        process.join(5)


# The exit code that multiprocessing gives a process whose fork server did not tell it
UNKNOWN = 255


def server_is_gone(within_s: float = 2.0) -> bool:
    """Whether the fork server has died: its ranks ended with it, and left no exit codes. Its pipes close some
    time before the system has it dead."""
    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    until = time.monotonic() + within_s
    while server is not None and is_alive(server):
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return server is not None


@contextmanager
def _main_hidden() -> Iterator[None]:
    """multiprocessing has a new process run the main module of the one that starts it: a user's script
    without `if __name__ == "__main__"` would start its run again in every rank."""
    main = sys.modules[MAIN]
    sys.modules[MAIN] = ModuleType(MAIN)
    try:
        yield
    finally:
        sys.modules[MAIN] = main


@contextmanager
def _held_back() -> Iterator[None]:
    """A process started in here never sees SIGTERM and Ctrl-C, nor do its children before they ask:
    both may be sent to the whole group, and the fork server must outlive the ranks' last save."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _enter(
    launcher: int, rank: int, writer: Connection, target: Callable[..., None], args: tuple[Any, ...]
) -> None:
    for number in STOPS:  # whoever stops a run tells the launcher too
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    leave_with_parent()
    leave_without(launcher)
    with suppress(BrokenPipeError):  # a launcher that was stopped meanwhile does not listen
        target(rank, writer, *args)


def leave_with_parent() -> None:
    """Linux: the kernel kills this process when its parent (the fork server) dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def leave_without(launcher: int, last: Callable[[], None] = lambda: None) -> None:
    """Ends this process within half a second of that one's death, after `last`: a thread looks. The fork
    server outlives a killed launcher for a moment, and a rank of torchrun has no other tie to its agent."""
    import threading
    import time

    def look() -> None:
        while True:
            time.sleep(0.5)
            if not is_alive(launcher):
                last()
                os._exit(71)

    threading.Thread(target=look, name="launcher-watch", daemon=True).start()


def on_loopback() -> None:
    """Keeps this process's sockets to this host. Environment: GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, unless
    set."""
    for library in ("GLOO", "NCCL"):
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", loopback)


def for_gpu() -> None:
    """Before this process first uses its GPU. Environment, unless set: CUDA_DEVICE_MAX_CONNECTIONS, a queue
    for every lane, since in one that two share a message waits behind another; CUBLAS_WORKSPACE_CONFIG, by
    which products repeat bit for bit."""
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def limits_onednn() -> bool:
    """Whether oneDNN is told which instructions to do without. Environment: ONEDNN_MAX_CPU_ISA,
    DNNL_MAX_CPU_ISA."""
    return bool({"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & os.environ.keys())


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _state(pid) != "Z"


def is_stopped(pid: int) -> bool:
    """Whether a process is held by SIGSTOP or a debugger; False where the system does not tell."""
    return _state(pid) in ("T", "t")


def _state(pid: int) -> str:
    """The letter by which Linux tells what a process does; empty elsewhere."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 (a pseudo file)
            return file.read().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def torchrun_rank() -> tuple[int, int, int] | None:
    """(rank, world size, local rank) when torchrun started this process, else None."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), local


def torchrun_agent() -> int:
    """The process of the agent that started this rank. Raises CommError where it is gone already: a child
    that has lost its parent is handed to one that is no Python (init, a container's shell). A shell in
    between, which the agent started in a session of its own, is as good."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return parent
    try:
        program = Path(f"/proc/{parent}/exe").readlink().name
    except OSError:  # another user's, such as init
        program = ""
    if "python" not in program and os.getsid(parent) != os.getsid(0):
        raise CommError(f"rank {os.environ.get('RANK')} starts, and torchrun's agent is gone")
    return parent


def datasets_cache() -> Path:
    """Where Hugging Face's `datasets` keeps what it has loaded. Environment: HF_DATASETS_CACHE, HF_HOME."""
    home = os.environ.get("HF_HOME", "~/.cache/huggingface")
    return Path(os.environ.get("HF_DATASETS_CACHE", f"{home}/datasets")).expanduser()


def this_host() -> str:
    """Names the ranks that torchrun's agent has started here, as no other agent's."""
    return f"{socket.gethostname()} {os.getppid()}"


def is_one_host() -> bool:
    """Whether torchrun started all ranks on this host, under one agent; or there is but one."""
    size = os.environ.get("WORLD_SIZE", "")
    return os.environ.get("LOCAL_WORLD_SIZE", "1") == size


def torchrun_store() -> dict[str, str]:
    """Rendezvous of torchrun: rank, world, ranks of this host, address, port, the restart count."""
    names = (
        "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
        "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS",
    )  # fmt: skip
    return {n: os.environ[n] for n in names if n in os.environ}
