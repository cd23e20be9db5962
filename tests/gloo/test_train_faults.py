"""`partita train` when a rank dies, hangs or leaves, in every phase: who is named, how soon, with which
exit code, and that the next start goes on to the bits of a run that nothing happened to."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import faults
import pytest
from strikes import Strike, struck

from partita.base.errors import CommError, PeerError
from partita.comm.processes import start_ranks
from partita.record.run import read_metrics
from partita.report.make import report_page
from partita.report.summary import read_run
from partita.spec.job import Job
from partita.train.checkpoints import checkpoint
from partita.train.control import Control
from partita.train.launch import oom
from partita.train.launch.launcher import GRACE_S, Launcher, Stops
from partita.train.launch.rank import Report, RunSpec, new_scratch
from partita.train.stragglers import RATIO

LOG = faults.RUN / "logs" / "rank-0.log"
pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def unhurt(tmp_path_factory) -> list[tuple[float, ...]]:
    """The metrics of the run that nothing happens to."""
    start_ranks(0, print, ())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("unhurt"))
        faults.write_job()
        assert faults.train() == 0
        return faults.metrics()


@pytest.fixture
def small(tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The job, in the current folder; where its runs keep what nobody needs."""
    monkeypatch.chdir(tmp_path)
    faults.write_job()
    return scratch


def strike(monkeypatch: pytest.MonkeyPatch, what: Strike, *words: str, code: int = 71) -> float:
    """Trains under the strike, to this exit code; the seconds it took."""
    start = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setattr("partita.train.launch.launcher.start_ranks", struck(what))
        assert faults.train(*words) == code
    return time.monotonic() - start


def check_after(
    what: Strike, err: str, unhurt: list[tuple[float, ...]], how: str, scratch: Path
) -> None:
    """One line names the rank, what befell it, its step and phase; the rest is as the table asks."""
    last = err.strip().splitlines()[-1]
    assert last.startswith(f"partita: rank {what.rank} {how}"), last
    assert f"in step {what.step} ({what.at})" in last
    assert "Traceback" not in err
    told = faults.failure()
    assert set(told) == {"rank", "phase", "step", "site", "message", "secondary", "stack"}
    tells = what.how in ("hold", "stop", "fault") and what.step > 0  # before that nobody listens
    if tells:
        inner = next(x for x in told["stack"] if "/strikes.py:" in x)
        assert f", at {told['stack'][0]} < " in last and inner.endswith(" hit")
        assert any(x.startswith("partita/") for x in told["stack"]), told
    assert tells or not told["stack"]
    assert (told["rank"], told["phase"], told["step"]) == (what.rank, what.at, what.step)
    assert last.removeprefix("partita: ") == told["message"]
    other = 1 - what.rank
    assert all(x.startswith(f"rank {other}: rank {what.rank} ") for x in told["secondary"])
    assert not multiprocessing.active_children()
    assert not faults.left_behind(scratch)
    newest = checkpoint.newest_complete(faults.RUN / "checkpoints")
    # that of step 2 is written behind step 3, and is there before that of step 4 begins
    expected = {0: [None], 3: [None, "step-00000002"], 4: ["step-00000002"], 5: ["step-00000005"]}
    assert (newest.name if newest else None) in expected[what.step]
    done, kept = faults.RUN / "metrics.jsonl", faults.RUN / "metrics-1.jsonl"
    lost = done.read_text() if newest is None and done.exists() else ""
    anew = "no checkpoint was written yet: started again, the job begins anew"
    goes_on = newest and f"start the job again to go on from step {int(newest.name[-8:])}"
    assert last.endswith(goes_on or anew)
    assert faults.train() == 0
    assert (kept.read_text() if kept.exists() else "") == lost
    assert faults.metrics() == unhurt
    assert not (faults.RUN / "failure.json").exists()


FAST = [
    Strike("kill", "starting", step=0),
    Strike("kill", "forward", call=2),
    Strike("kill", "checkpoint", step=4, call=2),
]
SLOW = [
    Strike("kill", "data"),
    Strike("kill", "forward"),
    Strike("kill", "backward"),
    Strike("kill", "backward", call=1),
    Strike("kill", "loss"),
    Strike("kill", "optimizer"),
    Strike("kill", "optimizer", call=1),
    Strike("kill", "checkpoint", step=4),
    Strike("kill", "forward", call=2, rank=0),
]


