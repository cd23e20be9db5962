"""The table of a communication error: for every rank the last call it entered."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from partita.base.text import table
from partita.comm.protocol import Message, Where


@dataclass(slots=True)
class Status:
    """The last collective or message a rank entered, and whether it came out."""

    rank: int
    axis: str = ""
    op: str = ""
    tensor: str = ""
    sequence: int = -1
    site: str = ""
    phase: str = ""
    step: int = 0
    completed: bool = True
    at: float = 0.0
    file: str = ""
    line: int = 0
    left: bool = False

    def enter(self, axis: str, message: Message, sequence: int, where: Where) -> None:
        """Notes a call as entered, by the line outside comm that made it."""
        frame = sys._getframe(2)
        while frame.f_back is not None and "/comm/" in frame.f_code.co_filename:
            frame = frame.f_back
        self.axis, self.op, self.site = axis, message.op, message.site
        self.tensor = message.tensor
        self.sequence, self.phase, self.step = sequence, where.phase, where.step
        self.completed, self.at = False, time.monotonic()
        self.file, self.line = frame.f_code.co_filename, frame.f_lineno

    def is_behind(self, other: Status) -> bool:
        """Whether this rank's last call is another and an older one than that rank's: by number where both
        are of one group, whose clocks may be of two hosts."""
        if self.axis == other.axis and min(self.sequence, other.sequence) >= 0:
            return self.sequence < other.sequence
        mine, theirs = (self.axis, self.sequence, self.op), (other.axis, other.sequence, other.op)
        return mine != theirs and self.at <= other.at


def describe(status: Sequence[Status], now: float) -> str:
    """One aligned line a rank."""
    rows = []
    for s in status:
        if not s.op:
            rows.append([s.rank, "no call yet", *[""] * 4, "left" if s.left else "", "", ""])
            continue
        number = f"#{s.sequence}" if s.sequence >= 0 else ""
        state = ("completed" if s.completed else "entered") + (", left" if s.left else "")
        ago = f"{max(now - s.at, 0):.1f} s ago"
        line = f"{Path(s.file).name}:{s.line}" if s.file else ""
        rows.append(
            [
                s.rank,
                f"{s.axis} {s.op} {number}",
                s.tensor,
                s.site,
                s.phase,
                s.step,
                state,
                ago,
                line,
            ]
        )
    heads = ["rank", "last call", "tensor", "site", "phase", "step", "state", "when", "line"]
    return table(rows, heads)
