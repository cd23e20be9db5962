"""What `partita draw` shows: schedules and recorded steps as text, pictures and JSON."""

from __future__ import annotations

import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from partita.base.errors import Problem, UsageError
from partita.base.text import table
from partita.cli.out import note, problem_rows, write_file, write_text
from partita.plots import timeline
from partita.record.span import Span
from partita.schedule import clock as clocks
from partita.schedule.clock import Pair
from partita.schedule.idle import Idle, idle
from partita.schedule.ir import Schedule
from partita.schedule.synth.synthesis import Synthesis
from partita.schedule.text import FOREIGN, cells, print_schedule
from partita.schedule.versions import staleness, versions_held


@dataclass(frozen=True)
class Drawing:
    """A schedule with its times; no spans and some problems where it cannot run."""

    schedule: Schedule
    spans: list[Span]
    problems: list[Problem] | None = None
    synthesis: Synthesis | None = None
    pair: Pair = "sequence"
    split: tuple[int, ...] = ()  # layers of each stage, where they were cut too
    cut_proven: bool = False  # whether nothing on that cut is faster
    run: str = ""  # the folder of the run whose measured times these are

    @property
    def held(self) -> list[list[tuple[float, float]]]:
        """What each rank holds over time; nothing where the step has other microbatches than its schedule,
        as one that runs ahead."""
        made = {a for a in self.schedule.actions() if a.kind in "FBIW"}
        same = made == {(s.stage, s.kind, s.microbatch) for s in self.spans if s.kind in "FBIW"}
        return clocks.held_over_time(self.schedule, self.spans) if same else []

    @property
    def runs(self) -> bool:
        """Whether it could be clocked."""
        return not any(p.severity == "error" for p in self.problems or ())

    @property
    def wrong(self) -> list[str]:
        """What keeps it from running, each with its rule."""
        return [f"{p.rule}: {p.message}" for p in self.problems or ()]

    def document(self) -> dict[str, Any]:
        """What `--json` answers (contract: draw). Every number is null where it cannot run."""
        s, spans, runs = self.schedule, self.spans, self.runs
        out: dict[str, Any] = {"run": self.run} if self.run else {}
        out |= {
            "schedule": s.name,
            "num_ranks": s.num_ranks,
            "num_stages": s.num_stages,
            "num_microbatches": s.num_microbatches,
            "placement": s.placement,
            "actions": [cells(actions, s.paired) for actions in s.ranks],
            "direction": s.direction,
            "makespan": clocks.makespan(spans) if runs else None,
            "span": clocks.span(spans) if runs else None,
            "bubble_overhead": clocks.bubble_overhead(spans) if runs else None,
            "steady_bubble_overhead": clocks.steady_bubble_overhead(spans) if runs else None,
            "peak_activations": clocks.peak_activations(s) if runs else None,
            "idle": [asdict(row) for row in idle(s, spans, self.pair)] if runs else None,
        }
        if self.synthesis is not None:
            made = self.synthesis
            out |= {
                "lower_bound": made.lower_bound,
                "gap": made.gap,
                "proven": made.proven,
                "seconds": made.seconds,
            } | ({"split": list(self.split)} if self.split else {})
        return out if self.problems is None else {**out, "problems": problem_rows(self.problems)}

    @property
    def drains(self) -> bool:
        """Whether it would run on into the next step, and ends instead."""
        ahead = any(s.microbatch >= self.schedule.num_microbatches for s in self.spans)
        return self.schedule.runs_ahead and not (self.run and ahead)

    @property
    def name(self) -> str:
        """The schedule's, and of a run where it was measured."""
        if not self.run:
            return self.schedule.name
        drain = ": a step that drains" if self.drains else ""
        return f"{self.run} ({self.schedule.name}, measured{drain})"

    def text(self, width: int | None, longest: float = 0.0) -> str:
        """Title, picture (a row's width is of at least `longest` seconds) and problems."""
        s = self.schedule
        title = f"{self.name}   {s.num_ranks} ranks, {s.num_microbatches} microbatches"
        picture = timeline.text(self.spans, width, longest) if self.runs else str(s)
        found = [f"  {line}" for line in self.wrong]
        verdict = [] if self.problems is None or found else ["  it can run"]
        if self.synthesis is not None:
            made = self.synthesis
            how = (
                "proven: nothing else is faster"
                if made.proven
                else f"at most {made.gap:.2%} above the optimum"
            )
            if self.cut_proven and not made.proven:
                how = f"proven of this cut; {how} of all cuts"
            twice = "; every stage on two ranks: the parameters twice" if s.is_bidirectional else ""
            verdict.append(f"  {how}{twice}; made in {made.seconds:.1f} s")
        if self.runs and s.is_asynchronous and not self.run:
            verdict.append(_weights(s))
        if self.split:
            verdict.append(f"  layers of each stage: {','.join(map(str, self.split))}")
        return "\n".join([title, picture, *found, *verdict])


