"""Pipelines of plain modules beside one process, under any schedule, stages on any rank."""

from __future__ import annotations

from dataclasses import replace

import hourglass
import pytest
import torch
from hourglass import STAGES, WIRES, M, batches, module
from torch import nn
from torch.utils.checkpoint import checkpoint

import partita as pt
from partita.base.errors import UsageError
from partita.comm.protocol import Where
from partita.comm.recording import Recorder, RecordingComm
from partita.comm.single import SingleWorld
from partita.comm.threads.local import local
from partita.parallel.draws import drawing
from partita.parallel.pp.modules import PipelinedModules
from partita.parallel.pp.portals import ROW, Wire
from partita.schedule.clock import Costs, StageCosts
from partita.schedule.ir import Schedule
from partita.schedule.make import schedule
from partita.schedule.text import parse_schedule


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
    ("text", "says"),
    [
        ("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1", "1F1 waits for 0F1"),
        ("0F0,0F1,0B0,0B1\n1F0,1B0,1F1", "never done: 1B1"),
    ],
)
def test_a_schedule_made_by_hand_is_proven_before_anything_starts(text, says):
    """Not read from a file, so nobody has looked at it."""
    with local(2, 20) as ranks:
        for said in ranks.run(building, [Wire("x", 0, 1)], parse_schedule(text), (0, 1)):
            assert says in said and ("^--" in said or "<--" in said)


@pytest.mark.parametrize(
    ("first", "says"),
    [
        (
            {"y": torch.ones(1)},
            "stage 0 returned y float32[1] for microbatch 0; it returns a dict of x",
        ),
        ({"y": torch.ones(1)}, "'x' is missing: stage 1 takes it\n  'y' has no wire from here"),
        ({}, "stage 0 returned nothing"),
        (None, "stage 0 returned None for microbatch 0; it returns a dict of x"),
        (torch.ones(2), "stage 0 returned float32[2]"),
        ((torch.ones(2), torch.ones(2)), "a tuple is no dict of tensors"),
        ({"x": [torch.ones(1)]}, "'x' is a list: not a tensor; stage 1 takes it"),
        ({"x": None}, "'x' is None: not a tensor"),
        ({"x": torch.ones(1), "loss": torch.ones(2)}, "the loss is float32[2]: it is one number"),
        ({"x": torch.ones(1), "loss": torch.ones(1).long()}, "the loss is int64[1]"),
        ({"x": torch.ones(1), "loss": 1.0}, "the loss is a float: not a tensor"),
        ({"x": torch.ones(1, dtype=torch.complex64)}, "'x' is complex64[1]: types sent are"),
        ({"x": torch.ones([1] * 9)}, "at most 8 dims"),
        ({"x": torch.eye(2).to_sparse()}, "'x' is float32[2, 2]: what is sent is dense"),
    ],
)
def test_what_a_stage_returns_is_checked(first, says):
    def wrong(world):
        held = {0: lambda batch: first, 1: lambda batch, x: {"loss": x.sum()}}
        made = schedule("1f1b", num_ranks=2, num_microbatches=2)
        return PipelinedModules(held, [Wire("x", 0, 1)], made, world).run([None] * 2)

    with local(2, 5) as ranks, pytest.raises(UsageError) as found:
        ranks.run(wrong)
    assert "rank 0: stage 0" in str(found.value) and says in str(found.value)


def test_a_fault_of_a_module_says_where():
    def wrong(world):
        held = {0: lambda batch: {"x": torch.ones(1)}, 1: lambda batch, x: 1 / 0}
        made = schedule("1f1b", num_ranks=2, num_microbatches=2)
        return PipelinedModules(held, [Wire("x", 0, 1)], made, world).run([None] * 2)

    with local(2, 5) as ranks, pytest.raises(ZeroDivisionError) as found:
        ranks.run(wrong)
    assert "rank 1 ran stage 1, microbatch 0" in found.value.__notes__


def test_a_module_that_cannot_take_its_wires_is_refused():
    def built(world, held):
        made = schedule("1f1b", num_ranks=1, num_microbatches=1)
        with pytest.raises(UsageError) as found:
            PipelinedModules(held, [], made, world)
        return str(found.value)

    with local(1, 5) as ranks:
        (said,) = ranks.run(built, {0: lambda batch, x: {}})
        (other,) = ranks.run(built, {0: None})
    assert "stage 0 is called as (microbatch) and takes (batch, x)" in said
    assert "stage 0 is None: it cannot be called" in other


def test_arguments_of_another_kind_are_told_at_once():
    with pytest.raises(UsageError) as found:
        PipelinedModules([module(0)], [("x", 0, 1)], "1f1b", SingleWorld())
    for words in ("modules are a list", "a wire is a tuple: write Wire", "the schedule is a str"):
        assert words in str(found.value)


def test_a_step_without_a_loss_is_refused():
    def run(world):
        made = schedule("1f1b", num_ranks=1, num_microbatches=2)
        pipe = PipelinedModules({0: lambda batch: {}}, [], made, world)
        assert pipe.evaluate([None] * 2) == 0.0
        with pytest.raises(UsageError, match="no stage returned a 'loss'"):
            pipe.run([None] * 2)

    with local(1, 5) as ranks:
        ranks.run(run)


