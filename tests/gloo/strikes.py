"""Strikes a rank of a real run at a chosen place, from inside it: the signals are real, the place exact."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partita.comm.processes import start_ranks
from partita.train.control import NotedWhere
from partita.train.launch.rank import run_rank


@dataclass(frozen=True)
class Strike:
    """`how` is done to `rank` in `step` when it begins `at` (an activity of train/control.py), or at its
    `call`-th collective there; or as it `reports`."""

    how: str  # kill stop exit sleep; nan: in the first number of the last weight, or of its gradient;
    # full: no file may grow any more; fill: writes until the current disk is full; server: kills what
    # started it; hold: the interpreter's lock, in C; fault: reads address 0; eat: all memory of the
    # cgroup that the file `group` names; slow: sleeps a little from this step on;
    # flip: a bit of a weight, when the step is computed for the second time
    at: str
    step: int = 3
    rank: int = 1
    call: int = 0
    reports: bool = False

    def __str__(self) -> str:
        return f"{self.how}-{self.at}{self.call or ''}{'-reports' * self.reports}"

    def hit(self) -> None:
        """Does it."""
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self.how == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif self.how == "server":
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(60)
        elif self.how == "hold":
            ctypes.PyDLL(None).sleep(60)
        elif self.how == "fault":
            ctypes.string_at(0)
        elif self.how == "eat":
            Path(Path("group").read_text(), "cgroup.procs").write_text(str(os.getpid()))
            ballast = [b"x" * (1 << 20) for _ in range(1 << 12)]
            raise AssertionError(f"{len(ballast)} MB were there")
        elif self.how == "slow":
            time.sleep(0.2)
        elif self.how == "exit":
            os._exit(0)
        elif self.how == "full":
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        elif self.how == "fill":
            with Path("ballast").open("wb", buffering=0) as file, suppress(OSError):
                while file.write(bytes(4096)):
                    pass
        else:
            time.sleep(60)


def struck(strike: Strike):
    """Stands for partita.train.launch.launcher.start_ranks."""

    def start(num_ranks: int, _: Any, args: tuple[Any, ...]):
        return start_ranks(num_ranks, enter, (strike, *args))

    return start


def enter(rank: int, channel: Any, strike: Strike, spec: Any) -> None:
    """The rank's function: run_rank, with the strike armed."""
    if rank == strike.rank and strike.reports:
        channel = _Struck(strike)
    elif rank == strike.rank:
        _arm(strike)
    run_rank(rank, channel, spec)


@dataclass(frozen=True)
class _Struck:
    """The way to a launcher, on which a rank is struck."""

    strike: Strike

    def send(self, report: Any) -> None:
        self.strike.hit()


def _poison(strike: Strike) -> None:
    """A NaN in the rank's last weight when forward begins, or in its gradient when backward is over."""
    from partita.train.step import Model

    begin, finish = Model.begin, Model.finish_loss

    def begun(self: Model, batch: Any) -> None:
        begin(self, batch)
        if strike.at == "forward" and batch.step + 1 == strike.step:
            unit = self.units[-1]
            unit.master[unit.places[-1][1]] = float("nan")
            unit.round_working()

    def finished(self: Model, loss: Any, step: int) -> float:
        if strike.at == "backward" and step + 1 == strike.step:
            unit = self.units[-1]
            unit.gradient[unit.places[-1][1]] = float("nan")
        return finish(self, loss, step)

    Model.begin, Model.finish_loss = begun, finished  # type: ignore[method-assign]


def _flip(strike: Strike) -> None:
    """A bit of the rank's first weight that every token meets."""
    from partita.train.step import Model

    begin, times = Model.begin, []

    def begun(self: Model, batch: Any) -> None:
        begin(self, batch)
        if batch.step + 1 == strike.step:
            times.append(batch.step)
            if len(times) == 2:
                places = ((u, at) for u in self.units for n, at, _ in u.places if "attention" in n)
                unit, at = next(places)
                unit.working[at : at + 1] *= 2

    Model.begin = begun  # type: ignore[method-assign]


def _arm(strike: Strike) -> None:
    if strike.how in ("nan", "flip"):
        (_poison if strike.how == "nan" else _flip)(strike)
        return
    before = NotedWhere.__setattr__
    place = {"here": False}

    def moved(self: NotedWhere, name: str, value: object) -> None:
        before(self, name, value)
        if name == "activity":
            later = strike.how == "slow" and self.step > strike.step
            place["here"] = (later or self.step == strike.step) and value == strike.at
            if place["here"] and not strike.call:
                strike.hit()

    NotedWhere.__setattr__ = moved  # type: ignore[method-assign]
    if strike.call:
        from partita.comm.shm.shm_comm import ShmComm

        enters = ShmComm.enter
        left = [strike.call]

        def entered(self: ShmComm, *args: Any) -> Any:
            note = enters(self, *args)
            left[0] -= place["here"]
            if place["here"] and left[0] == 0:
                strike.hit()
            return note

        ShmComm.enter = entered  # type: ignore[method-assign]
