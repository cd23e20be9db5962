"""`partita draw`: schedules as text, SVG or HTML, with what they cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from partita.base.errors import Problem, ScheduleError, UsageError
from partita.cli.draw_costs import Prices
from partita.cli.drawing import Drawing, print_drawings, write_csv, write_pictures
from partita.cli.out import in_words, note, write_json
from partita.schedule import clock as clocks
from partita.schedule.check import over_limit
from partita.schedule.clock import Pair
from partita.schedule.ir import Schedule
from partita.schedule.make import GENERATORS, NAMES, generator_of, hold_to_size, schedule
from partita.schedule.make.files import file_problems, read_file, read_proven
from partita.schedule.steps import repeat
from partita.schedule.synth.partition import partitioned
from partita.schedule.synth.synthesis import Task, synthesise

if TYPE_CHECKING:
    from partita.report.actions import RecordedStep


@dataclass(frozen=True)
class Timing:
    """How schedules are clocked: --costs, --pair and --steps; what auto cuts into stages: --layers."""

    costs: Prices
    pair: Pair
    steps: int
    layers: str = ""


@dataclass(frozen=True)
class Bound:
    """--limit, in whole shares of a rank, or --limit-bytes; one for all ranks, or one for each."""

    shares: tuple[float, ...]
    size: tuple[float, ...]

    @staticmethod
    def read(shares: str, size: str) -> Bound:
        """From what the options say. Raises UsageError."""
        return Bound(_numbers("limit", shares), _numbers("limit-bytes", size))

    def of(
        self, made: Schedule, costs: Prices
    ) -> tuple[float | tuple[float, ...], list[float], str]:
        """(limit, what a microbatch holds at each stage, its unit); the limit may be infinite."""
        if self.size:
            self.hold_to_sizes(costs)
            sizes = [stage.activation_bytes for stage in costs.of(made).stages]
            return self.limit, sizes, "bytes of activations"
        return self.limit, [1 / made.virtual_stages] * made.num_stages, "activations"

    @property
    def limit(self) -> float | tuple[float, ...]:
        """What is given, of all ranks or of each; infinite where nothing is."""
        given = self.size or self.shares
        return given if len(given) > 1 else max(given, default=math.inf)

    def hold_to_sizes(self, costs: Prices) -> None:
        """Raises UsageError where bytes are limited and the costs have none."""
        sizes = [stage.activation_bytes for stage in costs.given().stages]
        if self.size and not any(sizes):
            message = "--limit-bytes needs --costs FILE.json with activation_bytes"
            raise UsageError(message, key="costs")


def _numbers(name: str, text: str) -> tuple[float, ...]:
    """Of an option; none where it is left out."""
    try:
        found = tuple(map(float, text.split(","))) if text else ()
    except ValueError:
        message = f"--{name} is '{text}': a number is wanted, or one for each rank, e.g. 4,3,3,4"
        raise UsageError(message, key=name) from None
    for value in found:
        if not value > 0:
            raise UsageError(f"--{name} is {value:g}; it must be above 0", key=name)
    return found


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("draw", help=draw.__doc__)(draw)


def draw(
    schedules: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SCHEDULE...",
            help=f"{', '.join(NAMES)}, file:<path>.csv, or a run's folder: what it recorded.",
        ),
    ] = None,
    ranks: Annotated[int | None, typer.Option("-p", "--num-ranks", help="Pipeline ranks.")] = None,
    microbatches: Annotated[
        int | None, typer.Option("-m", "--num-microbatches", help="Microbatches a step.")
    ] = None,
    virtual: Annotated[
        int | None, typer.Option("-v", "--virtual-stages", help="Stages a rank.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps back to back.")] = 1,
    costs: Annotated[
        str, typer.Option(help="F,I,W[,SEND[,WIRE]] of a rank's share, or FILE.json; else 1,1,1.")
    ] = "",
    layers: Annotated[
        str, typer.Option(help="FILE.json as of --costs, by layer: auto cuts them into stages.")
    ] = "",
    pair: Annotated[Pair, typer.Option(help="How an overlapped pair is timed.")] = "sequence",
    limit: Annotated[
        str, typer.Option(help="Most shares of activations a rank may hold; or each: 4,3,3,4.")
    ] = "",
    limit_bytes: Annotated[str, typer.Option(help="The same in bytes; needs a cost file.")] = "",
    check_file: Annotated[
        Path | None, typer.Option("--check", help="Prove that a schedule's CSV can run.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Write an SVG.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write one self-contained page.")] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write one schedule as torch's action CSV.")
    ] = None,
) -> None:
    """Schedules and what runs recorded, as text, SVG or HTML, side by side."""
    names, bound = _names(schedules, layers), Bound.read(limit, limit_bytes)
    runs = {name: _recorded(name) for name in names if _is_run(name)}
    first = next(iter(runs.values()), None)
    prices = Prices(costs, first and first.costs)
    how = Timing(prices, pair, _at_least_one("steps", steps), layers)
    size = Size(ranks, microbatches, virtual, first and first.schedule)
    drawings = [] if check_file is None else [_proved(check_file, how, bound)]
    for name in names:
        mine = name in runs and Drawing(runs[name].schedule, runs[name].spans, run=name)
        drawings.append(mine or _clocked(name, size, how, bound))
    if not drawings:
        raise UsageError(f"which schedule? There are {', '.join(NAMES)}, and file:<path>.csv")
    write_pictures(drawings, svg, html)
    write_csv(drawings, csv)
    if json:
        documents = [d.document() for d in drawings]
        write_json(documents[0] if len(documents) == 1 else {"schedules": documents})
    else:
        print_drawings(drawings)
    _refuse(check_file, [p for d in drawings for p in d.problems or () if p.severity == "error"])


def _names(schedules: list[str] | None, layers: str) -> list[str]:
    if layers and schedules != ["auto"]:
        raise UsageError("--layers is cut for one schedule, auto", key="layers")
    return schedules or []


def _refuse(file: Path | None, wrong: list[Problem]) -> None:
    """Exits with 1 where a file's schedule cannot run, the first cause last on stderr."""
    if wrong:
        cause = ", ".join(in_words(wrong[0].message.splitlines()[:2]))
        note(f"partita: {file}: {wrong[0].rule}: {cause}")
        raise typer.Exit(1)


