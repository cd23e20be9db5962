"""Which level each file of the package is on: docs/map.md as a table."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "partita"
TORCH_LINE = 6

LEVELS = {
    "base": 0, "spec": 1, "record": 1, "schedule": 2, "cost": 2, "simulate": 4, "planner": 5,
    "plots": 5, "comm": 6, "model": 8, "train": 9, "serve": 10, "verify": 10, "tune": 10,
    "report": 10, "cli": 11, "launch": 5,
}  # fmt: skip
ROOMS = {  # of a unit, in their order; files beside a unit's rooms stand at .2
    "planner/bounds": 0.3, "planner/search": 0.4, "planner/answers": 0.5,
    "simulate/serving": 0.3, "simulate/published": 0.3, "planner/serving": 0.6,
    "train/data": 0.1, "train/optimizer": 0.1, "train/launch": 0.3,
}  # fmt: skip
PURE = ("rules.py", "balance.py", "halo.py", "counts.py", "__init__.py")  # of a room
JOINS_ROOMS = ("laid", "exact")  # beginnings of names, pure


def files() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def place(file: Path) -> tuple[float, str]:
    """(level, unit) of a file. Units of one level must not import each other, whatever their rooms'.

    parallel lies on both sides of the torch line: the contract (3.0), each room's rules (3.1), what
    joins or executes them (3.2); then regions and units (7.0) and each room's torch code (7.1).
    """
    parts = file.relative_to(PACKAGE).parts
    if len(parts) == 1:
        return (0.0, "root") if parts[0] == "__init__.py" else (12.0, "root")
    if parts[0] != "parallel":
        room = ROOMS.get("/".join(parts[:2]))
        if room:
            return LEVELS[parts[0]] + room, f"{parts[0]}.{parts[1]}"
        divided = any(name.startswith(f"{parts[0]}/") for name in ROOMS)
        return LEVELS[parts[0]] + (0.2 if divided else 0.0), parts[0]
    if len(parts) == 2 or parts[1] in ("exact", "kernels"):
        contract = parts[1] in ("__init__.py", "room.py", "read.py")
        joins = parts[1].startswith(JOINS_ROOMS)
        return (3.0 if contract else 3.2 if joins else 7.0), "parallel"
    pure = parts[-1] in PURE
    return (3.1 if pure else 7.1), f"parallel.{parts[1]}"


def imports(file: Path) -> Iterator[tuple[int, Path]]:
    """(line, file) of everything of the package that `file` imports, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            found = _file_of(name)
            if found:
                yield node.lineno, found


def _file_of(name: str) -> Path | None:
    """The file that importing `name` (a module, or a name in one) reads."""
    parts = name.split(".")
    if parts[0] != "partita" or len(parts) == 1:
        return None
    for path in (ROOT.joinpath(*parts), ROOT.joinpath(*parts[:-1])):
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.exists():
                return file
    return None


def module(file: Path) -> str:
    """The dotted name of a file."""
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")
