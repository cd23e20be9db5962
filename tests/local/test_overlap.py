"""A forward and a backward that a schedule pairs take turns: rows of one travel while the other computes."""

import time
from functools import partial

import pytest
import torch
from comm_contract import best_of
from test_dispatch_chunks import HIDDEN, TOKENS, Asleep, Experts

from partita.comm.clocked import ClockedWorld, Link
from partita.comm.local import local
from partita.comm.protocol import Where
from partita.model.moe import MoE
from partita.parallel.ep.dispatch import Exchange
from partita.parallel.pp.executor import Executor
from partita.parallel.pp.pieces import run
from partita.parallel.regions import IDENTITY, Region
from partita.schedule.text import parse_schedule

PAIRED = parse_schedule("0F0,0F1+0B0,0F2+0B1,0B2")


class Layer:
    """Attention that takes a time, and experts that take as much, rows `leg_s` on their way."""

    def __init__(self, world, piece_s, leg_s):
        self.piece_s = piece_s
        link = Link(0.0, TOKENS * 2 * HIDDEN * 4 / leg_s)
        comm = ClockedWorld(world, {"ep": link}).make((0, 1), axis="ep", lane="ep")
        quick = world.make((0, 1), axis="ep", lane="counts")
        count, send, back = (
            Region(kind, c, kind) for kind, c in (("counts", quick), ("send", comm), ("back", comm))
        )
        exchange = Exchange(2, 2, count, send, IDENTITY, IDENTITY, back, IDENTITY)
        widen, narrow = Experts(piece_s, True), Experts(piece_s, False)
        self.moe = MoE(None, None, exchange, widen, narrow, None)

    def flow(self, x, batch):
        x = Asleep.apply(torch.ones(TOKENS, HIDDEN, requires_grad=True), self.piece_s)
        chosen = torch.tensor([0, 1]).expand(1, TOKENS, 2)
        gates = torch.full((TOKENS, 2), 0.5, requires_grad=True)
        y, x = yield from self.moe.experts(x, gates, self.moe.exchange.plan(chosen), (x,))
        return (x + y).sum()

    def __call__(self, x, batch):
        return run(self.flow(x, batch))


def spans(world, piece_s, leg_s, overlaps):
    """Seconds of each action; of a pair both are the pair's."""
    found = {}

    class Noted:
        def __init__(self, action):
            self.action = str(action)

        def __enter__(self):
            self.start = time.perf_counter()

        def __exit__(self, *_):
            found[self.action] = time.perf_counter() - self.start

    made = Executor(
        {0: Layer(world, piece_s, leg_s)}, PAIRED, 0, {}, Where(), lambda *_: torch.empty(0),
        span=Noted, overlaps=overlaps,
    )  # fmt: skip
    made.run([None] * 3)
    return found


@pytest.mark.timed
@pytest.mark.parametrize(
    ("piece_s", "leg_s"), [(0.03, 0.02), pytest.param(0.01, 0.03, marks=pytest.mark.slow)]
)
def test_a_pair_hides_what_travels(piece_s, leg_s):
    """Four pieces of compute and four legs: alone one after the other, in a pair the longer of both, so that
    exposed = max(0, transfer - compute), within 10 %."""
    compute, transfer = 4 * piece_s, 4 * leg_s

    def run_with(overlaps):
        with local(2, 20) as ranks:
            return ranks.run(partial(spans, piece_s=piece_s, leg_s=leg_s, overlaps=overlaps))

    want = max(compute, transfer)
    best_of(lambda: [max(f["0F1"] for f in run_with(True))], want, 1.1 * want)
    for found in run_with(False):
        assert found["0F1"] + found["0B0"] >= 0.99 * (compute + transfer)
        assert found["0F0"] >= 0.99 * (compute + transfer) / 2