def _weights(schedule: Schedule) -> str:
    """What an asynchronous schedule's stages hold of weights, as its list has it."""
    held, old = (" ".join(map(str, f(schedule))) for f in (versions_held, staleness))
    end = "runs on into the next step" if schedule.runs_ahead else "ends its step empty"
    return f"  versions of each stage: {held}; its gradients are {old} updates old at most; {end}"


def write_pictures(drawings: list[Drawing], svg: Path | None, html: Path | None) -> None:
    """SVG and page of what runs, on one time axis, and of what is wrong with the rest."""
    if svg is None and html is None:
        return
    pictures: dict[str, list[Span]] = {}
    held, names, drains = {}, set(), set()
    for i, d in enumerate(drawings):
        if d.runs:
            again = "" if d.name not in names else f" ({i})"
            names.add(d.name)
            overhead = clocks.bubble_overhead(d.spans)
            title = f"{d.name}{again}   bubble overhead {overhead:.1%}"
            pictures[title] = d.spans
            if d.held:
                held[title] = d.held
            if d.drains:
                drains.add(title)
    seconds = any(d.run for d in drawings)
    wrong = {f"{d.name} cannot run": "\n".join(d.wrong) for d in drawings if not d.runs}
    how: dict[str, Any] = {"held": held, "seconds": seconds, "drains": drains, "refused": wrong}
    if svg is not None:
        write_file(svg, timeline.svg(pictures, **how) + "\n")
    if html is not None:
        page = timeline.html(pictures, title="Pipeline schedules", **how)
        write_file(html, page)


def write_csv(drawings: list[Drawing], path: Path | None) -> None:
    """The one schedule as torch's action CSV; what its reader cannot take is told. Raises UsageError where
    there are several."""
    if path is None:
        return
    if len(drawings) != 1:
        message = f"--csv writes one schedule, {len(drawings)} are drawn"
        raise UsageError(message, key="csv")
    made = drawings[0].schedule
    write_file(path, print_schedule(made) + "\n")
    strange = sorted(made.kinds.intersection(FOREIGN))
    if strange:
        note(
            f"torch has no name for {', '.join(strange)}: its reader refuses this file, --check reads it"
        )
    if made.versions in ("vertical", "previous"):
        note(
            f"a CSV has no word for the weights that {made.name}'s microbatches use: read back it is another "
            "schedule"
        )
    if made.is_bidirectional:
        note("torch has no stage on two ranks: its reader refuses this file, --check reads it")


def print_drawings(drawings: list[Drawing]) -> None:
    """Pictures, below them what each takes. Beside a run all have one time axis."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    times = [clocks.makespan(d.spans) for d in drawings]
    longest = max(times) if any(d.run for d in drawings) else 0.0
    for drawing in drawings:
        write_text(drawing.text(width, longest) + "\n")
    header = ("schedule", "makespan", "span", "bubble overhead", "steady", "peak by rank")
    rows = [
        (
            d.name,
            f"{clocks.makespan(d.spans):g}",
            f"{clocks.span(d.spans):g}",
            f"{clocks.bubble_overhead(d.spans):.4f}",
            f"{clocks.steady_bubble_overhead(d.spans):.4f}",
            " ".join(map(str, clocks.peak_activations(d.schedule))),
        )
        for d in drawings
        if d.runs
    ]
    if rows:
        write_text(table(rows, header) + "\n")
        write_text(table([row for d in drawings if d.runs for row in _idle_rows(d)], _IDLE))


_IDLE = (
    "idle of the rank that idles most",
    "rank",
    "warm-up",
    "waiting",
    "for rank",
    "message",
    "drain",
)


def _idle_rows(d: Drawing) -> list[tuple[str, ...]]:
    rows = idle(d.schedule, d.spans, d.pair)
    if not rows:
        return []
    most: Idle = max(rows, key=lambda row: row.total)
    waiting = sum(most.waiting.values())
    whom = max(most.waiting, key=lambda r: most.waiting[r]) if most.waiting else ""
    numbers = (most.warm_up, waiting, most.communication, most.drain)
    warm_up, waited, message, drain = (f"{x:g}" for x in numbers)
    return [(d.name, str(most.rank), warm_up, waited, str(whom), message, drain)]
