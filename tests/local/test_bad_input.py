"""What `partita train` answers to a bad job or bad data: one line, the right exit code, soon and small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import partita as pt
from partita.base.config import to_toml
from partita.base.errors import UsageError
from partita.cli.main import run as command
from partita.cli.train import _summary

JOB = {
    "plan": "tp2",
    "model": {
        "family": "llama", "layers": 2, "hidden": 16, "heads": 2, "kv_heads": 2, "ffn_hidden": 32,
        "vocab": 256, "max_seq_len": 32,
    },
    "cluster": {"preset": "laptop"},
    "data": {"source": "text.txt", "tokenizer": "byte"},
    "train": {"steps": 2, "global_batch_size": 2, "seq_len": 16},
}  # fmt: skip
SECONDS = 5.0

USAGE = {
    "train.stepz=1": ("train.stepz", "did you mean 'steps'?"),
    "train.steps=abc": ("train.steps", "expected 'int'"),
    "train.steps=1.5": ("train.steps", "expected 'int'"),
    "train.lr=nan": ("train.lr", "not a finite number"),
    "train.lr=1e309": ("train.lr", "not a finite number"),
    "train.seq_len=0": ("train.seq_len", "within 1"),
    "train.keep_last=-1": ("train.keep_last", "within 1"),
    "train.comm_timeout_s=0": ("train.comm_timeout_s", "within 0.1"),
    "train.optimizer=adan": ("train.optimizer", "adamw"),
    "model.layers=1000000000000": ("model.layers", "within 1..100000"),
    "model.heads=-1": ("model.heads", "within 1.."),
    "model.hidden=1000000000000": ("model.hidden", "within 1.."),
    "model.vocab=1000000000000": ("model.vocab", "within 1.."),
    "plan=tp0": ("plan", "tp0"),
    "plan=1000000000000mb": ("plan", "within 1.."),
    "name=../up": ("name", "names a folder"),
    "name=a\nb\0": ("name", r"'a\nb\x00' names a folder"),
    "seed=-1": ("seed", "0 <= seed"),
    "device=cuda": ("device", "sees no GPU on this host; accepted here: auto, cpu"),
    "data.source=nowhere.txt": ("data.source", "no such file; accepted: python-stdlib"),
    "data.source=.": ("data.source", "is a folder"),
    "data.source=pipe.txt": ("data.source", "is no plain file"),
    "data.source=hf:nowhere": ("data.source", "no such data set in"),
    "data.source=nowhere.idx": ("data.source", "no such file"),
    "data.source=tokens:nowhere.npy": ("data.source", "no such file"),
    "data.tokenizer=nowhere.json": ("data.tokenizer", "accepted: byte, train:N"),
    "data.tokenizer=train:10": ("data.tokenizer", "at least 257"),
}
DATA = {
    "empty.txt": "is empty",
    "short.txt": "one sequence needs train.seq_len + 1 = 17",
    "binary.txt": "byte 2 is NUL",
    "latin.txt": "byte 3",
    "bad.jsonl": "line 2",
    "bad.parquet": "row 1: cannot be read",
    "chat.jsonl": "line 1: its 1 messages hold no answer",
    "bad.idx": "byte 0: begins b'PK",
    "tokens:high.npy": "token 150 is 256, outside [0, 256)",
    "tokens:low.npy": "token 150 is -1, outside [0, 256)",
    "tokens:cut.npy": "not a readable .npy",
    "tokens:float.npy": "a 1-D array of integers is needed",
    "tokens:pickled.npy": "not a readable .npy",
    "tokens:few.npy": "one sequence needs",
    "tokens:text.txt": "not a readable .npy: it does not begin as one",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The job, and every bad file."""
    monkeypatch.chdir(tmp_path)
    Path("job.toml").write_text(to_toml(JOB))
    Path("text.txt").write_text("the cat sat on a mat " * 100)
    Path("empty.txt").write_text("")
    os.mkfifo("pipe.txt")
    Path("short.txt").write_text("hi")
    Path("binary.txt").write_bytes(b"ab\0" * 100)
    Path("latin.txt").write_bytes(b"caf\xe9 " * 100)
    Path("bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    Path("bad.json").write_text("{")
    Path("mute.json").write_text(
        '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}}'
    )
    Path("bad.parquet").write_bytes(b"PAR1" * 9)
    Path("chat.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    Path("bad.idx").write_bytes(b"PK")
    Path("bad.bin").write_bytes(b"")
    ids = np.array([1, 2, 3] * 100)
    np.save("high.npy", np.where(np.arange(300) == 150, 256, ids))
    np.save("low.npy", np.where(np.arange(300) == 150, -1, ids))
    Path("cut.npy").write_bytes(Path("low.npy").read_bytes()[:150])
    np.save("float.npy", np.ones(300))
    np.save("pickled.npy", np.array([{}]), allow_pickle=True)
    np.save("few.npy", np.ones(5, np.int64))
    return tmp_path


def refused(capsys, code: int, *words: str) -> dict[str, str]:
    """Runs train with --json, to this exit code; the error. One line is told, and nothing is made."""
    start = time.thread_time()
    assert command(["train", "job.toml", *words, "--json"]) == code
    assert time.thread_time() - start < SECONDS
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert set(document) - {"problems"} == {"format", "error"} and document["format"] == 1
    error = document["error"]
    assert set(error) == {"kind", "message", "file", "key"}
    if code != 1:
        assert len(err.strip().splitlines()) == 1
    assert err.strip().splitlines()[-1].startswith("partita: ")
    assert not Path("runs/job/metrics.jsonl").exists()
    return error


@pytest.mark.parametrize("word", USAGE)
def test_a_wrong_word_is_2_with_its_key(word: str, folder: Path, capsys) -> None:
    key, text = USAGE[word]
    error = refused(capsys, 2, word)
    assert error["kind"] == "usage" and error["key"] == key, error
    assert text in error["message"]


@pytest.mark.parametrize(("job", "text"), [("pipe.txt", "no plain file"), ("link", "no such file")])
def test_a_job_that_is_no_file_is_2(job: str, text: str, folder: Path, capsys) -> None:
    Path("link").symlink_to("nowhere")
    assert command(["train", job]) == 2
    assert capsys.readouterr().err == f"partita: {job}: {text}\n"


def test_a_run_folder_whose_files_are_none_is_73_at_start(folder: Path, capsys) -> None:
    Path("runs/job").mkdir(parents=True)
    os.mkfifo("runs/job/metrics.jsonl")
    assert command(["train", "job.toml"]) == 73
    assert "metrics.jsonl: it is no plain file" in capsys.readouterr().err


@pytest.mark.parametrize("source", DATA)
def test_bad_data_is_65_with_its_file(source: str, folder: Path, capsys) -> None:
    error = refused(capsys, 65, f"data.source={source}")
    assert error["kind"] == "data" and DATA[source] in error["message"], error
    assert error["file"] == str(folder / source.removeprefix("tokens:"))


def test_a_mask_without_a_target_is_65(folder: Path, capsys) -> None:
    words = ("data.source=tokens:ids.npy", "data.mask=none.npy")
    np.save("ids.npy", np.ones(300, np.int64))
    np.save("none.npy", np.zeros(300, np.bool_))
    error = refused(capsys, 65, *words)
    assert error["key"] == "data.mask" and "no target counts" in error["message"]


@pytest.mark.parametrize(
    ("word", "code", "text"),
    [
        ("train:1024", 2, "has 1024 ids, the model's vocabulary 256"),
        ("bad.json", 65, "not a tokenizer.json"),
        ("mute.json", 65, "cannot read the text"),
    ],
)
def test_a_bad_tokenizer_file_is_65_and_one_too_big_for_the_model_2(
    word: str, code: int, text: str, folder: Path, capsys
) -> None:
    error = refused(capsys, code, f"data.tokenizer={word}")
    assert error["key"] == "data.tokenizer" and text in error["message"]
    assert error["file"] == (None if code == 2 else str(folder / word)), error


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("plan=tp3",), "2 query heads"),
        (("plan=pp1000000",), "the cluster has 4"),
        (("train.seq_len=1000000000",), "does not fit"),
    ],
)
def test_a_plan_that_cannot_be_is_1_and_the_last_line_says_why(
    words: tuple[str, ...], text: str, folder: Path, capsys
) -> None:
    error = refused(capsys, 1, *words)
    assert error["kind"] == "plan" and text in error["message"]
    assert command(["train", "job.toml", *words]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert text in last and "warning:" not in last
    assert text != "does not fit" or "on rank 0, mostly activations" in last, last


def test_a_refusal_takes_little_time_and_memory(folder: Path) -> None:
    """A process of its own: what it took is told by the system. Loading torch takes most of it, and twice as
    long where other work shares the core."""
    words = [sys.executable, "-m", "partita", "train", "job.toml", "data.source=tokens:high.npy"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stderr is not None
    told = process.stderr.read().decode()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.communicate()
    assert process.returncode == 65, told
    assert "token 150 is 256" in told
    assert used.ru_utime + used.ru_stime < 2 * SECONDS
    assert used.ru_maxrss * 1024 < 1e9


def test_what_a_model_writes_moves_no_terminal():
    told = _summary({"run": "runs/x", "plan": "1mb", "step": 1, "sample": "def \x1b[2J\x00\nok"})
    assert told.endswith("what it writes:\ndef \\x1b[2J\\x00\nok")


@pytest.mark.parametrize("verb", ["simulate", "train", "verify", "build"])
def test_a_path_is_no_job(verb):
    with pytest.raises(
        UsageError, match=rf"{verb} takes a Job, not str: Job\.load reads a job file"
    ):
        getattr(pt, verb)("job.toml")
