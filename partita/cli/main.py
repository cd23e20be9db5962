"""`partita <verb> ...`: finds the verb, runs it, and turns every error into its exit code.

Only the module of the verb that is asked for is imported, so that `partita draw` starts in a fraction
of a second and never meets torch. A verb is a file beside this one with `register(app)`.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

import partita
from partita.base.errors import PartitaError, PlanError, StoppedError, UsageError
from partita.base.refused import not_installed, refused, require_proc
from partita.base.text import printable
from partita.cli.out import failure_document, in_words, note, write_json, write_text
from partita.comm.liveness.lifeline import Lifeline
from partita.comm.processes import STOPS, torchrun_rank

VERBS = {
    "draw": "Schedules as text, SVG or HTML, side by side.",
    "plan": "Finds the best plan of a model on a cluster, or judges yours.",
    "simulate": "Predicted time, memory and traffic of a job.",
    "train": "Trains a job over its ranks.",
    "verify": "Proves a job's plan equal to one device.",
    "report": "Predicted beside measured: timeline, memory, traffic, loss.",
    "calibrate": "Measures this machine and writes its cluster file.",
    "checkpoint": "Inspects, verifies, exports and converts checkpoints.",
    "generate": "Continues a text with a trained model.",
    "serve": "Serves a model to clients of OpenAI's interface.",
    "doctor": "Preflight on the real ranks.",
    "launch": "Writes what starts a job on Slurm, Kubernetes or Ray.",
    "validate": "Holds the simulator against published measurements.",
}
STARTING = {"train", "verify", "calibrate", "generate", "serve", "doctor"}  # verbs that start torch
AGAIN_S = 0.2
COMPLETION = "_PARTITA_COMPLETE"  # set by the shell while it completes a line

# The errors of a wrong command line share one base; which library owns it depends on typer's version.
CommandLineError: Any = typer.BadParameter.__mro__[2]


def available() -> dict[str, str]:
    """The verbs whose file is there, with their line of help."""
    here = Path(__file__).parent
    return {verb: text for verb, text in VERBS.items() if (here / f"{verb}.py").exists()}


def application(words: Sequence[str]) -> typer.Typer:
    """The commands, for a line of these words: its verb in full, the others by their line of help."""
    app = typer.Typer(name="partita", no_args_is_help=True, pretty_exceptions_enable=False)
    app.callback(help=partita.__doc__.partition("\n")[0] if partita.__doc__ else None)(_options)
    verbs = available()
    asked = next((word for word in words if word in verbs), None)
    for verb, text in verbs.items():
        if verb == asked:
            import_module(f"partita.cli.{verb}").register(app)
        else:
            app.command(verb, help=text)(_elsewhere)
    return app


def _elsewhere() -> None:
    """Stands for a verb that this line does not ask for."""


def _print_version(wanted: bool) -> None:
    if wanted:
        write_text(f"partita {partita.__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


class _Stopped(BaseException):
    """A signal of STOPS came; like KeyboardInterrupt, no handler of errors takes it."""


@dataclass
class Stop:
    """Takes SIGTERM and Ctrl-C, of which one is enough: the way out. What a signal raises is lost where it
    meets a destructor, or a library being imported that asks no questions: an alarm raises it anew until
    the line is left. `number` is the signal's, once one came."""

    number: int = 0

    def listen(self) -> None:
        """From now on."""
        for number in STOPS:
            if (
                signal.getsignal(number) is not signal.SIG_IGN
            ):  # as shells have it for what runs behind
                signal.signal(number, self._take)

    def done(self) -> None:
        """No more: what was done stays done."""
        for number in STOPS:
            signal.signal(number, signal.SIG_IGN)
        self.quiet()

    def quiet(self) -> None:
        """The line is left: no alarm more. What frees much memory on the way out takes its time."""
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)

    def error(self) -> StoppedError:
        """What the user is told."""
        name = "Ctrl-C" if self.number == signal.SIGINT else signal.Signals(self.number).name
        return StoppedError(f"stopped by {name}", self.number)

    def _take(self, number: int, _: object) -> None:
        self.done()
        self.number = number
        if hasattr(signal, "setitimer"):
            signal.signal(signal.SIGALRM, self._again)
            signal.setitimer(signal.ITIMER_REAL, AGAIN_S, AGAIN_S)
        raise _Stopped

    def _again(self, *_: object) -> None:
        if not isinstance(sys.exception(), _Stopped):  # else all is being cleared away
            raise _Stopped


