"""Pipelines of plain modules beside one process, under any schedule, stages on any rank."""

from __future__ import annotations

from dataclasses import replace

import hourglass
import pytest
import torch
from hourglass import STAGES, WIRES, M, batches, module

from partita.base.errors import UsageError
from partita.comm.local import local
from partita.comm.protocol import Where
from partita.comm.recording import Recorder, RecordingComm
from partita.parallel.pp.modules import PipelinedModules
from partita.parallel.pp.portals import ROW, Wire
from partita.schedule.clock import Costs, StageCosts
from partita.schedule.ir import Schedule
from partita.schedule.make import schedule


def in_turn(action) -> tuple[bool, int, int]:
    """All forwards, then all backwards; through the stages down and up."""
    forward = action.kind == "F"
    return not forward, action.microbatch, action.stage if forward else -action.stage


def by_hand() -> Schedule:
    """Stages 0 and 3 lie on rank 1, 1 and 2 on rank 0."""
    made = schedule("gpipe", num_ranks=4, num_microbatches=M)
    ranks = [[a for r in pair for a in made.ranks[r]] for pair in ((1, 2), (0, 3))]
    rows = tuple(tuple(sorted(row, key=in_turn)) for row in ranks)
    return replace(made, name="by hand", num_ranks=2, placement=(1, 0, 0, 1), ranks=rows)


def both_ways() -> Schedule:
    """auto's for dear ends: two copies of every stage, two stages a rank in each direction."""
    costs = Costs(tuple(StageCosts(c, c, c) for c in (0.6, 0.5, 0.5, 0.75)))
    made = schedule("auto", num_ranks=2, num_microbatches=2 * M, costs=costs, copies=2)
    assert made.placement == ((0, 1, 1, 0), (1, 0, 0, 1))
    return made


NAMED = [
    ("gpipe", 4, 1), ("1f1b", 4, 1), ("interleaved_1f1b", 2, 2), ("looped_bfs", 2, 2), ("zb_h1", 4, 1),
    ("zb_v", 2, 2), ("dualpipev", 2, 2), ("dualpipe", 4, 1),
]  # fmt: skip


def made_of(name: str, ranks: int, v: int) -> Schedule:
    if name == "by hand":
        return by_hand()
    if name == "auto":
        return both_ways()
    m = 2 * M if name == "dualpipe" else M
    return schedule(name, num_ranks=ranks, num_microbatches=m, virtual_stages=v)


@pytest.mark.parametrize("which", [*NAMED, ("by hand", 2, 1), ("auto", 2, 2)], ids=lambda w: w[0])
def test_any_schedule_is_one_process(which):
    made = made_of(*which)
    want, gradients = hourglass.one_process()
    times = made.num_microbatches // M
    with local(made.num_ranks, 20) as ranks:
        found = ranks.run(hourglass.run, made)
    for before, loss, mine in found:
        assert abs(loss - times * want) <= 1e-12 * abs(want) and before == loss
        for s, gradient in mine.items():
            assert torch.allclose(gradient, times * gradients[s], rtol=1e-12, atol=1e-13), s
    assert {s for *_, mine in found for s in mine} == set(range(STAGES))


def test_two_pipelines_beside_each_other():
    made = schedule("1f1b", num_ranks=4, num_microbatches=M)

    def pipeline(world):
        held = {world.rank % 4: module(world.rank % 4)}
        pipe = PipelinedModules(held, WIRES, made, world, groups=[range(4), range(4, 8)])
        return pipe.run(batches())

    with local(8, 20) as ranks:
        assert len(set(ranks.run(pipeline))) == 1


class Noted:
    """A world whose Comms are recorded."""

    def __init__(self, world) -> None:
        self.rank, self.size, self._world, self.recorder = (
            world.rank,
            world.size,
            world,
            Recorder(world.rank),
        )

    def make(self, ranks, *, axis, lane):
        made = self._world.make(ranks, axis=axis, lane=lane)
        return None if made is None else RecordingComm(made, self.recorder, Where())