class Dropping(nn.Module):
    """Half of its elements, by the module, by the function and by a draw of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(6, 6), nn.Dropout(0.5)

    def forward(self, batch, x=None):
        x = self.drop(torch.tanh(self.linear(batch if x is None else x)))
        x = nn.functional.dropout(x, 0.3) + torch.rand_like(x) + torch.randn(6)
        return {"x": x} if self.last is False else {"loss": x.square().sum()}


def dropped(where, made):
    """Losses and gradients of two steps, one of them evaluated twice before."""
    held = {}
    for s in made.stages_of(where.rank):
        with drawing(3, "weights", s):
            held[s] = Dropping().double()
        held[s].last = s == made.num_stages - 1
    wires = [Wire("x", s, s + 1) for s in range(made.num_stages - 1)]
    pipe = PipelinedModules(held, wires, made, where, seed=7)
    noise = torch.Generator().manual_seed(1)
    data = [torch.randn(3, 6, dtype=torch.float64, generator=noise) for _ in range(4)]
    losses = [pipe.evaluate(data), pipe.evaluate(data), pipe.run(data), pipe.run(data)]
    return losses, {s: m.linear.weight.grad for s, m in held.items()}


def test_what_modules_draw_depends_on_no_other_rank():
    """Thread ranks draw what one process does that seeds torch's own generator, in every order."""
    whole, want = dropped(SingleWorld(), schedule("gpipe", num_ranks=1, num_microbatches=4))
    assert whole[0] == whole[1] and len({*whole}) == 3  # a step draws anew, an evaluation alike
    one = schedule("interleaved_1f1b", num_ranks=1, num_microbatches=4, virtual_stages=4)
    whole, want = dropped(SingleWorld(), one)
    before = torch.get_rng_state()
    for name in ("gpipe", "zb_h1"):
        made = schedule(name, num_ranks=4, num_microbatches=4)
        with local(4, 20) as ranks:
            found = ranks.run(dropped, made)
        for losses, mine in found:
            assert losses == pytest.approx(whole, rel=1e-12)
            for s, gradient in mine.items():
                assert torch.allclose(gradient, want[s], rtol=1e-12, atol=1e-13)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_checkpoint_that_draws_is_refused_on_thread_ranks():
    def step(batch):
        y = checkpoint(nn.functional.dropout, batch.requires_grad_(), use_reentrant=False)
        return {"loss": y.sum()}

    def run(world):
        pipe = PipelinedModules({0: step}, [], made, world)
        return pipe.run([torch.ones(4)])

    made = schedule("gpipe", num_ranks=1, num_microbatches=1)
    with local(1, 5) as ranks, pytest.raises(UsageError, match=r"torch\.utils\.checkpoint"):
        ranks.run(run)
    assert run(SingleWorld()) > 0


def test_a_context_has_the_pipelines_of_its_plan():
    """Two beside each other; each sees its own microbatches."""

    def run(context):
        made = schedule("1f1b", num_ranks=2, num_microbatches=2)
        first = {0: lambda batch: {"x": batch}, 1: lambda batch, x: {"loss": x.sum()}}
        pipe = PipelinedModules(first, [Wire("x", 0, 1)], made, context)
        share = context.coords["dp_replicate"] + 1.0
        return share, pipe.evaluate([torch.tensor(share)] * 2)

    with pt.local(4, "pp2 dp_replicate2") as ranks:
        assert {(share, loss) for share, loss in ranks.run(run)} == {(1.0, 2.0), (2.0, 4.0)}


def test_copies_of_a_stage_begin_alike_and_add_up_over_runs():
    made = schedule("dualpipe", num_ranks=2, num_microbatches=4)

    def run(world, unlike):
        with drawing(unlike * world.rank, "weights"):
            held = {s: nn.Linear(3, 3).double() for s in range(2)}

        def stage(s):
            return lambda batch, x=None: (
                {"x": held[s](batch)} if s == 0 else {"loss": held[s](x).sum()}
            )

        modules = {s: Called(held[s], stage(s)) for s in range(2)}
        pipe = PipelinedModules(modules, [Wire("x", 0, 1)], made, world)
        data = [torch.arange(3, dtype=torch.float64) + k for k in range(4)]
        found = []
        for _ in range(2):
            pipe.run(data)
            found.append(held[1].weight.grad.clone())
        return found

    with local(2, 20) as ranks:
        for once, twice in ranks.run(run, 0):
            assert torch.allclose(twice, 2 * once, rtol=1e-12)
        with pytest.raises(
            UsageError, match=r"stage 0: module\.weight \[3, 3\] of rank 1 is not rank 0's"
        ):
            ranks.run(run, 1)


class Called(nn.Module):
    """A function as a module, with the parameters of another."""

    def __init__(self, module, function) -> None:
        super().__init__()
        self.module, self.function = module, function

    def forward(self, batch, x=None):
        return self.function(batch, x)


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
