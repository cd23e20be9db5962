"""Offload: equal to one device, declared moves recorded to the byte, arenas that are accounted apart."""

from __future__ import annotations

import gc
import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
import verify_jobs
from saves import save_run

from partita.base.errors import WriteError
from partita.comm.single import SingleWorld
from partita.comm.threads.local import local
from partita.parallel.laid import lay
from partita.parallel.offload import cpu, nvme
from partita.parallel.offload.rules import CHUNK
from partita.parallel.offload.shards import HostShards
from partita.parallel.offload.shelves import HostShelf
from partita.parallel.read import state_bytes
from partita.simulate.memory import arena_ledger
from partita.simulate.predict import request_of, simulate
from partita.train.build import assemble
from partita.train.checkpoints.checkpoint import Ranks
from partita.train.checkpoints.resume import load_run
from partita.train.optimizer.offloaded_update import host_threads
from partita.train.recorder import StepRecorder
from partita.verify.parity import verify

SLOW = pytest.mark.slow
KEPT = "offload.targets=activations"
SHARDS = "offload.targets=parameters,gradients,optimizer"
GIVEN = "offload.targets=gradients"
RANDOM = "precision.rounding=stochastic"
PLANS = [
    ("2mb offload:cpu offload.targets=optimizer", {}),
    ("dp_shard2.zero3 tp2 2mb bf16 offload:nvme", {"tied": True}),
    pytest.param("dp_shard2.zero1 pp2:zb_h1/2mb fp16 offload:nvme", {"tied": True}, marks=SLOW),
    pytest.param("pp2:dualpipe/4mb dp_shard2.zero2 offload:nvme", {"tied": True}, marks=SLOW),
    pytest.param(
        "dp_replicate2 dp_shard2.zero2 ep2 2mb offload:cpu", verify_jobs.EXPERTS, marks=SLOW
    ),
    (f"pp2:zb_h1/4mb tp2+sp bf16 offload:cpu {KEPT}", {"tied": True}),
    pytest.param(
        "pp2:dualpipe/4mb dp_shard2.zero2 ep2 expert.chunks=2 recompute:selective "
        f"recompute.modules=norm,act offload:cpu {KEPT},gradients,optimizer", verify_jobs.EXPERTS, marks=SLOW,
    ),
    (f"dp_shard2.zero3 2mb bf16 offload:cpu {KEPT},parameters,gradients,optimizer", {"tied": True}),
    (f"dp_shard2.zero3 2mb offload:nvme {KEPT},parameters", {}),
    ("2mb bf16 precision.rounding=stochastic offload:cpu", {}),
    (f"pp2:pipedream_2bw/4mb bf16 offload:nvme {KEPT},optimizer", {"tied": True}),
    pytest.param("pp2:pipedream/4mb bf16 offload:nvme", {"tied": True}, marks=SLOW),
    pytest.param("pp2:pipedream/4mb dp_shard2.zero1 offload:cpu", {"tied": True}, marks=SLOW),
    pytest.param("pp2:pipedream_2bw/4mb dp_replicate2 offload:nvme", verify_jobs.EXPERTS, marks=SLOW),
    pytest.param("pp2:pipedream/4mb dp_shard2.zero1 offload:cpu offload.targets=optimizer", {}, marks=SLOW),
    pytest.param(
        "dp_shard2.zero1 tp2 2mb bf16 precision.rounding=stochastic offload:nvme", {"tied": True}, marks=SLOW
    ),
    pytest.param(
        "pp2:zb_h1/2mb dp_replicate2 dp_shard2.zero3 bf16 offload:nvme "
        f"{KEPT},parameters,gradients,optimizer", {"tied": True}, marks=SLOW,
    ),
    pytest.param(f"cp2:ring pp2:gpipe/2mb dp_shard2.zero3 fp8 offload:cpu {KEPT}", {}, marks=SLOW),
    (f"dp_shard2.zero1 2mb bf16 {RANDOM} offload:nvme {GIVEN}", {}),
    (f"pp2:zb_h1/2mb dp_shard2.zero2 fp64 offload:nvme {GIVEN}", {"tied": True}),
    pytest.param(f"2mb fp64 offload:cpu {GIVEN}", {}, marks=SLOW),
    pytest.param(
        f"dp_shard2.zero3 tp2+sp 2mb bf16 offload:cpu {GIVEN},parameters,activations",
        {"tied": True}, marks=SLOW,
    ),
    pytest.param(f"dp_shard2.zero3 2mb bf16 {RANDOM} offload:cpu {GIVEN},parameters", {}, marks=SLOW),
    pytest.param(f"dp_shard2.zero1 tp2 2mb fp64 offload:nvme {GIVEN}", {"tied": True}, marks=SLOW),
    pytest.param(
        f"dp_replicate2 dp_shard2.zero2 ep2 2mb fp64 offload:cpu {GIVEN}", verify_jobs.EXPERTS, marks=SLOW
    ),
    pytest.param(f"pp2:1f1b/4mb fp16 offload:cpu {GIVEN}", {}, marks=SLOW),
    pytest.param(f"pp2:pipedream/4mb fp64 offload:nvme {GIVEN}", {"tied": True}, marks=SLOW),
    pytest.param(f"pp2:pipedream_2bw/4mb dp_shard2.zero1 bf16 offload:cpu {GIVEN}", {}, marks=SLOW),
]  # fmt: skip


