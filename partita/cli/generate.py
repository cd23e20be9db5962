"""`partita generate CHECKPOINT --prompt TEXT`: greedy, no cache."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from partita.base.text import printable
from partita.cli.checkpoint import _step_folder
from partita.cli.jobs import Json
from partita.cli.out import write_json, write_text


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("generate", help=generate.__doc__)(generate)


def generate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A step or run folder.")],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 64,
    json: Json = False,
) -> None:
    """Continues a text with a trained model."""
    from partita.train.checkpoints.sample import continue_text

    found = continue_text(_step_folder(checkpoint), prompt, max_new_tokens)
    if json:
        write_json({"text": found.text, "token_ids": found.token_ids})
    else:
        write_text(printable(found.text) if sys.stdout.isatty() else found.text)