def test_tensors_go_straight_to_the_stage_that_takes_them():
    """Stage 0's two skips and its labels leave once, by their own wires; labels bring nothing back."""

    def recorded(world):
        world = Noted(world)
        hourglass.run(world, schedule("gpipe", num_ranks=4, num_microbatches=M))
        return [(t.site, t.bytes) for t in world.recorder.take() if t.op == "send"]

    with local(4, 20) as ranks:
        sent = ranks.run(recorded)
    rows = sum(len(b["x"]) for b in batches())
    for name, wires, width in (("skip", 2, hourglass.WIDTH), ("labels", 1, 1)):
        found = [size for site, size in sent[0] if site == f"0.{name}:send"]
        both = 2 * wires * 8 * rows * width  # evaluated, then trained
        assert sum(found) == both, name
    assert not [site for site, _ in sent[1] if "skip" in site]
    tokens = [size for site, size in sent[1] if site == "1:send"]
    assert tokens == [8 * ROW * len(WIRES)] * 3 * M  # evaluated; trained, down and up
    back = {site for s in sent[2:] for site, _ in s if site.endswith("skip:send")}
    assert back == {"2.skip:send", "3.skip:send"}
    assert all(site != "3.labels:send" for site, _ in sent[3])
    assert sum(n for site, n in sent[3] if site == "3.skip:send") == 8 * rows * hourglass.WIDTH


def building(world, wires, made, held):
    with pytest.raises(UsageError) as found:
        PipelinedModules({s: module(s) for s in held}, wires, made, world)
    return str(found.value)


def test_every_wrong_wire_is_named_at_once():
    wires = [
        Wire("x", 1, 0),
        Wire("a b", 0, 1),
        Wire("loss", 0, 1),
        Wire("y", 0, 1),
        Wire("y", 0, 1),
    ]
    with local(2, 20) as ranks:
        made = schedule("1f1b", num_ranks=2, num_microbatches=2)
        said = ranks.run(building, wires, made, (0,))
        late = ranks.run(
            building, [], schedule("pipedream", num_ranks=2, num_microbatches=2), (0, 1)
        )
    assert "x 1->0: goes from a stage to a later one, of 0 to 1" in said[0]
    assert said[0].count("identifier") == 2 and "takes a 'y' already" in said[0]
    assert "rank 1 holds stage 1 and has no module" in said[1]
    assert all("pipedream updates under way" in s for s in late)


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (lambda batch: {"y": torch.ones(1)}, "stage 0 returned y; its wires carry x"),
        (lambda batch: {}, "stage 0 returned nothing"),
        (lambda batch: {"x": torch.ones(1), "loss": torch.ones(2)}, "the loss of stage 0 is [2]"),
        (lambda batch: {"x": torch.ones(1, dtype=torch.complex64)}, "wire x 0->1: complex64[1]"),
        (lambda batch: {"x": torch.ones([1] * 9)}, "at most 8 dims"),
    ],
)
def test_what_a_stage_returns_is_checked(first, says):
    def wrong(world):
        held = {0: first, 1: lambda batch, x: {"loss": x.sum()}}
        made = schedule("1f1b", num_ranks=2, num_microbatches=2)
        return PipelinedModules(held, [Wire("x", 0, 1)], made, world).run([None] * 2)

    with local(2, 5) as ranks, pytest.raises(UsageError) as found:
        ranks.run(wrong)
    assert says in str(found.value)


def test_microbatches_are_counted():
    def wrong(world):
        pipe = PipelinedModules(
            {0: module(0)}, [], schedule("forward", num_ranks=1, num_microbatches=2), world
        )
        with pytest.raises(UsageError, match="3 microbatches for a schedule of 2"):
            pipe.evaluate([None] * 3)
        with pytest.raises(UsageError, match="forward has no backward"):
            pipe.run([None] * 2)
        return True

    with local(1, 5) as ranks:
        assert ranks.run(wrong) == [True]
