"""`partita calibrate`: measures this machine and writes its cluster file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from partita.base.config import load_json, to_toml
from partita.base.errors import WriteError
from partita.cli.out import note, write_json, write_text
from partita.spec.calibrated import FOLDER, PRESET, calibration_path
from partita.spec.cluster import Cluster

if TYPE_CHECKING:
    from partita.tune.calibrate import Calibration, Tell
    from partita.tune.device import DeviceCalibration


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("calibrate", help=calibrate.__doc__)(calibrate)


def calibrate(
    cluster: Annotated[
        str, typer.Option(help="Whose devices and memory limits to keep: a preset or a file.")
    ] = "laptop",
    out: Annotated[
        Path | None, typer.Option(help="Where to write the cluster file.", dir_okay=False)
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Measure even if it is cached.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measures this machine and writes its cluster file."""
    base = Cluster.load(cluster)
    path = out or calibration_path(base, FOLDER)
    details = path.with_suffix(".json")
    if path.exists() and details.exists() and not again and out is None:
        note(f"measured before: {path} (--again measures anew)")
        if json:
            write_json(load_json(details))
        else:
            write_text(f"{Cluster.load(path)}\nwritten to {path}")
        return
    from partita.tune.calibrate import calibrate as measure

    _make_folder(path)
    with progress() as tell:
        found = measure(base, tell)
    _write(path, details, found)
    if json:
        write_json(found.to_json())
    else:
        write_text(f"{found}\n\nwritten to {path}; {_who_takes(base, path)}")


def _who_takes(base: Cluster, path: Path) -> str:
    if path == calibration_path(Cluster.load(PRESET), FOLDER) and base == Cluster.load(PRESET):
        return f"jobs on {PRESET} that state no rates of their own take it from now on"
    return f"a job takes it with cluster.path={path}"


def _make_folder(path: Path) -> None:
    """Before anything is measured: WriteError where the file can have no folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        text = f"cannot make the folder {path.parent}: {error.strerror}"
        raise WriteError(text, file=str(path)) from None


def _write(path: Path, details: Path, found: Calibration | DeviceCalibration) -> None:
    import msgspec

    try:
        path.write_text(to_toml(found.cluster.to_toml()), encoding="utf-8")
        details.write_bytes(msgspec.json.encode(found.to_json()))
    except OSError as error:
        text = f"cannot write {error.filename or path}: {error.strerror}"
        raise WriteError(text, file=str(path)) from None


@contextmanager
def progress() -> Iterator[Tell]:
    """A bar on stderr; a line a phase where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("calibrate  {task.description:<26}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def tell(phase: str, done: int, of: int) -> None:
            bar.update(task, description=phase, completed=done, total=of)
            if not console.is_terminal:
                note(f"calibrate  {done + 1}/{of + 1}  {phase}")

        yield tell
