"""What `partita train` does with a run folder that holds something: goes on, reshards, or refuses and
touches nothing."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import faults
import msgspec
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from strikes import Strike, struck

from partita.cli.main import run as command
from partita.train.checkpoints import checkpoint
from partita.train.checkpoints.manifest import MANIFEST, Manifest, encode
from partita.train.checkpoints.sample import continue_text

CHECKPOINTS = faults.RUN / "checkpoints"
METRICS = {
    "step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_time_s", "peak_memory_bytes",
    "wall_time_s",
}  # fmt: skip
ALONE = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A folder whose run is done with 4 of its 5 steps, saved after 2 and 4."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        faults.write_job()
        assert faults.train("train.steps=4") == 0
    return folder


@pytest.fixture
def run(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current folder."""
    shutil.copytree(stopped, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return CHECKPOINTS / "step-00000004"


def contents() -> dict[str, str]:
    """Every file of the run but its lock, by digest."""
    files = (p for p in Path().rglob("*") if p.is_file() and not p.name.startswith(".lock"))
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def refused(capfd, code: int, *words: str) -> dict[str, str]:
    """Trains, to a refusal that changes no file; the error as `--json` tells it."""
    before = contents()
    assert faults.train(*words, "--json") == code
    out, err = capfd.readouterr()
    assert contents() == before
    assert "Traceback" not in err
    document = json.loads(out)
    assert set(document) == {"format", "error"} and document["format"] == 1
    assert set(document["error"]) == {"kind", "message", "file", "key"}
    assert err.strip().splitlines()[-1].startswith("partita: ")
    return document["error"]


def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(tmp_path, monkeypatch) -> None:
    """Its first steps are measured, the same steps of the other are not: both by the kernels of
    parallel/kernels/brgemm.py, where this CPU has them."""
    monkeypatch.chdir(tmp_path)
    faults.write_job(model={"hidden": 64, "max_seq_len": 256}, train={"seq_len": 256})
    assert faults.train("train.steps=4") == 0
    assert faults.train("train.steps=7") == 0
    resumed, kept = faults.metrics(), faults.weights()
    for line in (faults.RUN / "metrics.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == METRICS  # nothing is held out, so nothing is evaluated
    shutil.rmtree("runs")
    assert faults.train("train.steps=7") == 0
    assert faults.metrics() == resumed
    assert faults.weights() == kept


@pytest.mark.parametrize("plan", ["2mb", pytest.param("pp2/2mb", marks=pytest.mark.slow)])
def test_another_plan_or_world_reshards(plan: str, run: Path, capfd) -> None:
    assert faults.train(f"plan={plan}") == 0
    other = faults.metrics()[-1]
    assert len([*(faults.RUN / "records").glob("rank-*")]) == (2 if "pp" in plan else 1)
    assert command(["checkpoint", "inspect", str(faults.RUN), "--json"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["plan"].startswith(plan[:3])
    shutil.rmtree("runs")
    assert faults.train() == 0
    assert other[1:3] == pytest.approx(faults.metrics()[-1][1:3], rel=1e-5)


@pytest.mark.parametrize(
    ("word", "field"),
    [
        ("model.ffn_hidden=48", "model.ffn_hidden"),
        ("model.vocab=300", "model.vocab"),
        ("model.tied=true", "model.tied"),
        ("data.tokenizer=train:257", "data.tokenizer"),
        ("train.optimizer=sgd", "train."),
        ("train.betas=[0.8, 0.95]", "train.betas"),
        ("data.source=other.txt", "data.source"),
        ("train.seq_len=8", "train.seq_len"),
        ("seed=1", "seed"),
    ],
)
def test_another_job_is_refused_by_the_first_field(word: str, field: str, run, capfd) -> None:
    Path("other.txt").write_text("other words " * 400)
    more = ["model.vocab=300"] if "train:257" in word else []
    error = refused(capfd, 2, word, *more)
    assert error["kind"] == "usage"
    expected = "model.vocab" if more else field
    assert error["key"].startswith(expected), error
    assert "--fresh" in error["message"] and " = " in error["message"]


def test_fresh_starts_a_new_folder(run: Path) -> None:
    before = contents()
    assert faults.train("--fresh", "model.ffn_hidden=48", "train.steps=1") == 0
    assert before.items() <= contents().items()
    assert Path("runs/small-2/checkpoints/step-00000001").is_dir()


def seal(path: Path, change: Callable[[Manifest], Manifest]) -> None:
    """Changes a manifest and gives it its digest again."""
    held = msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    (path / MANIFEST).write_bytes(encode(change(held)))


def first_piece(**fields: object) -> Callable[[Path], None]:
    """Changes the first piece of the manifest."""

    def change(held: Manifest) -> Manifest:
        first = msgspec.structs.replace(held.pieces[0], **fields)
        return msgspec.structs.replace(held, pieces=(first, *held.pieces[1:]))

    return lambda path: seal(path, change)


def other_model(held: Manifest) -> Manifest:
    """States a model of two layers more than the tensors are of."""
    model = {**held.header.model, "layers": 4}
    return msgspec.structs.replace(held, header=msgspec.structs.replace(held.header, model=model))


def rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    """Changes a file's bytes."""
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


def flipped(raw: bytes) -> bytes:
    return raw[:-9] + bytes([raw[-9] ^ 16]) + raw[-8:]


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str | None]] = {
    "truncated": (rewrite("rank-1.safetensors", lambda x: x[:-7]), "rank-1.safetensors", None),
    "one flipped bit": (rewrite("rank-1.safetensors", flipped), "rank-1.safetensors", "head.table"),
    "a flipped bit in the manifest": (rewrite(MANIFEST, flipped), MANIFEST, None),
    "a piece of another step": (
        lambda p: shutil.copy(p.with_name("step-00000002") / "rank-0.safetensors", p),
        "rank-0.safetensors",
        None,
    ),
    "half-written": (lambda p: (p / MANIFEST).unlink(), MANIFEST, None),
    "a missing file": (lambda p: (p / "rank-0.safetensors").unlink(), "rank-0.safetensors", None),
    "a pickle": (
        rewrite("rank-0.safetensors", lambda x: pickle.dumps({"a": [1] * 99})),
        "rank-0.safetensors",
        None,
    ),
    "tensors of another model": (lambda p: seal(p, other_model), MANIFEST, "blocks.2"),
    "a path outside": (first_piece(file="../../../text.txt"), MANIFEST, "embedding.table"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_by_file_and_tensor(damage: str, run: Path, capfd) -> None:
    hurt, file, tensor = DAMAGE[damage]
    hurt(run)
    error = refused(capfd, 66)
    assert error["kind"] == "checkpoint"
    assert error["file"] is not None and error["file"].endswith(f"step-00000004/{file}"), error
    assert error["file"] in error["message"] or "step-00000004" in error["message"]
    if tensor is not None:
        assert error["key"] is not None and error["key"].startswith(tensor), error
    assert "--allow-fallback" in error["message"]
    assert command(["checkpoint", "verify", str(run), "--json"]) == 66
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert set(found) == {"format", "step", "plan", "complete", "tensors", "bytes", "problems"}
    assert found["complete"] is False and file in found["problems"][0]["message"]


def test_an_older_one_is_taken_only_with_leave(run: Path, caplog) -> None:
    rewrite("rank-1.safetensors", flipped)(run)
    bad = {p.name: p.read_bytes() for p in run.iterdir()}
    assert faults.train("--allow-fallback", "train.steps=4") == 0
    assert "step-00000004 is damaged: going on from" in caplog.text
    assert {p.name: p.read_bytes() for p in run.iterdir()} == bad
    newest = checkpoint.newest_complete(CHECKPOINTS)
    assert newest is not None and newest.name == "step-00000004-2"


def test_a_checkpoint_is_converted_to_another_plan(run: Path, capfd) -> None:
    def told(*words: str) -> dict[str, object]:
        assert command([*words, "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    made = told("checkpoint", "convert", "runs/small", "other", "--plan", "pp2/2mb")
    before, after = (told("checkpoint", "verify", x) for x in ("runs/small", "other"))
    assert made == after == {**before, "plan": "pp2:1f1b/2mb"}
    files = sorted(p.name for p in Path("other/checkpoints/step-00000004").iterdir())
    assert files == [MANIFEST, "rank-0.safetensors", "rank-1.safetensors"]
    texts = [told("generate", x, "--prompt", "the ") for x in ("runs/small", "other")]
    assert texts[0] == texts[1] and set(texts[0]) == {"format", "text", "token_ids"}
    alone = continue_text(run, "the ", 64)  # without a cache
    assert texts[0]["token_ids"] == alone.token_ids and texts[0]["text"] == alone.text
    drawn = ("--prompt", "the ", "--temperature", "0.9", "--seed", "3", "--max-new-tokens", "9")
    once, again = (told("generate", x, *drawn) for x in ("runs/small", "other"))
    assert once == again and once["token_ids"] != alone.token_ids[:9]
    for words, code in ((["--plan", "tp3"], 1), ([], 2), (["--plan", "2mb"], 2)):
        place = "other" if words == ["--plan", "2mb"] else "third"
        assert command(["checkpoint", "convert", "runs/small", place, *words, "--json"]) == code
        assert json.loads(capfd.readouterr().out)["error"]["message"]
    assert not Path("third").exists()


@ALONE
def test_through_torchs_own_checkpoint_and_back(run: Path, capfd) -> None:
    assert command(["checkpoint", "convert", "runs/small", "dcp", "--to", "dcp", "--json"]) == 0
    names = json.loads(capfd.readouterr().out)["tensors"]
    assert sorted(p.name for p in Path("dcp").iterdir()) == [".metadata", "__0_0.distcp"]
    state = {
        "head.table": torch.zeros(256, 16),
        "optimizer.exp_avg.head.table": torch.zeros(256, 16),
    }
    dcp.load(state, checkpoint_id="dcp", no_dist=True)  # any torch program
    held = {(p.name, p.role, p.box): p.digest for p in checkpoint.verify(run).pieces}
    halves = [state["head.table"][:128], state["head.table"][128:]]
    for half, box in zip(halves, [((0, 128), (0, 16)), ((128, 256), (0, 16))], strict=True):
        raw = half.contiguous().view(-1).view(torch.uint8).numpy()
        assert xxhash.xxh3_128_hexdigest(raw) == held["head.table", "weight", box]

    assert command(["checkpoint", "convert", "dcp", "back", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["step"], found["plan"], found["problems"]) == (
        4,
        checkpoint.verify(run).header.plan,
        [],
    )
    again = checkpoint.verify(Path("back/checkpoints/step-00000004"))
    assert {(p.name, p.role, p.box): p.digest for p in again.pieces} == held
    assert names == 3 * len(again.header.tensors)
    shutil.rmtree(run)
    shutil.copytree("back/checkpoints/step-00000004", run)
    assert faults.train() == 0  # goes on from it, as from what was saved
    assert command(["checkpoint", "convert", "dcp", "other", "--plan", "pp2/2mb"]) == 0


class Evil:
    """A pickle that makes a file."""

    def __reduce__(self):
        return os.system, ("touch was-here",)


@ALONE
def test_a_bad_dcp_is_refused_by_tensor_and_calls_nothing(run: Path, capfd) -> None:
    def refused_as(text: str) -> None:
        assert command(["checkpoint", "convert", "bad", "new", "--json"]) == 66
        out, err = capfd.readouterr()
        message = json.loads(out)["error"]["message"]
        assert text in message and "Traceback" not in err, (message, err)
        assert not Path("new").exists() and not Path("was-here").exists()

    assert command(["checkpoint", "convert", "runs/small", "dcp", "--to", "dcp"]) == 0
    capfd.readouterr()
    shutil.copytree("dcp", "bad")
    Path("bad/.metadata").write_bytes(pickle.dumps(Evil()))
    refused_as("it asks for posix.system, which no DCP consists of")
    Path("bad/.metadata").write_bytes(Path("dcp/.metadata").read_bytes()[:-50])
    refused_as("no metadata of a DCP")
    shutil.copy("dcp/.metadata", "bad/.metadata")
    raw = Path("dcp/__0_0.distcp").read_bytes()
    Path("bad/__0_0.distcp").write_bytes(raw[: len(raw) // 2])
    refused_as("cannot be read")
    Path("bad/__0_0.distcp").unlink()
    refused_as("cannot be read")
    shutil.rmtree("bad")
    dcp.save({"a": torch.zeros(3)}, checkpoint_id="bad", no_dist=True)
    refused_as("holds no partita.header")
    whole = dcp.FileSystemReader("dcp").read_metadata().state_dict_metadata
    state = {k: torch.empty(v.size, dtype=v.properties.dtype) for k, v in whole.items()}
    dcp.load(state, checkpoint_id="dcp", no_dist=True)
    state["head.table"] = state["head.table"][:100].clone()
    shutil.rmtree("bad")
    dcp.save(state, checkpoint_id="bad", no_dist=True)
    refused_as("head.table has shape [100, 16]; the model it states has [256, 16]")


def test_a_finished_run_says_so_and_has_what_a_killed_launcher_left_out(run: Path, capfd) -> None:
    """And under which plan it was trained, whichever is asked for."""
    whole, last = contents(), ("records/run.json", "sample.txt", "trace.json")
    for name in last:
        (faults.RUN / name).unlink()
    assert faults.train("train.steps=4", "--json", "plan=dp2") == 0
    out, err = capfd.readouterr()
    found = json.loads(out)
    assert found["already_done"] is True and found["step"] == 4 and found["run"] == "runs/small"
    assert {"loss", "grad_norm", "lr", "tokens"} <= set(found) and found["plan"] == "tp2 2mb"
    assert "runs/small is finished: step 4, trained under tp2 2mb;" in err
    assert found["sample"] + "\n" == (faults.RUN / "sample.txt").read_text()
    assert contents() == whole
    assert faults.train("train.steps=4", "--json") == 0
    assert "sample" not in json.loads(capfd.readouterr().out)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch) -> Iterator[Callable[[str], Path]]:
    """Makes a small disk of its own under the current folder: root alone may."""
    mounted: list[Path] = []

    def mount(options: str) -> Path:
        if os.geteuid() != 0:
            pytest.skip("only root mounts a disk")
        place = tmp_path / "disk"
        place.mkdir()
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)],
            capture_output=True, text=True,
        )  # fmt: skip
        if made.returncode:
            pytest.skip(f"no mount here: {made.stderr.strip()}")
        mounted.append(place)
        monkeypatch.chdir(place)
        return place

    yield mount
    monkeypatch.undo()
    for place in mounted:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_is_too_small_is_known_at_start(disk, capfd) -> None:
    disk("size=200k")
    faults.write_job()
    assert faults.train("--json") == 73
    out, err = capfd.readouterr()
    error = json.loads(out)["error"]
    assert error["kind"] == "write" and "will stand here" in error["message"], error
    assert "make room" in err
    assert not (faults.RUN / "metrics.jsonl").exists()


def test_a_read_only_disk_is_known_at_start(disk, capfd) -> None:
    place = disk("size=1m")
    faults.write_job()
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    assert faults.train("--json") == 73
    error = json.loads(capfd.readouterr().out)["error"]
    assert error["kind"] == "write" and "Read-only file system" in error["message"], error
    assert "runs/small" in error["file"]


def test_a_read_only_folder_for_offload_is_known_at_start(
    disk, tmp_path, monkeypatch, capfd
) -> None:
    place = disk("size=1m,ro")
    monkeypatch.chdir(tmp_path)
    faults.write_job()
    words = ("plan=1mb offload:nvme", f"cluster.disk_folder={place}", "--json")
    assert faults.train(*words) == 73
    error = json.loads(capfd.readouterr().out)["error"]
    assert (error["kind"], error["file"]) == ("write", str(place)), error
    assert "Read-only file system" in error["message"] and "cluster.disk_folder" in error["message"]
    assert not (faults.RUN / "metrics.jsonl").exists() and not CHECKPOINTS.exists()


@pytest.mark.slow
def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint(disk, monkeypatch, capfd) -> None:
    place = disk("size=4m")
    faults.write_job()
    monkeypatch.setattr(
        "partita.train.launch.launcher.start_ranks", struck(Strike("fill", "checkpoint", step=4))
    )
    assert faults.train() == 73
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "the disk is full" in last and "the last good one is kept" in last, last
    newest = checkpoint.newest_complete(CHECKPOINTS)
    assert newest is not None and newest.name == "step-00000002"
    assert [p.name for p in CHECKPOINTS.iterdir()] == ["step-00000002"]
    (place / "ballast").unlink()
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert faults.train() == 0


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_file_that_may_not_grow_is_a_full_disk(rank, tmp_path, monkeypatch, capfd) -> None:
    """As above for whoever is not root, on one rank alone."""
    monkeypatch.chdir(tmp_path)
    faults.write_job()
    with monkeypatch.context() as patched:
        what = Strike("full", "checkpoint", step=4, rank=rank)
        patched.setattr("partita.train.launch.launcher.start_ranks", struck(what))
        assert faults.train() == 73
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert "the disk is full" in last and "the last good one is kept" in last, last
    assert faults.failure()["rank"] == rank and faults.failure()["phase"] == "checkpoint"
    assert [p.name for p in CHECKPOINTS.iterdir()] == ["step-00000002"]
    assert faults.train() == 0