@pytest.fixture
def short_chunks(monkeypatch):
    """So short that every unit, and its gradient, is streamed in several."""
    monkeypatch.setattr(cpu, "CHUNK", 1024)
    monkeypatch.setattr(nvme, "CHUNK", 1024)


@pytest.mark.turns(2)
@pytest.mark.parametrize("plan, model", PLANS)
def test_states_elsewhere_equal_one_device_and_move_as_declared(
    plan, model, tmp_path, short_chunks
):
    job = verify_jobs.job(tmp_path, plan, **model)
    clips = 0.0 if "pipedream" in plan else job.train.clip_grad_norm
    found = verify(replace(job, train=replace(job.train, clip_grad_norm=clips)), brief=True)
    assert found.equal, str(found)
    assert {t.axis for t in found.recorded} >= {"host", *(["disk"] if "nvme" in plan else [])}


@pytest.mark.parametrize(
    "plan, model",
    [
        ("tp2+sp", verify_jobs.MLA),  # latents
        ("cp2:all_gather", {}),  # v, beside q and k that are rotated
        ("cp2:all_gather", verify_jobs.QWEN),  # q, k and v, two of which are normalised
    ],
)
def test_parts_of_one_token_leave_without_their_neighbours(plan, model, tmp_path):
    """Of more tokens a part of a product is no contiguous tensor; of one it is, and a view of all of it."""
    line = f"{plan} 2mb fp64 offload:cpu {KEPT}"
    found = verify(verify_jobs.job(tmp_path, line, batch=2, seq=2, layers=2, **model), brief=True)
    assert found.equal, str(found)


@pytest.mark.parametrize(
    "plan", [f"nvme {GIVEN}", "nvme offload.targets=optimizer", f"cpu {GIVEN}"]
)
def test_a_shard_of_padding_alone_moves_as_others_do(plan, tmp_path):
    """head.norm's five elements on four ranks: two, two, one, none."""
    size = {"hidden": 5, "heads": 1, "kv_heads": 1, "head_dim": 4, "layers": 1, "tied": True}
    line = f"dp_shard4.zero3 2mb fp64 offload:{plan}"
    found = verify(verify_jobs.job(tmp_path, line, **size), brief=True)
    assert found.equal, str(found)


def test_chunks_are_whole_blocks():
    """Else no part of a file would be read or written past the page cache."""
    assert all(CHUNK * width % nvme.BLOCK == 0 for width in (2, 4, 8))


