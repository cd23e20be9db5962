"""`python -m struck train JOB`: the verb, one rank of which is struck from inside when it comes to a place.

    STRIKE   "RANK HOW PLACE": HOW is a signal's number for the rank, or with an `a` before it for its agent
    places   `import:torch`, as it is looked for; `call:MODULE:NAME`, as that is called;
             `STEP:ACTIVITY` of train/control.py, as it begins

The time of the strike is left in the file `struck`.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

CONTROL = "partita.train.control"


class Strike:
    """What befalls this process, and where: a finder of modules that never finds any itself."""

    def __init__(self, how: str, place: str) -> None:
        self.how, self.is_over = how, False
        self.kind, self.module, self.name = [*place.split(":"), "", ""][:3]
        if self.kind.isdigit():
            self.kind, self.module, self.name = "note", CONTROL, place

    def hit(self) -> None:
        """Does it, once: an evaluation is a forward too."""
        if self.is_over:
            return
        self.is_over = True
        Path("struck").write_text(str(time.time()))
        pid = os.getppid() if self.how.startswith("a") else os.getpid()
        os.kill(pid, int(self.how.removeprefix("a")))

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """Strikes as a module is looked for, or has it armed once it is loaded."""
        if name != self.module:
            return None
        if self.kind == "import":
            self.hit()
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        load = spec.loader.exec_module

        def loaded(module: ModuleType) -> None:
            load(module)
            self._arm(module)

        spec.loader.exec_module = loaded  # type: ignore[method-assign]
        return spec

    def _arm(self, module: ModuleType) -> None:
        if self.kind == "note":
            note = module.Control.note

            def noted(control: Any, rank: int, step: int, activity: str) -> None:
                note(control, rank, step, activity)
                if f"{step}:{activity}" == self.name:
                    self.hit()

            module.Control.note = noted  # type: ignore[attr-defined]
            return
        owner: Any = module
        *outer, last = self.name.split(".")
        for part in outer:
            owner = getattr(owner, part)
        setattr(owner, last, self._struck(getattr(owner, last)))

    def _struck(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def struck(*args: Any, **words: Any) -> Any:
            self.hit()
            return call(*args, **words)

        return struck


def main() -> None:
    rank, how, place = os.environ["STRIKE"].split()
    if os.environ["RANK"] == rank:
        sys.meta_path.insert(0, Strike(how, place))  # type: ignore[arg-type]
    from partita.cli.main import main as command

    command()


if __name__ == "__main__":
    main()