def _at_least_one(name: str, value: int | None) -> int:
    if value is None:
        raise UsageError(f"how many {name}? e.g. -p 4 -m 8", key=name)
    if value < 1:
        raise UsageError(f"{name} is {value}; it must be at least 1", key=name)
    return value


def _is_run(name: str) -> bool:
    return name not in GENERATORS and Path(name).is_dir()


def _recorded(folder: str) -> RecordedStep:
    from partita.report.actions import (
        recorded_step,
    )  # reads jobs, which schedules alone do not need
    from partita.report.summary import read_run

    return recorded_step(read_run(Path(folder)))


@dataclass(frozen=True)
class Size:
    """-p, -m and -v; what is left out is a run's, where one is drawn beside."""

    ranks: int | None
    microbatches: int | None
    virtual: int | None
    like: Schedule | None

    @property
    def stated(self) -> bool:
        """Whether ranks or microbatches are known without a schedule's file."""
        return not (self.ranks is self.microbatches is None)

    def numbers(self) -> tuple[int, int]:
        """(ranks, microbatches). Raises UsageError where one is missing or below 1."""
        p, m = self.ranks, self.microbatches
        if self.like is not None:
            p = self.like.num_ranks if p is None else p
            m = self.like.num_microbatches if m is None else m
        return _at_least_one("ranks", p), _at_least_one("microbatches", m)

    def stages(self, name: str) -> int:
        """Stages a rank of a schedule; a run's where any number will do."""
        if self.virtual is not None:
            return self.virtual
        free = name in GENERATORS and GENERATORS[name].virtual
        return self.like.virtual_stages if self.like is not None and free else 1