@pytest.mark.parametrize("targets", ["parameters,optimizer", "activations,gradients"])
def test_a_slow_disk_is_waited_for(targets, tmp_path, short_chunks, monkeypatch):
    """What is written behind is there before it is read, and its buffer is not filled meanwhile; what is read
    ahead is there before it is used."""
    read, write = nvme.File.read, nvme.File.write
    late = lambda act: lambda self, *what: (time.sleep(2e-3), act(self, *what))[1]  # noqa: E731
    monkeypatch.setattr(nvme.File, "read", late(read))
    monkeypatch.setattr(nvme.File, "write", late(write))
    line = f"dp_shard2.zero3 2mb fp64 offload:nvme offload.targets={targets}"
    found = verify(verify_jobs.job(tmp_path, line, layers=4), brief=True)
    assert found.equal, str(found)


def trained(world, job, folder, steps, resume=None):
    """What is saved after `steps`, and the record of the memory held meanwhile."""
    built = assemble(job, world)
    begun = 0
    if resume:
        begun = load_run(resume, job, built.model, built.update, built.fingerprint)
    recorder = StepRecorder(built, folder, steps)
    for step in range(begun, steps):
        with recorder.step(step):
            built.model.forward_backward(built.batch(step))
            built.update.step()
    recorder.finish()
    ranks = Ranks(world.rank, world.size, built.agree)
    made = save_run(folder, steps, job, built.model, built.update, built.fingerprint, ranks)
    return made, recorder.record


