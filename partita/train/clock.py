"""When the parts of a step begin and end: on the host's clock, or on the device that computes them.

A GPU is told what to do long before it does it: the host's clock around a forward says how long that was
being ordered. There a stamp is an event on the current stream; the device writes its time when it comes
to it. All are read when the step is over, so nothing waits inside it; the first and the last wait, outside.

    begin    the device is idle: the host's clock and an event say one moment
    stamp    a moment of the step, as the device will come to it
    read     seconds on the host's clock of stamps, once the device has come to the last
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch


class Clock(Protocol):
    """Stamps of one step at a time."""

    def begin(self) -> None:
        """The step begins."""
        ...

    def stamp(self) -> Any:
        """Now."""
        ...

    def read(self, stamps: Sequence[Any]) -> list[float]:
        """Seconds on the host's clock."""
        ...


class HostClock:
    """Where the host computes."""

    def begin(self) -> None:
        """Nothing is under way."""

    def stamp(self) -> float:
        """The host's seconds."""
        return time.perf_counter()

    def read(self, stamps: Sequence[float]) -> list[float]:
        """They are that."""
        return list(stamps)


class Event(Protocol):
    """What torch.cuda.Event is taken for."""

    def record(self) -> None:
        """On the current stream."""
        ...

    def synchronize(self) -> None:
        """Until the device has come to it."""
        ...

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds."""
        ...


def timing_event() -> Event:
    """Of the current device."""
    return torch.cuda.Event(enable_timing=True)


@dataclass
class DeviceClock:
    """Where a GPU does: `make` an event, `wait` until the device is idle."""

    make: Callable[[], Event] = timing_event
    wait: Callable[[], None] = torch.cuda.synchronize
    now: Callable[[], float] = time.perf_counter
    _first: Event | None = field(default=None, init=False)
    _origin_s: float = field(default=0.0, init=False)

    def begin(self) -> None:
        """An idle device writes its time as soon as it is told to."""
        self.wait()
        self._first, self._origin_s = self.stamp(), self.now()

    def stamp(self) -> Event:
        """An event on the current stream, ordered and not waited for."""
        made = self.make()
        made.record()
        return made

    def read(self, stamps: Sequence[Event]) -> list[float]:
        """Waits for each of them."""
        assert self._first is not None, "a clock is read of a step that it began"
        for stamp in (self._first, *stamps):
            stamp.synchronize()
        return [self._origin_s + self._first.elapsed_time(stamp) / 1e3 for stamp in stamps]


def clock_of(device: torch.device) -> Clock:
    """The clock of what computes."""
    return DeviceClock() if device.type == "cuda" else HostClock()
