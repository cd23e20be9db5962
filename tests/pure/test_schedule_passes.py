"""Passes: what they add stands where it must, and compute stays in order."""

import pytest

from partita.base.errors import UsageError
from partita.schedule.check import check
from partita.schedule.clock import clock, makespan
from partita.schedule.ir import COMPUTE, STEP, Action
from partita.schedule.make import schedule
from partita.schedule.passes import forward_only, fused, halved, with_communication
from partita.schedule.residence import (
    with_free,
    with_offload,
    with_reduce,
    with_shards,
    with_updates,
)
from partita.schedule.text import parse_action, print_ranks

NAMES = ["1f1b", "interleaved_1f1b", "looped_bfs", "zb_h1", "zb_v", "dualpipe", "dualpipev"]


def make(name: str, p: int = 4, m: int = 8):
    v = 2 if name in ("interleaved_1f1b", "looped_bfs") else 1
    return schedule(name, num_ranks=p, num_microbatches=m, virtual_stages=v)


@pytest.mark.parametrize("name", NAMES)
def test_every_message_has_its_channel_and_is_posted_before_it_is_needed(name):
    s = make(name)
    ranks = with_communication(s)
    sent = [a for own in ranks for a in own if a.is_send]
    posted = [a for own in ranks for a in own if a.is_receive]
    assert sorted(a.key for a in sent) == sorted(a.key for a in posted)
    assert len({a.key for a in sent}) == len(sent)
    for own, program in zip(s.ranks, ranks, strict=True):
        assert tuple(a for a in program if a.kind in COMPUTE) == own
        if not s.is_bidirectional:  # one channel is consumed in the order that it is sent in
            for channel in {a.channel for a in program if a.is_receive}:
                order = [a.microbatch for a in program if a.is_receive and a.channel == channel]
                sends = [a.microbatch for a in sent if a.channel == channel]
                assert order == sends


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_reduced_behind_their_last_weight_half(name):
    s = make(name)
    for rank, program in enumerate(with_reduce(with_communication(s))):
        reduced = [a.stage for a in program if a.kind == "REDUCE"]
        assert sorted(reduced) == list(s.stages_of(rank))
        for i, action in enumerate(program):
            if action.kind == "REDUCE":
                later = [a for a in program[i:] if a.stage == action.stage and a.kind in "BIW"]
                assert later == [] and program[i - 1].kind in ("B", "W")
    per_microbatch = [a for own in with_reduce(s.ranks, each_microbatch=True) for a in own]
    counts = sum(a.kind == "REDUCE" for a in per_microbatch)
    assert counts == sum(a.kind in "BW" for a in s.actions())


@pytest.mark.parametrize("keep", [1, 2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_weights_are_whole_when_they_are_needed_and_few_at_once(name, keep):
    for program in with_shards(make(name).ranks, keep):
        whole: set[int] = set()
        for a in program:
            if a.kind == "UNSHARD":
                assert a.stage not in whole
                whole.add(a.stage)
            elif a.kind == "RESHARD":
                whole.remove(a.stage)
            else:
                assert a.stage in whole
            assert len(whole) <= keep
        assert whole == set()


def test_breadth_first_gathers_twice_a_stage_less_at_the_turn():
    gathers = [
        sum(a.kind == "UNSHARD" for a in program)
        for name in ("looped_bfs", "interleaved_1f1b")
        for program in with_shards(make(name).ranks, keep=1)[:1]
    ]
    assert gathers[0] == 3 < gathers[1]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_away_is_back_before_its_backward(name):
    s = make(name)
    programs = with_free(with_offload(with_communication(s), ahead=2))
    for own, program in zip(s.ranks, programs, strict=True):
        assert tuple(a for a in program if a.kind in COMPUTE) == own
        away, freed = set(), set()
        for a in program:
            chunk = (a.stage, a.microbatch)
            if a.kind == "OFFLOAD":
                away.add(chunk)
            elif a.kind == "RELOAD":
                away.remove(chunk)
            elif a.kind == "FREE":
                freed.add(chunk)
            elif a.kind in "BIW":
                assert chunk not in away | freed
        assert away == set() and freed == {(a.stage, a.microbatch) for a in own}
    assert any(a.kind == "OFFLOAD" for program in programs for a in program)
    none = with_offload(s.ranks, stages=())
    assert none == s.ranks


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(
    "name", [*NAMES, "v_half", "chimera", "pipedream", "pipedream_2bw", "forward"]
)
def test_the_checker_finds_nothing_wrong_with_them(name, each):
    s = make(name)
    ranks = with_communication(s) if each else s.ranks
    program = with_free(with_offload(with_shards(with_reduce(ranks, each), keep=1 + each), ahead=2))
    assert {"UNSHARD", "RESHARD", "FREE"} <= {a.kind for own in program for a in own}
    assert check(s, program) == []


def test_updates_and_text():
    program = with_updates(with_reduce(make("zb_h1", 2, 3).ranks))
    assert program[0][-2:] == (Action(0, "REDUCE", STEP), Action(0, "U", 2))
    assert print_ranks(program).splitlines()[1].endswith("1W2,1REDUCE_GRAD,1U2")
    assert parse_action("3REDUCE_GRAD") == Action(3, "REDUCE", STEP)
    with pytest.raises(UsageError, match="is not an action"):
        parse_action("3F")


@pytest.mark.parametrize("name", NAMES)
def test_halves_and_whole_backwards(name):
    s = make(name)
    assert fused(halved(s)).ranks == fused(s).ranks
    assert check(halved(s)) == [] and check(fused(s)) == []
    assert makespan(clock(halved(s))) <= makespan(clock(s)) <= makespan(clock(fused(s)))
    evaluation = forward_only(s)
    assert check(evaluation) == [] and evaluation.is_forward_only