LATER = (pytest.mark.slow, pytest.mark.turns(3))


@pytest.mark.parametrize("what", [*FAST, *(pytest.param(x, marks=LATER) for x in SLOW)], ids=str)
def test_a_killed_rank_is_named_and_the_next_start_goes_on(what, small, unhurt, monkeypatch, capfd):
    assert strike(monkeypatch, what) < GRACE_S + faults.SLACK_S
    check_after(what, capfd.readouterr().err, unhurt, "was killed by SIGKILL (9)", small)


@pytest.mark.parametrize(
    "what",
    [
        Strike("exit", "optimizer"),
        pytest.param(Strike("exit", "backward", call=1), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_rank_that_leaves_in_order_is_named(what, small, unhurt, monkeypatch, capfd):
    assert strike(monkeypatch, what) < GRACE_S + faults.SLACK_S
    check_after(what, capfd.readouterr().err, unhurt, "exited with code 0", small)


@pytest.mark.slow
def test_a_rank_that_crashes_tells_where(small, unhurt, monkeypatch, capfd):
    what = Strike("fault", "backward", call=1)
    assert strike(monkeypatch, what) < GRACE_S + faults.SLACK_S
    check_after(what, capfd.readouterr().err, unhurt, "was killed by SIGSEGV (11)", small)


@pytest.fixture
def group() -> Iterator[Path]:
    """A memory cgroup of 48 MB."""
    own = oom.own_group()
    made = None if own is None else own / f"partita-{os.getpid()}"
    try:
        assert made is not None
        made.mkdir()
        limit = next(made / name for name in oom.LIMITS if (made / name).exists())
        limit.write_text(str(48 << 20))
    except (AssertionError, OSError, StopIteration) as error:
        if made is not None and made.exists():
            made.rmdir()
        pytest.skip(
            f"no memory cgroup can be made here ({error!r}): it takes root and a writable one"
        )
    yield made
    made.rmdir()


@pytest.mark.slow
def test_a_rank_without_memory_is_told_as_that(group, small, unhurt, monkeypatch, capfd):
    Path("group").write_text(str(group))
    monkeypatch.setattr("partita.train.launch.launcher.own_group", lambda: group)
    what = Strike("eat", "backward", call=1)
    assert strike(monkeypatch, what) < GRACE_S + faults.SLACK_S
    err = capfd.readouterr().err
    assert f" on each of 2 ranks; {group} allows 50.3 MB; " in err
    assert "cluster.memory_bytes=25165824" in err
    check_after(what, err, unhurt, "was killed by the out-of-memory killer (SIGKILL)", small)


@pytest.mark.slow
def test_the_end_of_the_fork_server_is_told_as_that(small, unhurt, monkeypatch, capfd):
    what = Strike("server", "backward", rank=0)
    assert strike(monkeypatch, what) < GRACE_S + faults.SLACK_S
    check_after(what, capfd.readouterr().err, unhurt, "ended with the fork server of all", small)


@pytest.mark.parametrize(
    "what",
    [
        Strike("hold", "data"),
        pytest.param(Strike("stop", "backward", call=1), marks=pytest.mark.slow),
        pytest.param(Strike("stop", "checkpoint", step=4), marks=LATER),
        pytest.param(Strike("stop", "starting", step=0), marks=LATER),
        pytest.param(Strike("stop", "finished", step=5), marks=LATER),
        Strike("stop", "finished", step=5, reports=True),
    ],
    ids=str,
)
def test_a_rank_that_hangs_is_named_within_the_timeout(what, small, unhurt, monkeypatch, capfd):
    took = strike(monkeypatch, what, f"train.comm_timeout_s={faults.SHORT_S}")
    assert faults.SHORT_S < took < faults.SHORT_S + GRACE_S + faults.SLACK_S
    check_after(what, capfd.readouterr().err, unhurt, "hangs", small)
    if not what.reports:  # else no rank waits for it, only the launcher
        assert f"did not {'join' if what.step == 0 else 'come'}" in LOG.read_text()


@pytest.mark.slow
def test_a_slow_rank_is_named_and_changes_no_number(small, unhurt, monkeypatch, capfd):
    strike(monkeypatch, Strike("slow", "forward", step=4), "train.steps=14", code=0)
    assert faults.metrics()[:5] == unhurt
    lines = read_metrics(faults.RUN / "metrics.jsonl")
    assert "straggler" not in lines[6] and lines[-1]["straggler"] == 1
    assert lines[-1]["straggler_ratio"] > RATIO
    assert LOG.read_text().count("rank 1 takes ") == 1
    told = read_run(faults.RUN)
    assert set(told.stragglers) == {1} and "slower than ranks with" in report_page(told)


def test_who_is_waited_for_is_named_before_who_has_not_spoken(small):
    """Rank 1 began to wait for 3 later than 2 did."""
    job = Job.load("job.toml", "plan=dp_replicate4", "train.global_batch_size=4")
    (faults.RUN / "logs").mkdir(parents=True)
    launcher = Launcher(RunSpec(job, faults.RUN), Stops())
    for rank, of in ((2, 3), (0, 2)):
        error = CommError(f"rank {of} did not come")
        error.rank = of
        launcher.reports[rank] = Report(rank, error=error)
    with pytest.raises(PeerError, match=r"^rank 3 hangs in step 0"):
        launcher._result()
    assert faults.failure()["rank"] == 3
    launcher.spec.clean()


def test_what_a_launcher_left_that_was_killed_before_its_ranks_began_is_removed_by_the_next(small):
    left = RunSpec(Job.load("job.toml"), faults.RUN)
    held = Control(left.control_path, 2, create=True)
    os.utime(left.control_path, (0, 0))
    new_scratch()
    assert left.control_path.exists()
    del held
    young = new_scratch()
    assert young.exists() and not left.scratch.exists()


@pytest.mark.parametrize(
    ("what", "cause"),
    [
        (
            Strike("nan", "forward"),
            "the loss of step 3 is nan: first bad tensor is the weight head.table, on rank 1",
        ),
        (
            Strike("nan", "backward"),
            "the gradient norm of step 3 is nan: first bad tensor is the gradient of head.table, on rank 1",
        ),
    ],
    ids=str,
)
def test_a_number_that_is_none_stops_before_the_update(
    what, cause, small, unhurt, monkeypatch, capfd
):
    assert strike(monkeypatch, what, code=72) < GRACE_S + faults.SLACK_S
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last == f"partita: {cause}; nothing was updated"
    assert faults.failure()["rank"] == 1 and faults.failure()["site"] == "head.table"
    newest = checkpoint.newest_complete(faults.RUN / "checkpoints")
    assert newest is not None and newest.name == "step-00000002"
    assert faults.train() == 0
    assert faults.metrics() == unhurt


@pytest.mark.slow
def test_a_flipped_bit_ends_the_run_and_steps_computed_twice_are_the_same_run(
    small, unhurt, monkeypatch, capfd
):
    words = ("train.replay_every=1",)
    strike(monkeypatch, Strike("flip", "forward"), *words, code=74)
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        "partita: step 3, computed twice, gives two answers: the first is what rank 1"
    )
    told = faults.failure()
    assert told["rank"] == 1 and told["step"] == 3 and told["site"] in last
    newest = checkpoint.newest_complete(faults.RUN / "checkpoints")
    assert newest is not None and newest.name == "step-00000002"
    assert faults.train(*words) == 0
    assert faults.metrics() == unhurt
    assert read_run(faults.RUN).traffic_equal  # of a step that was computed twice


@pytest.mark.slow
def test_an_overflow_names_the_block_it_began_in(small, capfd):
    hot = ["train.optimizer=sgd", "train.lr=1e6", "train.clip_grad_norm=0", "plan=pp2/2mb"]
    assert faults.train(*hot) == 72
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "first bad tensor is the " in last and " on rank " in last, last
    assert "nothing was updated" in last or "no checkpoint was written" in last
    newest = checkpoint.newest_complete(faults.RUN / "checkpoints")
    assert newest is None or checkpoint.verify(newest)
