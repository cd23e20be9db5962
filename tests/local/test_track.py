"""Trackers get every number under a name with its unit, and no fault of theirs reaches the run."""

import json
import logging
import struct
import sys
import time

import pytest

from partita.base.errors import UsageError
from partita.spec.job import Job
from partita.train import track
from partita.train.loop import tracking

LINES = [
    {
        "step": s,
        "loss": 2.0 / s,
        "grad_norm": None,
        "tokens_per_s": 100.0 * s,
        "expert_load": [1, 2],
    }
    for s in (3, 4)
]
EXPECTED = {
    s: {"train/loss_nats_per_token": 2.0 / s, "speed/tokens_per_s": 100.0 * s} for s in (3, 4)
}
TABLE = {
    "name": "tracked", "model": {"preset": "tiny"}, "cluster": {"preset": "laptop"},
    "train": {"global_batch_size": 4, "seq_len": 32},
}  # fmt: skip


def job(*names):
    return Job.load({**TABLE, "train": {**TABLE["train"], "track": list(names)}})


def run(tmp_path, *names, lines=LINES, fails=False):
    """A run that goes on after two steps, from two more."""
    try:
        with tracking(job(*names), tmp_path, 2, speaks=True) as tracked:
            for line in lines:
                tracked.log(line)
            if fails:
                raise ValueError
    except ValueError:
        assert fails


@pytest.fixture
def library(tmp_path, monkeypatch):
    """library(name, text): a module on sys.path that notes what is called."""
    folder = tmp_path / "libraries"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))

    def make(name, text):
        (folder / f"{name}.py").write_text("calls = []\n" + text)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return make


WANDB = """
def init(**words):
    print("wandb: hello")
    calls.append(words)
    return Run()
class Run:
    def log(self, numbers, step): calls.append((step, numbers))
    def finish(self, exit_code): calls.append(exit_code)
"""
MLFLOW = """
def set_experiment(name): calls.append(name)
def start_run(run_name, tags): calls.append((run_name, tags))
def log_dict(table, name): calls.append((name, table["train"]["seq_len"]))
def log_metrics(numbers, step): calls.append((step, numbers))
def end_run(status): calls.append(status)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_each_library_is_told_every_number_and_the_end(tmp_path, library, capsys, fails):
    names = library("wandb", WANDB), library("mlflow", MLFLOW)
    run(tmp_path, *names, fails=fails)
    opened, *logged, code = sys.modules["wandb"].calls
    assert opened["project"] == "partita" and opened["resume"] == "allow"
    assert opened["config"]["train"]["seq_len"] == 32 and json.dumps(opened["config"])
    assert dict(logged) == EXPECTED and code == int(fails)
    experiment, (name, tags), about, *logged, status = sys.modules["mlflow"].calls
    assert (experiment, name, tags) == ("partita", "tracked", {"partita.run": opened["id"]})
    assert about == ("job.json", 32)
    assert dict(logged) == EXPECTED and status == ("FAILED" if fails else "FINISHED")
    out, err = capsys.readouterr()
    assert out == "" and "wandb: hello" in err


def scalars(path):
    """(step, name, value) of a TensorBoard event file, read from its bytes."""
    from tensorboardX.proto.event_pb2 import Event

    raw, found, steps = path.read_bytes(), [], []
    while raw:
        (length,) = struct.unpack("<Q", raw[:8])
        event = Event.FromString(raw[12 : 12 + length])
        raw = raw[16 + length :]
        found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
        steps += [event.step] if event.HasField("session_log") else []
    return found, steps


def test_tensorboard_reads_what_is_written(tmp_path):
    run(tmp_path, "tensorboard")
    (path,) = (tmp_path / "tensorboard").iterdir()
    found, purged = scalars(path)
    expected = [
        (s, n, pytest.approx(v)) for s, numbers in EXPECTED.items() for n, v in numbers.items()
    ]
    assert found == expected and purged == [3]


FAULTS = {
    "at import": "raise RuntimeError('no\\nserver')",
    "at start": "def init(**_): raise SystemExit('log in first')",
    "at a step": WANDB.replace("calls.append((step, numbers))", "1 / 0"),
    "at the end": WANDB.replace("calls.append(exit_code)", "raise OSError('gone')"),
    "by hanging": "import time\ndef init(**_): time.sleep(30)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_no_fault_of_a_tracker_reaches_the_run(fault, tmp_path, library, monkeypatch, caplog):
    monkeypatch.setattr(track, "PATIENCE_S", 1.0 if fault == "by hanging" else 10.0)
    monkeypatch.setattr(track, "WAITING", 5)
    start = time.monotonic()
    with caplog.at_level(logging.WARNING):
        lines = [{"step": s, "loss": 1.0} for s in range(20)]
        run(tmp_path, library("wandb", FAULTS[fault]), "tensorboard", lines=lines)
    assert time.monotonic() - start < 15  # not the 30 that it hangs
    (told,) = caplog.messages
    assert "\n" not in told
    assert told.startswith("wandb ") and ("training goes on" in told or "it is left" in told)
    assert (tmp_path / "tensorboard").is_dir()


def test_a_library_that_is_missing_is_named_with_what_installs_it(tmp_path, monkeypatch, caplog):
    for name in ("mlflow", "tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    run(tmp_path, "mlflow", "tensorboard")
    assert len(caplog.messages) == 2
    assert all("pip install 'partita[track]'" in m for m in caplog.messages)


def test_only_the_rank_that_speaks_tracks_and_names_are_known(tmp_path, library):
    library("wandb", "raise AssertionError")
    with tracking(job("wandb"), tmp_path, 0, speaks=False) as tracked:
        tracked.log(LINES[0])
    assert "wandb" not in sys.modules
    with pytest.raises(UsageError, match=r"train\.track"):
        job("comet")


def test_a_library_that_is_not_there_is_told_at_the_start(monkeypatch):
    monkeypatch.setattr(track, "LIBRARIES", {"wandb": ("no_such_library",), "mlflow": ("json",)})
    (told,) = track.absent(("wandb", "mlflow"))
    assert told.startswith("train.track: wandb not installed") and "partita[track]" in told
    assert track.absent(("mlflow",)) == [] == track.absent(())
