"""Kernels written in Triton, which CUDA builds of torch bring along: taken where they are there and compile.

What they make, torch's operators make too, in more passes: where Triton is missing, or has failed once (one
warning says why), the caller goes that way. Compiling takes about a second for each kernel and kind of
arguments, once; Triton keeps the result on disk.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from threading import RLock
from typing import Any

import torch
from torch import Tensor

ONE = (
    RLock()
)  # thread ranks compile and launch one after another: Triton promises nothing of threads


@dataclass
class Kernels:
    """The functions of `module`, which imports Triton when it is first asked for. A module that has
    `prove(name, like)` is asked by it, before each call, whether its kernels make what operators make where
    `like` lies; where not, it raises.

    One for each user, at module level, as `failed` is a finding about the process, not about a run: whether
    its Triton, driver and compiler can do this. No run of it would find otherwise, and ranks that are
    threads agree.
    """

    module: str
    failed: str = ""

    def takes(self, device: torch.device) -> bool:
        """Whether tensors of the device may go to them."""
        return device.type == "cuda" and not self.failed

    def __call__(self, like: Tensor, name: str, *given: Any) -> Any:
        """What the function `name` returns, run on the device of `like`; None: torch must do it."""
        if not self.takes(like.device):
            return None
        if find_spec("triton") is None:
            self.failed = "Triton is not installed"
            return None
        with ONE, torch.cuda.device_of(like):
            return None if self.failed else self._tried(like, name, given)

    def _tried(self, like: Tensor, name: str, given: tuple[Any, ...]) -> Any:
        try:
            module = import_module(self.module)
            if hasattr(module, "prove"):
                module.prove(name, like)
            return getattr(module, name)(*given)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler's errors are of many kinds
            lines = (str(error).strip() or "no message").splitlines()
            said = " ".join(dict.fromkeys((lines[0], lines[-1])))  # where, and why
            self.failed = f"{type(error).__name__}: {said}"
            warnings.warn(
                f"{self.module}.{name} failed ({self.failed}); torch's operators, which are slower, do it",
                stacklevel=3,
            )
            return None
