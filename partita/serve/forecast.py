"""What a server holds and is predicted to take: told where it starts, beside what it took where it stops."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from partita.base.units import format_bytes, format_seconds
from partita.cost.machine import machine_of
from partita.parallel.laid import Laid, lay
from partita.serve.piece import Runner
from partita.serve.stats import Histogram
from partita.serve.weights import found
from partita.simulate.serving.cut import Shape
from partita.simulate.serving.memory import held
from partita.simulate.serving.served import request_of
from partita.simulate.serving.step import Steps
from partita.simulate.serving.works import SERVERS
from partita.spec.calibrated import PRESET, calibrated
from partita.spec.cluster import Cluster
from partita.spec.plan import Plan

CONTEXT = 256  # tokens before the one that is predicted, or half of all that fit


@dataclass(frozen=True)
class Forecast:
    """Bytes of weights and of pages on the fullest rank; seconds from token to token of a request that is
    alone, None where this machine's rates are not known: of a GPU, where nobody ran `partita calibrate`, of
    more ranks than its cluster has."""

    weights: int
    pages: int
    itl_s: float | None

    def __str__(self) -> str:
        room = f"{format_bytes(self.weights)} of weights and {format_bytes(self.pages)} of pages a rank"
        if self.itl_s is None:
            return room
        each = format_seconds(self.itl_s)
        return f"{room}; predicted of a request that is alone: a token every {each}"

    def beside(self, between: Histogram) -> str:
        """What was predicted beside the mean of what was measured; empty where either is missing."""
        if self.itl_s is None or not between.count:
            return ""
        mean = format_seconds(between.sum / between.count)
        alone = format_seconds(self.itl_s)
        return f"a token every {mean} in the mean of {between.count:,}; {alone} predicted of a request alone"


def forecast(folder: Path, plan: str, dtype: str, runner: Runner, device: str) -> Forecast:
    """Of a folder's model under a plan that `runner` serves."""
    laid = lay(request_of(found(folder)[0], Plan.parse(plan), dtype))
    stages = held(laid, None, SERVERS["partita"], runner.page_size)
    taken = [(h.weights, (runner.pages + 1) * h.page) for h in stages]  # one page is scratch
    weights, pages = max(taken, key=sum)
    return Forecast(weights, pages, _itl_s(laid, runner) if device == "cpu" else None)


def _itl_s(laid: Laid, runner: Runner) -> float | None:
    cluster = calibrated(Cluster.load(PRESET))
    if cluster.piece_seconds is None or laid.mesh.world_size > cluster.devices:
        return None
    steps = Steps(laid, machine_of(cluster), SERVERS["partita"])
    return steps.step(Shape(1, min(CONTEXT, runner.max_len // 2), wanted=1)).latency_s
