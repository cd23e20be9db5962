"""`partita serve CHECKPOINT [--plan LINE]`: the OpenAI-compatible server."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from partita.base.errors import UsageError
from partita.cli.jobs import Json, PlanLine
from partita.cli.out import note, waiting, write_json, write_text

if TYPE_CHECKING:
    from partita.serve.http.opening import Opened


ApiKey = Annotated[
    str | None,
    typer.Option(envvar="PARTITA_API_KEY", help="What clients of /v1/ must send."),
]
MaxWaiting = Annotated[
    int, typer.Option(min=1, help="Answers that may wait; more are told to ask again later.")
]
Speculate = Annotated[
    int, typer.Option(min=0, help="Tokens guessed ahead where a text repeats itself.")
]
Pages = Annotated[int | None, typer.Option(min=1, help="Pages of keys and values, 16 tokens each.")]
Memory = Annotated[
    float | None, typer.Option(min=0.001, help="GiB of each rank for pages, instead.")
]
StepTimeout = Annotated[
    float, typer.Option(min=0.1, help="Seconds another waits for a rank before it is lost.")
]
DrainTimeout = Annotated[
    int, typer.Option(min=0, help="Seconds that requests have to end in once it is stopped.")
]


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("serve", help=serve.__doc__)(serve)


def serve(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A step, run or Hugging Face folder."),
    ],
    plan: PlanLine = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option(help="The model's name; left out, the folder's.")
    ] = None,
    api_key: ApiKey = None,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step.")] = 512,
    max_sequences: Annotated[int, typer.Option(min=1, help="Sequences of a step.")] = 64,
    max_waiting: MaxWaiting = 1024,
    speculate: Speculate = 0,
    pages: Pages = None,
    memory: Memory = None,
    dtype: Annotated[str, typer.Option(help="fp32, bf16 or fp64.")] = "fp32",
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda; left out, the run's where it is here.")
    ] = None,
    backend: Annotated[
        Literal["local", "processes"], typer.Option(help="Ranks are threads or processes.")
    ] = "local",
    step_timeout: StepTimeout = 60.0,
    ssl_certfile: Annotated[Path | None, typer.Option(help="A certificate: serves https.")] = None,
    ssl_keyfile: Annotated[
        Path | None, typer.Option(help="Its key, where it is not in it.")
    ] = None,
    drain_timeout: DrainTimeout = 30,
    json: Json = False,
) -> None:
    """Serves a model to clients of OpenAI's interface until SIGTERM or Ctrl-C."""
    if pages is not None and memory is not None:
        raise UsageError("--pages and --memory both say how many pages there are: give one")
    from partita.serve.http.app import create_app
    from partita.serve.http.opening import Wanted, opened
    from partita.serve.http.server import Secret, address_of, bound
    from partita.serve.http.server import serve as answer

    wanted = Wanted(
        plan or "", pages, memory, dtype, device, backend,
        max_batch_tokens, max_sequences, speculate, max_waiting, step_timeout,
    )  # fmt: skip
    secret = Secret.of(ssl_certfile, ssl_keyfile)
    with closing(bound(host, port)) as listener:
        with waiting(f"loading {checkpoint}", json):
            found = opened(checkpoint, wanted)
        with closing(found):
            app = create_app(found.engine, name or found.words.name, found.words, api_key=api_key)
            listener.listen()
            _tell(address_of(listener, secret), name or found.words.name, found, json)
            answer(app, listener, drain_timeout, secret)
            measured = found.forecast.beside(found.engine.stats().between_tokens)
    note(f"stopped{'; ' * bool(measured)}{measured}")


def _tell(address: str, name: str, found: Opened, json: bool) -> None:
    """Where the server is, once it takes requests."""
    runner = found.runner
    if json:
        told = {
            "max_len": found.engine.max_len,
            "pages": runner.pages,
            "page_size": runner.page_size,
            "weights_bytes": found.forecast.weights,
            "pages_bytes": found.forecast.pages,
            "predicted_itl_s": found.forecast.itl_s,
        }
        write_json({"address": address, "model": name, **told})
        return
    room = f"{runner.pages} pages of {runner.page_size} tokens"
    write_text(f"{name} at {address}/v1, {room}; Ctrl-C lets requests end and stops")
    write_text(str(found.forecast))
