"""A package that can be called like the function it is named after.

`partita.schedule` is a folder and, in the public API, a function: `partita.schedule("1f1b", ...)`. As
soon as any module of the folder is imported, Python binds the package under that name; so the package
itself answers the call.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import Any


def answers_calls(package: str, module: str) -> None:
    """Calling the package calls the function of its name in `module`, imported on the first call."""
    function = package.rpartition(".")[2]

    class CallablePackage(ModuleType):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(import_module(module), function)(*args, **kwargs)

    sys.modules[package].__class__ = CallablePackage