def _make(name: str, size: Size) -> Schedule:
    if name.strip('"').startswith("file:") and not size.stated:
        return read_proven(name.strip('"').removeprefix("file:"))
    if not name.strip('"').startswith("file:"):
        if Path(name).parent != Path():  # no schedule's name, but a folder's
            raise UsageError(f"{name}: no such run; a schedule's file is file:{name}", file=name)
        generator_of(name)  # an unknown one has no size to ask for
    ranks, microbatches = size.numbers()
    return schedule(
        name, num_ranks=ranks, num_microbatches=microbatches, virtual_stages=size.stages(name)
    )


def _clocked(name: str, size: Size, how: Timing, bound: Bound) -> Drawing:
    if name == "auto":
        return _synthesised(size, how, bound)
    return _drawing(_within(_make(name, size), how.costs, bound), how)


def _drawing(made: Schedule, how: Timing, problems: list[Problem] | None = None) -> Drawing:
    prices = how.costs.of(made)
    if problems:
        return Drawing(made, [], problems)
    hold_to_size(made.num_stages, made.num_microbatches * how.steps)
    many = repeat(made, how.steps) if how.steps > 1 else made
    return Drawing(many, clocks.clock(many, prices, how.pair), problems, pair=how.pair)


def _synthesised(size: Size, how: Timing, bound: Bound) -> Drawing:
    """auto, at the costs and within the bound asked for; bidirectional schedules take part, as they do
    by name."""
    ranks, microbatches = size.numbers()
    virtual = max(2, _at_least_one("virtual-stages", size.stages("auto")))
    prices = Prices(how.layers) if how.layers else how.costs
    bound.hold_to_sizes(prices)
    costs, split, alone = prices.given(ranks), (), False
    if not how.layers:
        prices.hold_to_stages(len(costs.stages), "auto", ranks, 2 * ranks)
    task = Task(
        ranks, microbatches, costs, bound.limit, limit_in_bytes=bool(bound.size),
        stages=virtual, copies=1 if how.layers else 2,
    )  # fmt: skip
    if how.layers:
        cut = partitioned(task, costs.stages)
        found, split, alone = cut.synthesis, cut.split, cut.cut_proven
    else:
        found = synthesise(task)
    made = found.schedule
    many = repeat(made, how.steps) if how.steps > 1 else made
    spans = clocks.clock(many, found.costs, how.pair)
    return Drawing(many, spans, synthesis=found, pair=how.pair, split=split, cut_proven=alone)


def _proved(path: Path, how: Timing, bound: Bound) -> Drawing:
    """A file's schedule with all that keeps it from running, or from fitting its bound."""
    made, program = read_file(path)
    problems = file_problems(made, program)
    if not problems:
        limit, sizes, unit = bound.of(made, how.costs)
        problems = over_limit(made, limit, sizes, unit)
    return _drawing(made, how, problems)


def _within(made: Schedule, costs: Prices, bound: Bound) -> Schedule:
    """The schedule, where it fits the bound. Raises ScheduleError."""
    limit, sizes, unit = bound.of(made, costs)
    problems = over_limit(made, limit, sizes, unit)
    if problems:
        p, m = made.num_ranks, made.num_microbatches
        others = [] if bound.size else [n for n in GENERATORS if _fits(n, p, m, limit)]
        hint = (
            f"within it: {', '.join(others)}" if others else "fewer microbatches or ranks hold less"
        )
        most = ", ".join(f"{x:g}" for x in (limit if isinstance(limit, tuple) else (limit,)))
        message = f"{made.name} on {p} ranks with {m} microbatches holds more than {most} {unit}"
        raise ScheduleError(f"{message}; {hint}", problems)
    return made


def _fits(name: str, p: int, m: int, limit: float | tuple[float, ...]) -> bool:
    """Whether a schedule of a step exists for p and m and holds no more."""
    if name == "auto":
        return False
    try:
        made = schedule(name, num_ranks=p, num_microbatches=m)
    except ScheduleError:
        return False
    return not made.is_forward_only and not over_limit(made, limit)
