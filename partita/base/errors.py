"""Every error a user can meet, and the exit code it becomes.

PartitaError              70 internal
├── UsageError             2 usage        the command, the job file, or what a run would resume
├── PlanError              1 plan         an illegal plan: carries every Problem
│   └── ScheduleError      1 plan         a schedule that cannot run
├── DataError             65 data         the content of a data or tokenizer file
├── CheckpointError       66 checkpoint
├── PeerError             71 peer         a rank was lost, disagreed or timed out
│   ├── CommError
│   └── RankLostError                   a rank of a server is gone
├── NonFiniteError        72 non_finite   a loss or gradient that is not a number
├── WriteError            73 write        full or read-only disk
├── CorruptError          74 corrupt      a device computed, or holds, wrong numbers
├── BusyError             75 busy         the run folder is taken by a live owner
└── StoppedError     130/143 stopped      Ctrl-C, SIGTERM
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, slots=True)
class Problem:
    """One rule that a plan breaks: what was asked, the numbers, and what would satisfy it.

    `nearest` is a plan line that keeps the rule, where one is known.
    """

    room: str
    rule: str
    message: str
    asked: str = ""
    limit: str = ""
    nearest: str | None = None
    severity: Literal["error", "warning"] = "error"


class PartitaError(Exception):
    """Base of all errors with an exit code; `file` and `key` say where the fault lies. One that
    `echoes` tells of another rank's fault, which is the cause where it is known; `rank` is the one at
    fault where all ranks say the same."""

    exit_code: ClassVar[int] = 70
    kind: ClassVar[str] = "internal"
    echoes: bool = False
    rank: int | None = None

    def __init__(self, message: str, *, file: str | None = None, key: str | None = None) -> None:
        super().__init__(message)
        self.message, self.file, self.key = message, file, key

    def __reduce__(self) -> tuple[object, ...]:
        """Pickles with its text: errors travel from ranks to the launcher."""
        return _rebuild, (type(self), self.message, dict(self.__dict__))


def _rebuild(kind: type[PartitaError], message: str, state: dict[str, object]) -> PartitaError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class UsageError(PartitaError):
    """The command or the job file is wrong. `others`: what else is, each with its key and told beside it;
    `keys`: of the problems, of which each has a line of the message."""

    exit_code, kind = 2, "usage"
    others: tuple[tuple[str, str], ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def all(self) -> list[tuple[str, str]]:
        """Key and text of everything that is wrong."""
        return [(self.key or "", self.message), *self.others]


def raise_all(problems: Sequence[tuple[str, str]]) -> None:
    """Raises UsageError of the first (key, text), with the others beside it, where there are any."""
    if problems:
        raise all_of(problems)


def all_of(problems: Sequence[tuple[str, str]]) -> UsageError:
    """The first (key, text) as an error, with the others beside it."""
    error = UsageError(problems[0][1], key=problems[0][0])
    error.others = tuple(problems[1:])
    return error


class PlanError(PartitaError):
    """A plan that cannot be; `problems` holds all that is wrong with it at once."""

    exit_code, kind = 1, "plan"

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        self.problems = tuple(sorted(problems, key=lambda p: p.severity != "error"))
        super().__init__(message + "".join(map(problem_line, self.problems)))


def problem_line(problem: Problem) -> str:
    """One aligned line, as it stands under the headline of a PlanError."""
    hint = f"   e.g. {problem.nearest}" if problem.nearest else ""
    mark = "warning: " if problem.severity == "warning" else ""
    return f"\n  {problem.room:<10} {mark}{problem.message}{hint}"


class ScheduleError(PlanError):
    """A schedule that cannot run: incomplete, out of order, or deadlocked."""


class DataError(PartitaError):
    """The content of a data or tokenizer file is bad."""

    exit_code, kind = 65, "data"


class CheckpointError(PartitaError):
    """A checkpoint that must not be loaded."""

    exit_code, kind = 66, "checkpoint"


class PeerError(PartitaError):
    """A peer was lost, hangs, or does something else than the others."""

    exit_code, kind, echoes = 71, "peer", True


class CommError(PeerError):
    """A collective that cannot complete: names rank, axis, operation and site."""


class RankLostError(PeerError):
    """A rank that serves a model is gone, `rank`: the others cannot answer without it."""


class NonFiniteError(PartitaError):
    """A loss or gradient is NaN or infinite; nothing was updated."""

    exit_code, kind = 72, "non_finite"


class WriteError(PartitaError):
    """The disk is full or read-only; the last good checkpoint is kept."""

    exit_code, kind = 73, "write"


class CorruptError(PartitaError):
    """A rank computes or holds other bits than it should: its device is not to be trusted."""

    exit_code, kind = 74, "corrupt"


class BusyError(PartitaError):
    """The run folder belongs to a live owner."""

    exit_code, kind = 75, "busy"


class StoppedError(PartitaError):
    """Stopped by a signal; `exit_code` is 130 for Ctrl-C and 143 for SIGTERM."""

    kind = "stopped"

    def __init__(self, message: str, signal_number: int = 2) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number  # type: ignore[misc]
