"""The doctor names what differs, what is slow and what lacks, and nothing else."""

import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from took import least_seconds

from partita.base.errors import PlanError, UsageError
from partita.comm.clocked import ClockedWorld, Link
from partita.comm.threads.local import local
from partita.parallel.laid import lay
from partita.simulate.predict import request_of
from partita.spec.job import DataSpec, Job
from partita.train.build import assemble
from partita.train.data.present import data_files
from partita.train.launch import examine, preflight
from partita.train.launch.diagnosis import Check, Diagnosis
from partita.tune import doctor

JOB = Job.load(
    {
        "name": "examined", "plan": "pp2/2mb tp2+sp", "model": {"preset": "tiny"},
        "cluster": {"preset": "laptop", "links": [{"name": "ram", "devices": 4, "bytes_per_s": 1e6}]},
        "train": {"global_batch_size": 2, "seq_len": 32},
    }
)  # fmt: skip
NEEDS = examine.Needs(1, 1)
NAMES = {"versions", "clock", "disk", "memory", "data", "compute", "link"}


@pytest.fixture
def examined(monkeypatch):
    """examined(world, ...): the one diagnosis of four thread ranks; `world(w)` wraps each one's."""
    monkeypatch.setattr(examine, "LINK_BYTES", 1 << 16)
    monkeypatch.setattr(examine, "GROUP_BYTES", 1 << 16)

    def run(world=lambda w: w, work=lambda rank: 1e9, needs=NEEDS, job=JOB):
        laid = lay(request_of(job))

        def rank(w):
            return examine.examine(job, laid, world(w), Path.cwd(), needs, lambda: work(w.rank))

        with local(4, 30) as ranks:
            found = ranks.run(rank)
        assert all(x == found[0] for x in found)
        return found[0]

    return run


def bad(found):
    return [(c.name, c.rank) for c in found.checks if not c.ok]


def evenly(w):
    """Every transfer takes the time of one link, so that no other program is heard."""
    return ClockedWorld(w, {"doctor": Link(5e-3, 1e9), "tp": Link(5e-3, 1e9)})


def test_all_is_well_and_every_group_is_heard(examined):
    found = examined(evenly)
    assert found.ok and not bad(found), str(found)
    names = [c.name for c in found.checks]
    assert set(names) > NAMES
    assert set(names) - NAMES >= {
        "all_gather over tp",
        "reduce_scatter over tp",
        "all_reduce over tp",
    }
    assert names.count("link") == 8 and names.count("versions") == names.count("disk") == 4
    row = next(c for c in found.checks if c.name == "all_gather over tp")
    assert re.match(
        r"ranks \d, \d: .*B/s through a rank's link; the cluster file says 1 MB/s", row.message
    )
    assert row.value > 0 and str(found).endswith("all is well")
    document = found.to_json()
    assert set(document) == {"ok", "checks"}
    assert all(set(c) == {"name", "rank", "ok", "value", "message"} for c in document["checks"])


def test_a_slow_link_and_a_slow_rank_are_named(examined):
    def world(w):
        rate = 5e5 if w.rank == 2 else 1e9  # what rank 2 sends
        return ClockedWorld(w, {"doctor": Link(5e-3, rate), "tp": Link(5e-3, 1e9)})

    found = examined(world, work=lambda rank: 1e9 / (3 if rank == 1 else 1))
    assert bad(found) == [("compute", 1), ("link", 2), ("link", 2)], str(found)
    told = [c.message for c in found.checks if not c.ok]
    assert told[0] == "333 MFLOP/s, 0.33 of the median"
    assert {m.split(":")[0] for m in told[1:]} == {"2 -> 1", "2 -> 3"}
    assert "the median of ram" in told[1]
    assert str(found).endswith(f"3 of {len(found.checks)} checks failed")


def test_a_group_below_the_cluster_file_and_what_lacks_are_told(examined):
    fast = replace(JOB.cluster, links=(replace(JOB.cluster.links[0], bytes_per_s=1e12),))
    needs = examine.Needs(10**15, 10**15)
    found = examined(evenly, needs=needs, job=replace(JOB, cluster=fast))
    names = {name for name, _ in bad(found)}
    groups = {n for n in names if " over " in n}
    assert names - groups == {"disk", "memory", "link"} and "all_gather over tp" in groups
    assert any("a checkpoint takes 1 PB" in c.message for c in found.checks)
    assert any("the cluster file says 1 TB/s (ram)" in c.message for c in found.checks)


def test_ranks_of_one_node_that_run_on_two_hosts_are_told(examined, monkeypatch):
    facts = preflight.facts
    monkeypatch.setattr(
        preflight, "facts", lambda rank, folder: replace(facts(rank, folder), host=f"h{rank // 2}")
    )
    found = examined(evenly)
    assert bad(found) == [("link", 0), ("link", 1), ("link", 2), ("link", 3)], str(found)
    told = [c.message for c in found.checks if not c.ok]
    assert "1 -> 2" in told[1] and told[1].endswith("of one node: they run on h0 and h1")


