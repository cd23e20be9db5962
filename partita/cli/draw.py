"""`partita draw`: schedules as text, SVG or HTML, with what they cost."""

from __future__ import annotations

import math
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from partita.base.errors import Problem, ScheduleError, UsageError
from partita.base.text import table
from partita.cli.out import note, problem_rows, write_file, write_json, write_text
from partita.plots import timeline
from partita.record.span import Span
from partita.schedule import clock as clocks
from partita.schedule.check import check, over_limit
from partita.schedule.clock import Costs
from partita.schedule.idle import Idle, idle
from partita.schedule.ir import Schedule
from partita.schedule.make import GENERATORS, NAMES, hold_to_size, schedule
from partita.schedule.steps import repeat
from partita.schedule.synth.partition import partitioned
from partita.schedule.synth.synthesis import Synthesis, Task, synthesise
from partita.schedule.text import cells, read_program, read_schedule

Pair = Literal["sequence", "block"]


@dataclass(frozen=True)
class Drawing:
    """A schedule with its times; no spans and some problems where it cannot run."""

    schedule: Schedule
    spans: list[Span]
    problems: list[Problem] | None = None
    synthesis: Synthesis | None = None
    pair: Pair = "sequence"
    split: tuple[int, ...] = ()  # layers of each stage, where they were cut too

    @property
    def runs(self) -> bool:
        """Whether it could be clocked."""
        return not any(p.severity == "error" for p in self.problems or ())

    def document(self) -> dict[str, Any]:
        """What `--json` answers (contract: draw). Every number is null where it cannot run."""
        s, spans, runs = self.schedule, self.spans, self.runs
        out = {
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

    def text(self, width: int | None) -> str:
        """Title, picture and problems."""
        s = self.schedule
        title = f"{s.name}   {s.num_ranks} ranks, {s.num_microbatches} microbatches"
        picture = timeline.text(self.spans, width) if self.runs else str(s)
        found = [f"  {p.rule}: {p.message}" for p in self.problems or ()]
        verdict = [] if self.problems is None or found else ["  it can run"]
        if self.synthesis is not None:
            made = self.synthesis
            how = (
                "proven: nothing else is faster"
                if made.proven
                else f"at most {made.gap:.2%} above the optimum"
            )
            verdict.append(f"  {how}; made in {made.seconds:.1f} s")
        if self.split:
            verdict.append(f"  layers of each stage: {','.join(map(str, self.split))}")
        return "\n".join([title, picture, *found, *verdict])


@dataclass(frozen=True)
class Timing:
    """How schedules are clocked: --costs, --pair and --steps; what auto cuts into stages: --layers."""

    costs: str
    pair: Pair
    steps: int
    layers: str = ""


@dataclass(frozen=True)
class Bound:
    """--limit, in whole shares of a rank, or --limit-bytes."""

    shares: float | None
    size: float | None

    def __post_init__(self) -> None:
        for name, value in (("limit", self.shares), ("limit-bytes", self.size)):
            if value is not None and not value > 0:
                raise UsageError(f"--{name} is {value:g}; it must be above 0", key=name)

    def of(self, made: Schedule, costs: str) -> tuple[float, list[float], str]:
        """(limit, what a microbatch holds at each stage, its unit); the limit may be infinite."""
        if self.size is not None:
            self.hold_to_sizes(costs)
            sizes = [stage.activation_bytes for stage in read_costs(costs, made).stages]
            return self.size, sizes, "bytes of activations"
        return self.limit, [1 / made.virtual_stages] * made.num_stages, "activations"

    @property
    def limit(self) -> float:
        """The one that is given; infinite where none is."""
        given = self.shares if self.size is None else self.size
        return math.inf if given is None else given

    def hold_to_sizes(self, costs: str) -> None:
        """Raises UsageError where bytes are limited and the costs have none."""
        sizes = [stage.activation_bytes for stage in given_costs(costs).stages]
        if self.size is not None and not any(sizes):
            message = "--limit-bytes needs --costs FILE.json with activation_bytes"
            raise UsageError(message, key="costs")


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("draw", help=draw.__doc__)(draw)


def draw(
    schedules: Annotated[
        list[str] | None,
        typer.Argument(metavar="SCHEDULE...", help=f"{', '.join(NAMES)}, or file:<path>.csv"),
    ] = None,
    ranks: Annotated[int | None, typer.Option("-p", "--num-ranks", help="Pipeline ranks.")] = None,
    microbatches: Annotated[
        int | None, typer.Option("-m", "--num-microbatches", help="Microbatches a step.")
    ] = None,
    virtual: Annotated[int, typer.Option("-v", "--virtual-stages", help="Stages a rank.")] = 1,
    steps: Annotated[int, typer.Option(help="Steps back to back.")] = 1,
    costs: Annotated[
        str, typer.Option(help="F,I,W[,SEND] of a rank's whole share, or FILE.json by stage.")
    ] = "1,1,1",
    layers: Annotated[
        str, typer.Option(help="FILE.json as of --costs, by layer: auto cuts them into stages.")
    ] = "",
    pair: Annotated[Pair, typer.Option(help="How an overlapped pair is timed.")] = "sequence",
    limit: Annotated[
        float | None, typer.Option(help="Most activations a rank may hold, in whole shares.")
    ] = None,
    limit_bytes: Annotated[
        float | None, typer.Option(help="The same in bytes; needs a cost file.")
    ] = None,
    check_file: Annotated[
        Path | None, typer.Option("--check", help="Prove that a schedule's CSV can run.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Write an SVG.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page.")] = None,
) -> None:
    """Schedules as text, SVG or HTML, side by side."""
    bound = Bound(limit, limit_bytes)
    how = Timing(costs, pair, _at_least_one("steps", steps), layers)
    if layers and list(schedules or ()) != ["auto"]:
        raise UsageError("--layers is cut for one schedule, auto", key="layers")
    drawings = [] if check_file is None else [_proved(check_file, how, bound)]
    for name in schedules or ():
        if name == "auto":
            asked = (_at_least_one("ranks", ranks), _at_least_one("microbatches", microbatches))
            drawings.append(_synthesised(*asked, virtual, how, bound))
            continue
        made = _make(name, ranks, microbatches, virtual)
        drawings.append(_drawing(made, how))
        _hold_to_limit(made, costs, bound)
    if not drawings:
        raise UsageError(f"which schedule? There are {', '.join(NAMES)}, and file:<path>.csv")
    _write_pictures(drawings, svg, html)
    if json:
        documents = [d.document() for d in drawings]
        write_json(documents[0] if len(documents) == 1 else {"schedules": documents})
    else:
        _print(drawings)
    wrong = [p for d in drawings for p in d.problems or () if p.severity == "error"]
    if wrong:
        cause = ", ".join(line.strip() for line in wrong[0].message.splitlines()[:2])
        note(f"partita: {check_file}: {wrong[0].rule}: {cause}")
        raise typer.Exit(1)


def _at_least_one(name: str, value: int | None) -> int:
    if value is None:
        raise UsageError(f"how many {name}? e.g. -p 4 -m 8", key=name)
    if value < 1:
        raise UsageError(f"{name} is {value}; it must be at least 1", key=name)
    return value


def _make(name: str, ranks: int | None, microbatches: int | None, virtual: int) -> Schedule:
    if name.strip('"').startswith("file:") and ranks is None and microbatches is None:
        return read_schedule(name.strip('"').removeprefix("file:"))
    return schedule(
        name,
        num_ranks=_at_least_one("ranks", ranks),
        num_microbatches=_at_least_one("microbatches", microbatches),
        virtual_stages=virtual,
    )


def _drawing(made: Schedule, how: Timing, problems: list[Problem] | None = None) -> Drawing:
    prices = read_costs(how.costs, made)
    if problems:
        return Drawing(made, [], problems)
    hold_to_size(made.num_stages, made.num_microbatches * how.steps)
    many = repeat(made, how.steps) if how.steps > 1 else made
    return Drawing(many, clocks.clock(many, prices, how.pair), problems, pair=how.pair)


def _synthesised(ranks: int, microbatches: int, virtual: int, how: Timing, bound: Bound) -> Drawing:
    """auto, at the costs and within the bound asked for; bidirectional schedules take part, as they do
    by name."""
    hold_to_size(ranks * max(2, virtual), microbatches)
    bound.hold_to_sizes(how.layers or how.costs)
    costs, split = given_costs(how.layers or how.costs), ()
    task = Task(
        ranks, microbatches, costs, bound.limit, limit_in_bytes=bound.size is not None,
        stages=max(2, virtual), copies=1 if how.layers else 2,
    )  # fmt: skip
    if how.layers:
        cut = partitioned(task, costs.stages)
        found, split = cut.synthesis, cut.split
    else:
        found = synthesise(task)
    made = found.schedule
    many = repeat(made, how.steps) if how.steps > 1 else made
    spans = clocks.clock(many, found.costs, how.pair)
    return Drawing(many, spans, synthesis=found, pair=how.pair, split=split)


def _proved(path: Path, how: Timing, bound: Bound) -> Drawing:
    """A file's schedule with all that keeps it from running, or from fitting its bound."""
    made, program = read_program(path)
    problems = check(made, program)
    if not problems:
        limit, sizes, unit = bound.of(made, how.costs)
        problems = over_limit(made, limit, sizes, unit)
    return _drawing(made, how, problems)


def given_costs(text: str) -> Costs:
    """Costs from 'F,I,W[,SEND]', one entry for a rank's whole share, or from a JSON file, one entry a
    stage. Raises UsageError."""
    if text.endswith(".json"):
        return _costs_from_file(text)
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (3, 4):
        raise UsageError(f"--costs {text}: write F,I,W or F,I,W,SEND, or FILE.json", key="costs")
    _hold_sane(numbers, f"--costs {text}")
    return Costs((clocks.StageCosts(*numbers[:3]),), numbers[3] if len(numbers) == 4 else 0.0)


def read_costs(text: str, of: Schedule) -> Costs:
    """The costs of every stage of a schedule. Raises UsageError where a file has another number."""
    given = given_costs(text)
    if not text.endswith(".json"):
        (share,) = given.stages
        return Costs.equal(of, share.F, share.I, share.W, given.send)
    if len(given.stages) != of.num_stages:
        raise UsageError(
            f"{text} has costs of {len(given.stages)} stages, {of.name} has {of.num_stages}",
            file=text,
            key="stages",
        )
    return given


def _costs_from_file(path: str) -> Costs:
    from partita.base.config import decode, load_json

    costs = decode(Costs, load_json(path), file=path)
    for i, stage in enumerate(costs.stages):
        numbers = [stage.F, stage.I, stage.W, stage.U, stage.activation_bytes, stage.hidden]
        _hold_sane(numbers, f"{path}: stages[{i}]")
    _hold_sane([costs.send], f"{path}: send")
    return costs


def _hold_sane(numbers: list[float], where: str) -> None:
    if not all(math.isfinite(x) and 0 <= x < 1e18 for x in numbers):
        raise UsageError(f"{where}: costs are finite numbers of at least 0", key="costs")


def _hold_to_limit(made: Schedule, costs: str, bound: Bound) -> None:
    limit, sizes, unit = bound.of(made, costs)
    problems = over_limit(made, limit, sizes, unit)
    if problems:
        p, m = made.num_ranks, made.num_microbatches
        others = (
            [] if bound.size is not None else [n for n in GENERATORS if _share(n, p, m) <= limit]
        )
        hint = (
            f"within it: {', '.join(others)}" if others else "fewer microbatches or ranks hold less"
        )
        message = f"{made.name} on {p} ranks with {m} microbatches holds more than {limit:g} {unit}"
        raise ScheduleError(f"{message}; {hint}", problems)


def _share(name: str, p: int, m: int) -> float:
    """The share that a schedule of a step holds; infinite where there is none for p and m."""
    if name == "auto":
        return math.inf
    try:
        made = schedule(name, num_ranks=p, num_microbatches=m)
    except ScheduleError:
        return math.inf
    return math.inf if made.is_forward_only else max(clocks.peak_share(made))


def _write_pictures(drawings: list[Drawing], svg: Path | None, html: Path | None) -> None:
    if svg is None and html is None:
        return
    pictures: dict[str, list[Span]] = {}
    held = {}
    for i, d in enumerate(drawings):
        if d.runs:
            again = "" if d.schedule.name not in pictures else f" ({i})"
            overhead = clocks.bubble_overhead(d.spans)
            title = f"{d.schedule.name}{again}   bubble overhead {overhead:.1%}"
            pictures[title] = d.spans
            held[title] = clocks.held_over_time(d.schedule, d.spans)
    if svg is not None:
        write_file(svg, timeline.svg(pictures, held=held) + "\n")
    if html is not None:
        write_file(html, timeline.html(pictures, title="Pipeline schedules", held=held))


def _print(drawings: list[Drawing]) -> None:
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for drawing in drawings:
        write_text(drawing.text(width) + "\n")
    header = ("schedule", "makespan", "span", "bubble overhead", "steady", "peak by rank")
    rows = [
        (
            d.schedule.name,
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
    return [(d.schedule.name, str(most.rank), warm_up, waited, str(whom), message, drain)]
