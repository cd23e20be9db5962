import threading
import time

import comm_contract as contract
import pytest
import torch

import partita as pt
from partita.base.errors import CommError, PlanError, UsageError
from partita.comm.patience import Patience
from partita.comm.single import SingleWorld
from partita.comm.threads.local import local
from partita.comm.threads.meeting import Meeting


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_collective_is_what_one_process_computes(size):
    with local(size) as ranks:
        assert ranks.run(contract.collectives, 60) == [60] * size


def test_large_tensors_and_overlap():
    with local(3) as ranks:
        assert len(set(ranks.run(contract.large_and_overlapped))) == 1


@pytest.mark.parametrize("size", [2, 3])
def test_results_in_place(size):
    with local(size) as ranks:
        assert ranks.run(contract.in_place) == [size] * size


def test_messages_by_key():
    with local(4) as ranks:
        assert ranks.run(contract.messages) == [12] * 4


@pytest.mark.parametrize("body", [contract.collectives, contract.messages, contract.in_place])
def test_a_clocked_world_is_a_world(body):
    with local(3) as ranks:
        assert len(set(ranks.run(contract.clocked, body))) == 1


@pytest.mark.timed
@pytest.mark.parametrize("computes", [0.0, 0.2, 0.6])
def test_what_is_computed_under_a_transfer_is_not_exposed(computes):
    """exposed = max(0, transfer - compute), of 0.4 s, for a collective and for messages that queue."""
    want = max(computes, 0.4)

    def totals():
        with local(2) as ranks:
            return [t for found in ranks.run(contract.overlap, computes) for t in found]

    contract.best_of(totals, want, want + 0.04)


def test_a_rank_alone():
    assert contract.collectives(SingleWorld(), 20) == 20
    assert contract.in_place(SingleWorld()) == 1


@pytest.mark.parametrize("how", ["op", "shape", "order"])
def test_disagreement_is_told_at_once_with_both_sides(how):
    start = time.monotonic()
    with local(3, timeout_s=30) as ranks:
        told = ranks.run(contract.disagreement, how)
    assert time.monotonic() - start < 15  # half of the timeout
    text = max(told, key=len)
    assert "ranks disagree at tp collective #1 (blocks." in text
    assert (
        "rank 1" in text
        and "mlp.down:reduce_from" in text
        and "test_comm" not in text.split("\n")[0]
    )


def test_a_rank_that_leaves_is_named_at_once():
    def early(world):
        comm = world.comm("tp")
        if world.rank != 1:
            comm.all_reduce(torch.zeros(3), site="q")

    with (
        pytest.raises(
            CommError,
            match=r"^rank 1 has left: tp all_reduce #0 of group \(0, 1, 2, 3\) \(q\) cannot complete on rank",
        ),
        local(4, timeout_s=30) as ranks,
    ):
        ranks.run(early)


def test_a_deadlock_is_named_at_once():
    def crossed(world):
        a = world.make((0, 1), axis="a", lane="a")
        b = world.make((0, 1), axis="b", lane="b")
        (a if world.rank == 0 else b).all_reduce(torch.zeros(1), site="x")

    told = r"^deadlock: .* rank 0 waits for rank 1 in a all_reduce #0 of group \(0, 1\) \(x\)"
    with pytest.raises(CommError, match=told), local(2, timeout_s=30) as ranks:
        ranks.run(crossed)


def test_a_stuck_rank_is_named_at_the_deadline():
    free = threading.Event()

    def stuck(world):
        world.where.activity = "data"
        if world.rank == 1:
            free.wait(3)
        world.comm("tp").all_reduce(torch.zeros(1), site="x")

    told = r"^rank 1 did not come within 0.3 s: tp all_reduce #0 of group \(0, 1\) \(x\)"
    with pytest.raises(CommError, match=told), local(2, timeout_s=0.3) as ranks:
        ranks.run(stuck)
    free.set()


