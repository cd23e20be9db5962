"""A forward and a backward that a schedule pairs take turns: rows of one travel while the other computes."""

import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from comm_contract import best_of
from test_dispatch_chunks import HIDDEN, TOKENS, Asleep, Experts

from partita.comm.clocked import ClockedWorld, Link
from partita.comm.protocol import Where
from partita.comm.threads.local import local
from partita.model.moe import MoE
from partita.model.transformer import LayerBlock
from partita.parallel.ep.dispatch import Exchange
from partita.parallel.pp.executor import Executor
from partita.parallel.pp.pieces import run
from partita.parallel.regions import IDENTITY, Region, Tape
from partita.schedule.text import parse_schedule

PAIRED = parse_schedule("0F0,0F1+0B0,0F2+0B1,0B2")


class Sleeping(MoE):
    """Experts alone, half of each token's gates."""

    def flow(self, x, batch, training, replay=False):
        chosen = torch.tensor([0, 1]).expand(1, TOKENS, 2)
        gates = torch.full((TOKENS, 2), 0.5, requires_grad=torch.is_grad_enabled())
        y, x = yield from self.experts(x, gates, self.exchange.plan(chosen), (x,))
        return x + y


class Stage:
    """Layers whose attention takes a time, and whose experts take as much, rows `leg_s` on their way."""

    def __init__(self, world, piece_s, leg_s, layers, recomputes):
        link = Link(0.0, TOKENS * 2 * HIDDEN * 4 / leg_s)
        comm = ClockedWorld(world, {"ep": link}).make((0, 1), axis="ep", lane="ep")
        quick = world.make((0, 1), axis="ep", lane="counts")
        count, send, back = (
            Region(kind, c, kind) for kind, c in (("counts", quick), ("send", comm), ("back", comm))
        )
        exchange = Exchange(2, 2, count, send, IDENTITY, IDENTITY, back, IDENTITY)
        widen, narrow = Experts(piece_s, True), Experts(piece_s, False)
        layer = LayerBlock.__new__(LayerBlock)
        layer.attention = lambda x, *_: Asleep.apply(x, piece_s)
        layer.mlp = Sleeping(None, None, exchange, widen, narrow, None)
        layer.recomputes, layer.tape, layer.training, layer.now = recomputes, Tape(), True, None
        layer.beside, self.layers = None, (layer,) * layers

    def flow(self, x, batch):
        x = torch.ones(TOKENS, HIDDEN, requires_grad=True)
        for layer in self.layers:
            x = yield from layer.flow(x, batch)
        return x.sum()

    def __call__(self, x, batch):
        return run(self.flow(x, batch))


def spans(world, piece_s, leg_s, overlaps, layers=1, recomputes=False):
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
        {0: Stage(world, piece_s, leg_s, layers, recomputes)}, PAIRED, 0, {}, Where(),
        lambda *_: torch.empty(0), span=Noted, overlaps=overlaps,
    )  # fmt: skip
    made.run([SimpleNamespace(step=0)] * 3)
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


@pytest.mark.timed
def test_a_pair_hides_what_travels_where_layers_run_again(piece_s=0.05, leg_s=0.03):
    """Two layers: eight pieces and eight legs go back, four and four forward. Each forward piece hides a leg,
    and each forward leg is hidden: four legs of the way back are seen of twelve, within 10 %."""

    def run_with(overlaps):
        with local(2, 20) as ranks:
            return ranks.run(
                partial(spans, piece_s=piece_s, leg_s=leg_s, layers=2, recomputes=True, overlaps=overlaps)
            )  # fmt: skip

    want = 12 * piece_s + 4 * leg_s
    best_of(lambda: [max(f["0F1"] for f in run_with(True))], want, 1.1 * want)
    for found in run_with(False):
        assert found["0F1"] + found["0B0"] >= 0.99 * 12 * (piece_s + leg_s)