def run(arguments: Sequence[str], stop: Stop | None = None) -> int:
    """Runs one command line; its exit code. Errors are printed: text on stderr, `--json` on stdout."""
    stop = stop or Stop()
    words = list(arguments)
    if COMPLETION in os.environ:
        words = _words_to_complete(os.environ)
    line: Lifeline | None = None
    try:
        line = Lifeline.hold()
        if words and words[0] in STARTING and "--help" not in words:
            require_proc()
        command = typer.main.get_command(application(words))
        code = command.main(
            args=list(arguments), prog_name="partita", standalone_mode=False, obj=line
        )
        if line is not None:
            line.leave()
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        stop.quiet()
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has left
        return 0
    except CommandLineError as error:
        stop.quiet()
        failure: PartitaError = UsageError(_what_to_type(error, arguments))
    except (KeyboardInterrupt, typer.Abort):
        stop.quiet()
        failure = StoppedError("stopped by Ctrl-C", signal.SIGINT)
    except _Stopped:
        stop.quiet()
        failure = stop.error()
    except PartitaError as error:
        stop.quiet()
        failure = error
    except OSError as error:
        stop.quiet()
        failure = _os_error(error)
    except ModuleNotFoundError as error:
        stop.quiet()
        failure = _not_installed(error)
    except Exception as error:
        stop.quiet()
        note(traceback.format_exc())
        failure = PartitaError(f"our own fault: {type(error).__name__}: {error}")
    if stop.number and not isinstance(failure, StoppedError):
        failure = stop.error()  # what a stop interrupts may say anything
    _print_failure(failure, as_json="--json" in arguments)
    if line is not None:
        with suppress(_Stopped):
            line.leave(str(failure).partition("\n")[0])
    return failure.exit_code


def _words_to_complete(environment: os._Environ[str]) -> list[str]:
    line = environment.get("COMP_WORDS") or environment.get("_TYPER_COMPLETE_ARGS") or ""
    try:
        return shlex.split(line)
    except ValueError:  # an open quote
        return line.split()


def _what_to_type(error: Any, arguments: Sequence[str]) -> str:
    message = error.format_message()
    verb = next((word for word in arguments if word in available()), None)
    told = message.rstrip(".") or "a verb is missing"
    return f"{told}; `partita {f'{verb} ' if verb else ''}--help` shows what it takes"


def _os_error(error: OSError) -> PartitaError:
    told = refused(error)
    if told is not None:
        return told
    note(traceback.format_exc())
    return PartitaError(f"our own fault: {type(error).__name__}: {error}")


def _not_installed(error: ModuleNotFoundError) -> PartitaError:
    told = not_installed(error)
    if told is not None:
        return told
    note(traceback.format_exc())
    return PartitaError(f"our own fault: {type(error).__name__}: {error}")


def _print_failure(error: PartitaError, as_json: bool) -> None:
    place = torchrun_rank()
    if as_json and (place is None or place[0] == 0):  # of torchrun's ranks the first one answers
        with suppress(OSError):  # what failed may be this very stream: a full disk
            write_json(failure_document(error))
    lines = printable(str(error)).splitlines() or [type(error).__name__]
    if len(lines) > 1:
        note("\n".join(lines))
    cause = ": ".join([lines[0].rstrip(":"), *_first_problem(error, lines[1:2])])
    file = printable(error.file or "")
    where = f"{file}: " if file and file not in cause else ""
    note(f"partita: {where}{cause}{_and_more(error)}")


def _and_more(error: PartitaError) -> str:
    """How many problems the last line leaves to those above it."""
    told = len(error.keys) if isinstance(error, UsageError) else 1
    if isinstance(error, PlanError):
        told = sum(p.severity == "error" for p in error.problems)
    return f" (and {told - 1} more above)" if told > 1 else ""


def _first_problem(error: PartitaError, below: list[str]) -> list[str]:
    """What a plan's headline leaves out: its first problem and a way out, else the line below."""
    if not isinstance(error, PlanError):
        return []
    if not error.problems:
        return in_words(below)
    first = error.problems[0]
    hint = f"; e.g. {first.nearest}" if first.nearest else ""
    return [first.room, first.message.splitlines()[0] + hint]


def _open_streams() -> None:
    """A program may be started without them (`>&-`), and what it opens next would take their places, its
    ranks' too. Where a locale has but ASCII, what cannot be written is escaped: no result is lost by it."""
    for place in range(3):
        try:
            os.fstat(place)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(place, True)
    sys.stdout = sys.stdout or os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", encoding="utf-8", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def main() -> None:
    """The line that the program was called with (`entry.py`)."""
    stop = Stop()
    stop.listen()
    _open_streams()
    code = run(sys.argv[1:], stop)
    stop.done()
    if code and torchrun_rank() is not None:
        sys.stdout.flush()
        os._exit(code)  # gloo's threads may still wait for a lost peer
    sys.exit(code)