def test_who_waits_is_not_who_is_missing():
    meeting = Meeting(3, timeout_s=7)
    waits = {r: ("mail", ("pp", "pp_up", (0, 1, 2), r + 1, r, "key")) for r in range(2)}
    meeting.blocked |= waits
    with meeting.lock:
        meeting.late(0, *waits[0])
    told = "rank 2 did not come within 7 s: pp receive key of group (0, 1, 2) cannot complete on rank 1"
    assert meeting.failure is not None and meeting.failure.splitlines()[0] == told
    meeting.blocked[2] = ("mail", ("pp", "pp_up", (0, 1, 2), 0, 2, "key"))  # a ring
    meeting.failure = None
    with meeting.lock:
        meeting.late(0, *waits[0])
    assert "did not come" in str(meeting.failure)


def test_a_process_that_did_not_run_has_waited_for_nobody(monkeypatch):
    monkeypatch.setattr("partita.comm.patience.STALL_S", 0.01)
    patience = Patience(0.045)
    time.sleep(0.1)  # it was stopped
    looks = 1
    while not patience.is_over():
        time.sleep(0.02)
        looks += 1
    assert looks == 5


def test_the_first_error_is_raised_and_the_others_are_notes():
    def fails(world):
        if world.rank == 2:
            raise ValueError("mine")
        world.comm("tp").all_reduce(torch.zeros(1), site="x")

    with pytest.raises(ValueError, match="mine") as caught, local(4) as ranks:
        ranks.run(fails)
    assert any("rank 0" in note for note in caught.value.__notes__)


def test_sixty_four_ranks():
    def add(world):
        comm = world.comm("tp")
        return sum(float(comm.all_reduce(torch.ones(1), site=f"s{i}")) for i in range(5))

    with local(64) as ranks:
        assert ranks.run(add) == [320.0] * 64


def test_a_loop_of_ones_own_finds_its_ranks():
    """function(context, *args); pt.build(job) knows the thread's ranks without being told."""
    table = {
        "plan": "tp2", "model": {"preset": "tiny"}, "cluster": {"preset": "laptop"},
        "data": {"source": "python-stdlib", "tokenizer": "byte"},
        "train": {"steps": 1, "global_batch_size": 2, "seq_len": 16},
    }  # fmt: skip

    def loop(context, job):
        losses = []
        for given in (context, None):  # told, and found; twice on the same ranks
            model, _, data = pt.build(job, given)
            assert data.context.rank == context.rank
            losses += [model.forward_backward(batch) for batch in data]
        return losses

    with pt.local(2) as ranks:
        found = ranks.run(loop, pt.Job.load(table))
        with pytest.raises(UsageError, match="needs 4 ranks, here are 2"):
            ranks.run(loop, pt.Job.load(table, "plan=tp4"))
        for asked, why in (
            (("plan=dp2 3mb", "train.global_batch_size=8"), "global_batch_size is 8"),
            (("plan=pp2:pipedream/2mb", "train.clip_grad_norm=1.0"), "clip"),
        ):
            with pytest.raises(PlanError) as refused:
                ranks.run(loop, pt.Job.load(table, *asked))
            assert any(why in p.message for p in refused.value.problems), refused.value.problems
        with pytest.raises(UsageError, match="a Job"):
            ranks.run(loop, table)
    assert found[0] == found[1]
    assert found[0][0] == found[0][1]


def test_groups_of_a_plan_serve_a_notebook():
    def meet(context):
        mine = torch.tensor([10.0**context.rank])
        return [
            float(context.comm(axis).all_reduce(mine, site="here")) for axis in ("tp", "pp", "cp")
        ]

    with pt.local(4, "pp2 tp2") as ranks:
        assert ranks.run(meet)[0] == [11.0, 101.0, 1.0]
    with pytest.raises(UsageError, match="a plan of 4 ranks"):
        pt.local(2, "pp2 tp2")