def test_ranks_that_begin_to_train_are_looked_at(monkeypatch, tmp_path):
    """What is not well, alike on all ranks; between hosts their links too."""
    another(monkeypatch, 1)
    monkeypatch.setattr(examine, "LINK_BYTES", 1 << 16)
    monkeypatch.setattr(examine, "GROUP_BYTES", 1 << 16)
    monkeypatch.setattr(examine, "matmul_rate", lambda: 1e9)
    monkeypatch.chdir(tmp_path)

    def begin(w, between_hosts):
        world = ClockedWorld(w, {"preflight": Link(5e-3, 1e9 if w.rank != 2 else 5e5)})
        met = preflight.preflight(world, tmp_path)
        built = assemble(JOB, world)
        return examine.at_start(built, met, examine.Needs(10**15), between_hosts)

    for between_hosts, names in ((False, []), (True, ["link, rank 2", "link, rank 2"])):
        with local(4, 30) as ranks:
            told, *others = ranks.run(lambda w, b=between_hosts: begin(w, b))
        assert all(x == told for x in others)
        want = ["clock, rank 1", *(f"disk, rank {r}" for r in range(4)), *names]
        assert [x.split(":")[0] for x in told] == want, told


def another(monkeypatch, rank, **versions):
    """Facts of this rank say otherwise."""
    facts = preflight.facts

    def told(number, folder):
        found = facts(number, folder)
        if number != rank:
            return found
        return replace(found, versions=found.versions | versions, clock_s=found.clock_s + 5)

    monkeypatch.setattr(preflight, "facts", told)


def test_another_version_and_another_clock_are_named(examined, monkeypatch):
    another(monkeypatch, 3, torch="2.12.1", code="0123")
    found = examined(evenly)
    assert bad(found) == [("versions", 3), ("clock", 3)], str(found)
    told = next(c.message for c in found.checks if not c.ok)
    assert "torch 2.12.1, rank 0 on " in told and "code 0123, rank 0 on " in told


def test_data_that_one_rank_lacks_or_has_shorter_is_told(examined, monkeypatch, tmp_path):
    whole, part = tmp_path / "whole.txt", tmp_path / "part.txt"
    whole.write_text("of all ranks")
    part.write_text("of one")
    held = {"rank-1": tmp_path / "none.txt", "rank-3": part}
    monkeypatch.setattr(
        examine, "data_files", lambda job: [held.get(threading.current_thread().name, whole)]
    )
    found = examined(evenly)
    assert bad(found) == [("data", 1), ("data", 3)], str(found)
    told = [c.message for c in found.checks if not c.ok]
    assert "none.txt" in told[0] and "1 file, 6 B; rank 0 on " in told[1]


def test_what_a_job_reads_is_found_unread(tmp_path):
    for name in ("a.txt", "b.txt", "t.npy", "m.idx", "m.bin", "mask.npy", "i.npz"):
        (tmp_path / name).write_bytes(b"x")

    def names(**data):
        return [p.name for p in data_files(replace(JOB, data=DataSpec(**data)))]

    here = str(tmp_path)
    assert names(source=f"{here}/*.txt", eval_source=f"tokens:{here}/t.npy") == [
        "a.txt",
        "b.txt",
        "t.npy",
    ]
    assert names(source=f"{here}/m", mask=f"{here}/mask.npy", documents="idx") == [
        "m.idx",
        "m.bin",
        "mask.npy",
    ]
    assert names(source=f"images:{here}/i.npz") == ["i.npz"] and names(source="digits") == []
    assert "ast.py" in names(source="python-stdlib")
    folder = tmp_path / "folder"
    folder.mkdir()
    model = ["config.json", "model.safetensors"]
    for name in (".DS_Store", "README.md", "chat_template.jinja", *model, "tokenizer.json"):
        (folder / name).write_bytes(b"x")
    assert names(source="digits", tokenizer=str(folder)) == [
        "chat_template.jinja",
        "tokenizer.json",
    ]
    job = replace(JOB, data=DataSpec(source="digits"), init="pretrained", model_path=str(folder))
    assert [p.name for p in data_files(job)] == model
    for source in (f"{here}/none.txt", f"tokens:{here}/none.npy", f"{here}/none.idx"):
        with pytest.raises(UsageError, match=r"data\.source.*no such file"):
            names(source=source)
    with pytest.raises(UsageError, match=r"data\.tokenizer"):
        names(tokenizer=f"{here}/none.json")


def test_train_begins_with_ranks_that_are_alike(monkeypatch, tmp_path):
    def begun() -> None:
        with local(3, 20) as ranks:
            ranks.run(lambda world: preflight.preflight(world, tmp_path))

    assert least_seconds(begun, 2, clock=time.process_time) < 2
    another(monkeypatch, 1, code="0123")
    with (
        pytest.raises(
            UsageError, match=r"rank 1 on .* has code 0123, .*\(1 of 3 ranks differ\).*--no-pre"
        ),
        local(3, 20) as ranks,
    ):
        ranks.run(lambda world: preflight.preflight(world, tmp_path))


def test_a_row_for_all_alike_says_which_it_shows():
    """The clock that is farthest off, on either side; of versions, all the same, the first."""
    checks = [Check("versions", r, True, "abc", f"host {r}") for r in range(2)]
    checks += [Check("clock", r, True, off, f"{off} s") for r, off in enumerate((0.0, -0.2, 0.1))]
    checks += [Check("disk", r, True, n, f"{n} B") for r, n in enumerate((9, 5))]
    said = str(Diagnosis(tuple(checks))).splitlines()[1:]
    for line, told in zip(said, ("2 of 2, the first: host 0", "3 of 3, the farthest: -0.2 s",
                                 "2 of 2, the least: 5 B", "all is well"), strict=True):  # fmt: skip
        assert line.endswith(told)


def test_a_plan_for_more_ranks_than_the_cluster_has_starts_none(monkeypatch):
    """As it is refused before a training."""
    monkeypatch.setattr(doctor, "start_ranks", lambda *_: pytest.fail("ranks are started"))
    with pytest.raises(PlanError, match="the cluster has"):
        doctor.doctor(replace(JOB, cluster=replace(JOB.cluster, devices=2)))
