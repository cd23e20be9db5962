"""Our lists against torch's own generators. Its 1F1B list is wrong on the last rank and judges nothing."""

from types import MethodType, SimpleNamespace

import pytest
from torch.distributed.pipelining import schedules as torchs

from partita.schedule.check import check
from partita.schedule.ir import STEP, Action
from partita.schedule.make import schedule
from partita.schedule.text import cells, parse_program, parse_schedule, print_ranks, print_schedule


def actions_of_torch(kind: type, p: int, m: int, v: int) -> list[list]:
    """Each rank's actions as torch's generator lists them, idle places left out."""
    rounds = max(1, m // p)
    out = []
    for rank in range(p):
        sizes = SimpleNamespace(
            pp_group_size=p, rank=rank, n_local_stages=v, _num_stages=p * v, num_stages=p * v,
            _n_microbatches=m, _stages=range(v), number_of_rounds=rounds, microbatches_per_round=m // rounds,
        )  # fmt: skip
        if kind is torchs.ScheduleGPipe:
            listed = kind._get_pipeline_order(sizes)[rank]
        else:
            listed = MethodType(kind._calculate_single_rank_operations, sizes)(rank)
        out.append([a for a in listed if a is not None and "REDUCE" not in str(a)])
    return out


def cells_of_torch(kind: type, p: int, m: int, v: int) -> list[list[str]]:
    """Their cells."""
    return [list(map(str, row)) for row in actions_of_torch(kind, p, m, v)]


KINDS = {
    "gpipe": (torchs.ScheduleGPipe, (1,)),
    "interleaved_1f1b": (torchs.ScheduleInterleaved1F1B, (1, 2, 3)),
    "looped_bfs": (torchs.ScheduleLoopedBFS, (1, 2, 3)),
    "zb_h1": (torchs.ScheduleInterleavedZeroBubble, (1,)),
    "interleaved_zb": (torchs.ScheduleInterleavedZeroBubble, (1, 2, 3)),
    "zb_v": (torchs.ScheduleZBVZeroBubble, (2,)),
    "dualpipev": (torchs.ScheduleDualPipeV, (2,)),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_the_lists_are_torchs(name, p):
    kind, virtual = KINDS[name]
    for v in virtual:
        for m in (2 * p, 3 * p, 32):
            ours = schedule(name, num_ranks=p, num_microbatches=m, virtual_stages=v)
            theirs = cells_of_torch(kind, p, m, v)
            read = parse_schedule("\n".join(",".join(row) for row in theirs))
            assert read.ranks == ours.ranks, (p, m, v)
            assert read.placement == ours.placement
            pairs = [cells(row, read.paired) for row in read.ranks]
            assert pairs == [cells(row, ours.paired) for row in ours.ranks]


@pytest.mark.parametrize("name", KINDS)
def test_what_torch_adds_to_its_lists_stands_where_it_can(name):
    kind, virtual = KINDS[name]
    lists = actions_of_torch(kind, 4, 8, virtual[-1])
    lowered = []
    for row in lists:
        whole = torchs._add_unshard_reshard(list(row), max_active_stages=1)
        lowered.append(torchs._add_reduce_grad(list(whole), 8))
    made, program = parse_program("\n".join(",".join(map(str, row)) for row in lowered))
    assert program and {"UNSHARD", "REDUCE"} <= {a.kind for row in program for a in row}
    assert check(made, program) == []


@pytest.mark.parametrize("name", ["dualpipev", "zb_h1", "zb_v"])
def test_torchs_reader_takes_the_text_that_is_written(name):
    """All of it: a cell that it does not know it reads in part."""
    ours = schedule(name, num_ranks=2, num_microbatches=5)
    for row, actions in zip(print_schedule(ours).splitlines(), ours.ranks, strict=True):
        read = [torchs._Action.from_str(cell) for cell in row.split(",")]
        flat = [part for action in read for part in action.sub_actions or (action,)]
        assert [str(a) for a in flat] == [str(a) for a in actions]
    (cell,) = print_ranks([[Action(2, "REDUCE", STEP)]]).split(",")
    assert str(torchs._Action.from_str(cell)) == cell == "2REDUCE_GRAD"