def tensors(path):
    from safetensors import safe_open

    with safe_open(path / "rank-0.safetensors", framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("to", ["cpu", "nvme"])
def test_a_resumed_run_has_every_bit_wherever_the_states_lie(to, tmp_path, short_chunks):
    """Two steps, saved, two more; beside four at once, and beside states on the device."""
    away = verify_jobs.job(tmp_path, f"2mb bf16 offload:{to}")
    plain = away.with_plan("2mb bf16")
    whole = tensors(trained(SingleWorld(), away, tmp_path / "whole", 4)[0])
    half = trained(SingleWorld(), away, tmp_path / "half", 2)[0]
    again = tensors(trained(SingleWorld(), away, tmp_path / "again", 4, half)[0])
    device = tensors(trained(SingleWorld(), plain, tmp_path / "device", 4, half)[0])
    assert whole.keys() == again.keys() == device.keys() and len(whole) > 60
    for key, value in whole.items():
        assert value.equal(again[key]), key
        assert value.allclose(device[key], rtol=1e-6, atol=1e-9), key


@pytest.mark.parametrize(
    "to, categories",
    [
        ("cpu", ("gradients", "optimizer")),
        ("nvme", ("gradients", "optimizer")),
        ("cpu", ("gradients",)),
    ],
)
def test_arenas_hold_what_is_declared(to, categories, tmp_path):
    """Weights on the device, gradients, masters and moments in their arena, whichever memory it is."""
    targets = f"offload.targets={','.join(categories)}"
    job = verify_jobs.job(tmp_path, f"dp_shard2.zero1 2mb bf16 offload:{to}", hidden=64, seq=16)
    gc.collect()
    with local(1, 20) as ranks:  # a rank's ledger is that of its process: one rank
        one = job.with_plan(f"2mb bf16 offload:{to} {targets}")
        ((_, record),) = ranks.run(trained, one, tmp_path, 2)
    laid = lay(request_of(one))
    blocks = [b for s in laid.stages for b in s.blocks]

    def declared(arena):
        return sum((state_bytes(b, laid.sizes, arena) for b in blocks), Counter())

    assert record.ledger is not None and record.host_ledger is not None
    device, host, disk = record.ledger.at_peak, record.host_ledger.at_peak, record.disk_ledger
    assert device["parameters"] == declared("device")["parameters"] > 50_000
    for category in categories:
        assert category not in declared("device") and device.get(category, 0) < 1000
        if to == "cpu":
            assert host[category] == declared("host")[category] > 100_000
        else:
            want = declared("disk")[category]
            assert want <= disk.at_peak[category] <= want + 4096 * 3 * len(laid.units(0))
            assert category not in host


def test_a_model_three_times_the_limit_trains(tmp_path, monkeypatch):
    """Under states on disk, device and host together stay below it, as predicted: what lives for the whole
    run within 3 %, activations within 10 %."""
    monkeypatch.setattr(cpu, "CHUNK", 16_384)
    monkeypatch.setattr(nvme, "CHUNK", 16_384)
    line = "1mb bf16 data.bucket_bytes=500000 offload:nvme"
    model = {"layers": 4, "hidden": 192, "ffn_hidden": 512, "vocab": 2048}
    job = verify_jobs.job(tmp_path, line, batch=2, seq=64, **model)
    state = 18 * job.model.parameters()
    limit = replace(job.cluster, memory_bytes=state // 3)
    job = replace(job, cluster=limit)
    assert not simulate(job.with_plan("1mb bf16")).fits
    predicted = simulate(job)
    assert predicted.fits and predicted.laid is not None
    gc.collect()
    _, record = trained(SingleWorld(), job, tmp_path, 3)
    assert record.ledger is not None and record.host_ledger is not None
    others = record.ledger.at_peak.get("untagged", 0)  # what other tests of this process keep
    assert record.ledger.peak_bytes - others + record.host_ledger.peak_bytes <= state // 3
    device, disk = predicted.ledgers[0].at_peak, arena_ledger(predicted.laid, 0, "disk").at_peak
    found = record.ledger.at_peak
    assert found["parameters"] == pytest.approx(device["parameters"], rel=0.03)
    assert found["activations"] == pytest.approx(device["activations"], rel=0.1)
    for category in ("gradients", "optimizer"):
        assert record.disk_ledger.at_peak[category] == pytest.approx(disk[category], rel=0.03)
        assert found.get(category, 0) < 1000


@pytest.mark.parametrize("to", ["cpu", "nvme"])
def test_kept_tensors_away_change_no_bit_and_free_what_is_declared(to, tmp_path):
    """What is measured falls by what is predicted, and lies where it is declared."""
    size = {"hidden": 64, "ffn_hidden": 192, "seq": 32, "layers": 5}
    here = verify_jobs.job(tmp_path, "2mb bf16", **size)
    away = here.with_plan(f"2mb bf16 offload:{to} {KEPT}")
    gc.collect()
    stays, one = trained(SingleWorld(), here, tmp_path / "here", 2)
    gone, other = trained(SingleWorld(), away, tmp_path / "away", 2)
    for key, value in tensors(stays).items():
        assert value.equal(tensors(gone)[key]), key
    held = [simulate(j).ledgers[0].at_peak["activations"] for j in (here, away)]
    assert one.ledger is not None and other.ledger is not None and other.host_ledger is not None
    most = [r.ledger.at_peak["activations"] for r in (one, other)]
    assert most == pytest.approx(held, rel=0.03) and 2 * held[1] < held[0]
    predicted = simulate(away)
    assert predicted.laid is not None
    want = {a: arena_ledger(predicted.laid, 0, a).at_peak for a in ("host", "disk")}
    if to == "cpu":
        assert other.host_ledger.at_peak["activations"] == want["host"]["activations"]
    else:
        seen = other.disk_ledger.at_peak["activations"]
        assert want["disk"]["activations"] <= seen <= want["disk"]["activations"] * 1.03
        assert other.host_ledger.at_peak["buffers"] <= want["host"]["buffers"] * 1.1


def test_shards_away_leave_what_is_gathered(tmp_path):
    """Stage 3: no parameter stays on the device, and no state."""
    job = verify_jobs.job(tmp_path, f"dp_shard2.zero3 1mb bf16 offload:cpu {SHARDS}", hidden=64)
    gc.collect()
    with local(2, 20) as ranks:
        found = ranks.run(trained, job, tmp_path, 2)
    want = arena_ledger(lay(request_of(job)), 0, "host").at_peak
    for _, record in found:
        assert record.ledger is not None and record.host_ledger is not None
        device, host = record.ledger.at_peak, record.host_ledger.at_peak
        assert all(device.get(c, 0) < 1000 for c in ("parameters", "gradients", "optimizer"))
        assert host == want and want["parameters"] > 50_000


def test_a_shard_that_is_not_brought_anew_is_seen(tmp_path, monkeypatch):
    """A planted fault: what was brought before the first update is gathered for ever."""
    known, bring = {}, HostShards.bring

    def stale(self, unit):
        return known.setdefault(id(unit), bring(self, unit).clone())

    monkeypatch.setattr(HostShards, "bring", stale)
    job = verify_jobs.job(tmp_path, f"dp_shard2.zero3 2mb fp64 offload:cpu {SHARDS}")
    assert not verify(job).equal


def test_what_another_microbatch_kept_is_seen(tmp_path, monkeypatch):
    """A planted fault: backward is brought what the microbatch before it kept."""
    take, before = HostShelf.take, []

    def swapped(self, ticket, into):
        mine = [t.clone() for t in ticket.made]
        same = [t for t in before if [x.shape for x in t] == [x.shape for x in mine]]
        ticket.made = [*same[-1]] if same else ticket.made
        take(self, ticket, into)
        before.append(mine)

    monkeypatch.setattr(HostShelf, "take", swapped)
    job = verify_jobs.job(tmp_path, f"2mb fp64 offload:cpu {KEPT}")
    assert not verify(job).equal


class LateShelf(HostShelf):
    """Copies as late as a GPU's streams may: down when their memory is to be free, up when they are waited
    for."""

    def put(self, bytes_):
        return {"from": bytes_}

    def lingers(self, ticket):
        return True

    def left(self, ticket):
        ticket["down"] = super().put(ticket.pop("from"))

    def take(self, ticket, into):
        assert "down" in ticket, "it is still there"
        for t in into:
            t.fill_(255)  # not a number, whatever it was
        ticket["into"] = into

    def arrived(self, ticket):
        if "into" in ticket:
            super().take(ticket["down"], ticket.pop("into"))


@pytest.mark.parametrize("plan", ["2mb bf16", "pp2:zb_h1/4mb tp2+sp fp64 recompute:selective"])
def test_copies_beside_what_is_computed_are_waited_for(plan, tmp_path, monkeypatch):
    monkeypatch.setattr("partita.parallel.offload.arenas.HostShelf", LateShelf)
    found = verify(verify_jobs.job(tmp_path, f"{plan} offload:cpu {KEPT}", tied=True), brief=True)
    assert found.equal and found.traffic_equal, str(found)


def test_a_full_disk_is_told_before_the_first_step(tmp_path, monkeypatch):
    """What activations will need has its place in the file from the start."""

    def full(descriptor, offset, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(WriteError, match="No space left") as caught:
        assemble(verify_jobs.job(tmp_path, f"2mb offload:nvme {KEPT}"), SingleWorld())
    assert caught.value.exit_code == 73


def test_a_folder_that_takes_no_files_is_named(tmp_path):
    job = verify_jobs.job(tmp_path, "offload:nvme")
    missing = replace(job.cluster, disk_folder=str(tmp_path / "missing"))
    with pytest.raises(WriteError, match=r"cluster\.disk_folder") as caught:
        assemble(replace(job, cluster=missing), SingleWorld())
    assert caught.value.exit_code == 73


def test_a_disk_without_room_says_how_much_is_wanted(tmp_path):
    with pytest.raises(WriteError, match=r"needs 4 PB or more .* are free"):
        nvme.File(tmp_path).zeros(10**15, torch.float32)


def test_ranks_on_gpus_share_the_hosts_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [host_threads(n) for n in (1, 2, 4, 64)] == [16, 8, 4, 4]
