"""What the actions of `partita draw` cost: --costs in words or in a file, or what a run recorded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from partita.base.errors import UsageError
from partita.schedule.clock import Costs, StageCosts
from partita.schedule.ir import Schedule


@dataclass(frozen=True)
class Prices:
    """--costs; where there are none, those of a recorded step's stages; without either, F = I = W = 1."""

    text: str = ""
    recorded: Costs | None = None

    def given(self, ranks: int | None = None) -> Costs:
        """One entry for a rank's whole share, or one a stage; recorded ones by stage where they are those of
        so many `ranks`. Raises UsageError."""
        if self.text.endswith(".json"):
            return _from_file(self.text)
        if self.text:
            return _from_words(self.text)
        if self.recorded is None:
            return Costs((StageCosts(),))
        if ranks is None or len(self.recorded.stages) % ranks == 0:
            return self.recorded
        return _shared(self.recorded, ranks)

    def of(self, schedule: Schedule) -> Costs:
        """Of every stage of a schedule. Raises UsageError where a file has another number."""
        given = self.given()
        self.hold_to_stages(len(given.stages), schedule.name, schedule.num_stages)
        recorded = self.recorded is not None and not self.text
        if self.text.endswith(".json") or (recorded and len(given.stages) == schedule.num_stages):
            return given
        (share,) = (_shared(given, schedule.num_ranks) if recorded else given).stages
        equal = Costs.equal(schedule, share.F, share.I, share.W, given.send)
        return replace(equal, wire=given.wire)

    def hold_to_stages(self, has: int, name: str, *wanted: int) -> None:
        """Raises UsageError where a file has costs of another number of stages than a schedule has."""
        if self.text.endswith(".json") and has not in wanted:
            text = (
                f"{self.text} has costs of {has} stages, {name} has {' or '.join(map(str, wanted))}"
            )
            raise UsageError(text, file=self.text, key="stages")


def _shared(costs: Costs, ranks: int) -> Costs:
    """A rank's share of all the stages."""
    sums = (sum(s.of(kind) for s in costs.stages) / ranks for kind in "FIW")
    return replace(costs, stages=(StageCosts(*sums),))


def _from_words(text: str) -> Costs:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) not in (3, 4, 5):
        raise UsageError(
            f"--costs {text}: write F,I,W or F,I,W,SEND or F,I,W,SEND,WIRE, or FILE.json",
            key="costs",
        )
    _hold_sane(numbers, f"--costs {text}")
    _hold_some(numbers[:3], f"--costs {text}")
    _hold_part(*numbers[3:], where=f"--costs {text}")
    return Costs((StageCosts(*numbers[:3]),), *numbers[3:])


def _from_file(path: str) -> Costs:
    from partita.base.config import decode, load_json

    costs = decode(Costs, load_json(path), file=path)
    for i, stage in enumerate(costs.stages):
        numbers = [stage.F, stage.I, stage.W, stage.U, stage.activation_bytes, stage.hidden]
        _hold_sane(numbers, f"{path}: stages[{i}]")
    _hold_sane([costs.send], f"{path}: send")
    _hold_sane([costs.wire], f"{path}: wire")
    _hold_some([s.of(kind) for s in costs.stages for kind in "FIW"], path)
    _hold_part(costs.send, costs.wire, where=path)
    return costs


def _hold_sane(numbers: list[float], where: str) -> None:
    if not all(math.isfinite(x) and 0 <= x < 1e18 for x in numbers):
        raise UsageError(f"{where}: costs are finite numbers of at least 0", key="costs")


def _hold_some(numbers: list[float], where: str) -> None:
    if not any(numbers):
        raise UsageError(
            f"{where}: F, I and W all cost 0, so no action takes time; write e.g. 1,1,1",
            key="costs",
        )


def _hold_part(send: float = 0.0, wire: float = 0.0, *, where: str) -> None:
    if wire > send:
        raise UsageError(
            f"{where}: a link is taken for {wire:g} of the {send:g} that a message takes; at most all of it",
            key="costs",
        )
