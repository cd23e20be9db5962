"""Dropout, and whatever else plain modules draw, as a pure function of (seed, place): torch's generator of
the process is seeded while such a module runs, and put back behind it.

Thread ranks share that generator, and one would draw what another's next number was: they hand a generator of
their own to every operator that draws. Both ways give the same numbers, those of `torch.manual_seed(...)`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from partita.base.errors import UsageError
from partita.comm.random.seeds import MASK, key_of
from partita.comm.threads.local import RankThread


@contextmanager
def drawing(seed: int, *place: object, device: torch.device | None = None) -> Iterator[None]:
    """What is drawn inside depends on the seed and the place alone ('stage', 3, 'microbatch', 0, ...), on no
    other rank and on nothing drawn before. On thread ranks that holds on the CPU. Raises UsageError there
    where torch.utils.checkpoint runs what draws: it could not draw the same again."""
    low, high = key_of(seed, "drawn", " ".join(map(str, place)))
    number = high << 32 | low & MASK
    if isinstance(threading.current_thread(), RankThread):
        with _Own(number):
            yield
        return
    found = [torch.default_generator]
    if device is not None and device.type == "cuda":
        at = torch.cuda.current_device() if device.index is None else device.index
        found.append(torch.cuda.default_generators[at])
    before = [generator.get_state() for generator in found]
    for generator in found:
        generator.manual_seed(number)
    try:
        yield
    finally:
        for generator, state in zip(found, before, strict=True):
            generator.set_state(state)


class _Own(TorchDispatchMode):
    """Of this thread alone: operators that draw take this generator, where none was given."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The operator itself, with the generator."""
        given = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            into, at = _with_generator(func)
            alone = len(args) <= at or args[at] is None
            if into is not None and alone and given.get("generator") is None:
                _refuse_drawn_again(func)
                given["generator"] = self._on(_device(args, given))
                return into(*args[:at], **given)
        return func(*args, **given)

    def _on(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self.number)
        return self._generators[device]


def _device(args: Sequence[Any], given: Mapping[str, Any]) -> torch.device:
    tensors = (x.device for x in args if isinstance(x, torch.Tensor))
    return next(tensors, torch.device(given.get("device") or "cpu"))


@lru_cache(maxsize=256)
def _with_generator(func: Any) -> tuple[Any, int]:
    """The operator that does the same and takes a generator, and that argument's place; None for none."""
    names = [a.name for a in func._schema.arguments]
    for overload in (func._overloadname, *func.overloadpacket.overloads()):
        other = getattr(func.overloadpacket, overload or "default")
        takes = [a.name for a in other._schema.arguments]
        if "generator" in takes and [n for n in takes if n != "generator"] == [
            n for n in names if n != "generator"
        ]:
            return other, takes.index("generator") if "generator" in names else len(names)
    return None, 0


def _refuse_drawn_again(func: Any) -> None:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            raise UsageError(
                f"{func} draws inside torch.utils.checkpoint, which draws again in backward from the "
                "generator of the process; thread ranks share that: start them as processes (torchrun)"
            )
        frame = frame.f_back
