"""`partita generate CHECKPOINT --prompt TEXT`: a text continued, greedily or drawn, under a plan."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from partita.base.errors import raise_all
from partita.base.text import printable
from partita.cli.checkpoint import _step_folder
from partita.cli.jobs import Json, PlanLine
from partita.cli.out import write_json, write_text


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("generate", help=generate.__doc__)(generate)


def generate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A step, run or Hugging Face folder.")
    ],
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draws among the likeliest, up to this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    plan: PlanLine = None,
    json: Json = False,
) -> None:
    """Continues a text with a trained model."""
    from partita.serve.continued import continued
    from partita.serve.request import SamplingParams

    params = SamplingParams(
        max_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    raise_all([p for p in params.problems(1, 1) if p[0] in ("temperature", "top_p", "seed")])
    folder = _step_folder(checkpoint)
    found = continued(folder, prompt, params, plan or "")
    if json:
        write_json({"text": found.text, "token_ids": found.token_ids})
    else:
        write_text(printable(found.text) if sys.stdout.isatty() else found.text)
