"""`partita checkpoint inspect|verify DIR`, `export|convert DIR TARGET`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from partita.base.errors import CheckpointError, Problem, UsageError
from partita.cli.jobs import Json, PlanLine
from partita.cli.out import note, problem_rows, write_json, write_text
from partita.spec.plan import Plan


def register(app: typer.Typer) -> None:
    """Adds the verb and its parts."""
    text = "Inspects, verifies, exports and converts checkpoints."
    group = typer.Typer(no_args_is_help=True, help=text)
    group.command("inspect")(inspect)
    group.command("verify")(verify)
    group.command("export")(export)
    group.command("convert")(convert)
    app.add_typer(group, name="checkpoint")


Folder = Annotated[
    Path, typer.Argument(metavar="DIR", help="A step folder, or a run folder (its newest).")
]
Target = Annotated[Path, typer.Argument(metavar="TARGET", help="A new folder.")]


def inspect(folder: Folder, json: Json = False) -> None:
    """What a checkpoint states, without reading its tensors."""
    _answer(_step_folder(folder), False, json)


def verify(folder: Folder, json: Json = False) -> None:
    """Every digest of a checkpoint."""
    _answer(_step_folder(folder), True, json)


def _step_folder(folder: Path) -> Path:
    if not folder.exists():
        raise UsageError(f"{folder} does not exist", file=str(folder))
    inner = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    from partita.train.checkpoints.checkpoint import list_checkpoints

    found = list_checkpoints(inner)
    return found[0] if found else folder


def _answer(folder: Path, digests: bool, json: bool) -> None:
    from partita.train.checkpoints.resume import inspect_run

    found = inspect_run(folder, digests)
    if json:
        problems = [Problem("checkpoint", "intact", message) for message in found.problems]
        write_json({**asdict(found), "problems": problem_rows(problems)})
    else:
        told = {**asdict(found), "problems": "\n          ".join(found.problems) or "none"}
        write_text("\n".join(f"{k:<10}{v}" for k, v in told.items()))
    if found.problems or not found.complete:
        note(f"partita: {next(iter(found.problems), f'{folder} is not complete')}")
        raise typer.Exit(CheckpointError.exit_code)


def export(
    source: Folder,
    target: Target,
    adapter: Annotated[
        bool, typer.Option("--adapter", help="LoRA's matrices alone, in the format of peft.")
    ] = False,
    json: Json = False,
) -> None:
    """Writes a folder that transformers loads, LoRA merged into its base; or that peft loads."""
    from partita.train.checkpoints.export import export_adapter, export_checkpoint

    folder = _step_folder(source)
    found: dict[str, Any] = (export_adapter if adapter else export_checkpoint)(folder, target)
    if json:
        write_json(found)
    else:
        write_text(
            f"exported {folder} to {target}: {found['tensors']} tensors, {found['bytes']} bytes"
        )


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="DIR", help="As of export, or a torch checkpoint's folder.")
    ],
    target: Target,
    plan: PlanLine = None,
    to: Annotated[
        Literal["partita", "dcp"],
        typer.Option(help="A run folder, or a torch.distributed.checkpoint to hand on."),
    ] = "partita",
    json: Json = False,
) -> None:
    """Writes the checkpoint as the ranks of another plan would have (--plan "pp2 tp2"), or to or from
    torch's distributed checkpoint: --to dcp, or a DIR that is one."""
    from partita.train.checkpoints.dcp import export_dcp, import_dcp, is_dcp

    wanted = Plan.parse(plan) if plan is not None else None
    if is_dcp(source):
        folder = import_dcp(source, target, wanted)
    elif to == "dcp":
        if wanted is not None:
            raise UsageError("--to dcp writes whole tensors, which no plan cuts", key="--plan")
        count = export_dcp(_step_folder(source), target)
        document = {"tensors": count, "target": str(target)}
        write_json(document) if json else write_text(f"wrote {count} tensors to {target}")
        return
    elif wanted is None:
        raise UsageError(
            'convert needs the plan to write for, --plan "pp2 tp2", or --to dcp', key="--plan"
        )
    else:
        from partita.train.checkpoints.convert import convert_checkpoint

        folder = convert_checkpoint(_step_folder(source), target, wanted)
    note(f"converted {source} to {folder}")
    _answer(folder, False, json)
