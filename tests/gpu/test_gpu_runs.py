"""Runs on the GPU: `partita train` on real text, on the CPU and back, what a rank holds beside what is
declared, offload on streams of its own, nccl, the other verbs."""

from __future__ import annotations

import gc
import json
from dataclasses import replace
from pathlib import Path

import faults
import gpu_jobs
import pytest
import torch
import torch.distributed as dist
from gpu_jobs import DEVICE, TABLE

from partita.cli.main import run as command
from partita.comm.single import SingleWorld
from partita.parallel.cp import fused
from partita.spec.job import Job
from partita.train.build import assemble
from partita.train.devices import shared_device
from partita.train.recorder import StepRecorder

ON = f"device={DEVICE.type}"
LARGE = {
    "family": "llama", "layers": 4, "hidden": 1024, "heads": 16, "kv_heads": 8, "ffn_hidden": 2816,
    "vocab": 8192, "max_seq_len": 1024,
}  # fmt: skip


@pytest.fixture
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    faults.write_job(plan="2mb", train={"steps": 4, "checkpoint_every": 2, "global_batch_size": 4})


def lines(name: str):
    return faults.metrics(Path("runs") / name)


def test_a_run_on_real_text(text, capsys):
    """Its losses are the CPU's; it goes on there and back; what it has made writes text."""
    assert faults.train("name=cpu", "device=cpu") == 0
    assert faults.train("name=gpu", ON) == 0
    for a, b in zip(lines("gpu"), lines("cpu"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    whole = [json.loads(x) for x in Path("runs/gpu/metrics.jsonl").read_text().splitlines()]
    assert all(x["peak_memory_bytes"] > 0 for x in whole)
    capsys.readouterr()
    assert (
        command(["generate", "runs/gpu", "--prompt", "the cat", "--max-new-tokens", "8", "--json"])
        == 0
    )
    there = json.loads(capsys.readouterr().out)
    job = Path("runs/gpu/job.toml")
    job.write_text(job.read_text().replace(f'device = "{DEVICE.type}"', 'device = "cpu"'))
    assert (
        command(["generate", "runs/gpu", "--prompt", "the cat", "--max-new-tokens", "8", "--json"])
        == 0
    )
    assert json.loads(capsys.readouterr().out) == there


@pytest.mark.parametrize(("first", "second"), [(ON, "device=cpu"), ("device=cpu", ON)])
def test_a_run_goes_on_on_the_other_device(first, second, text):
    even = "train.lr_schedule=constant"
    assert faults.train("name=parts", first, even, "train.steps=2") == 0
    assert faults.train("name=parts", second, even) == 0
    assert faults.train("name=alone", "device=cpu", even) == 0
    for a, b in zip(lines("parts"), lines("alone"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)


def test_a_run_repeats_bit_for_bit(text):
    """Attention's backward too, which adds up many blocks of keys."""
    given = (
        ON,
        "plan=2mb bf16 recompute:selective",
        "train.seq_len=1024",
        "model.max_seq_len=1024",
    )
    assert faults.train("name=one", *given) == faults.train("name=two", *given) == 0
    assert lines("one") == lines("two")
    assert faults.weights(Path("runs/one")) == faults.weights(Path("runs/two"))


def large(folder: Path, plan: str) -> Job:
    made = gpu_jobs.job(folder, plan, batch=4, seq=1024, **LARGE)
    return replace(made, train=replace(made.train, lr=1e-3))


PLANS = (
    "1mb bf16",
    "2mb bf16 recompute:full",
    "2mb bf16 offload:cpu offload.targets=activations",
    "1mb bf16 offload:cpu offload.targets=optimizer",
)


@pytest.mark.parametrize("plan", PLANS)
def test_the_allocators_peak_is_the_ledgers(plan, tmp_path):
    """Within 10 %: the caching allocator's, less what lay there before, beside what the ledger saw."""
    if DEVICE.type == "cpu":
        pytest.skip("no caching allocator")
    device = shared_device(large(tmp_path, plan))
    torch.zeros(64, 64, device=device) @ torch.zeros(
        64, 64, device=device
    )  # cuBLAS has its workspace
    gc.collect()  # what other tests have left would be freed meanwhile
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    built = assemble(large(tmp_path, plan), SingleWorld(), device=device)
    recorder = StepRecorder(built, tmp_path, 4)
    found = []
    for step in range(4):
        torch.cuda.reset_peak_memory_stats()
        with recorder.step(step):
            built.model.forward_backward(built.batch(step))
            built.update.step()
        found.append(torch.cuda.max_memory_allocated() - before)
    peak = recorder.record.ledger.at_peak
    ledger = sum(
        n for category, n in peak.items() if category != "untagged"
    )  # other tests' tensors
    TABLE.append(
        f"peak {plan[:58]:<58} allocator {max(found) / 1e6:7.0f} MB, ledger {ledger / 1e6:7.0f} MB"
    )
    assert max(found) == pytest.approx(ledger, rel=0.1)


def test_offloaded_activations_change_nothing_and_fit_less(tmp_path, monkeypatch):
    """The same bits, whatever streams they took; and less memory. With flash, which can repeat itself."""
    monkeypatch.setattr(fused, "_is_cudnn", lambda *_: False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        _offloaded(tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)


def _offloaded(tmp_path):
    found = []
    for targets in ("", " offload:cpu offload.targets=activations"):
        job = large(tmp_path, f"1mb bf16{targets}")
        device = shared_device(job)
        built = assemble(job, SingleWorld(), device=device)
        gc.collect()  # the run before
        peaks, before = [], torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0
        for step in range(3):
            if DEVICE.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            built.model.forward_backward(built.batch(step))
            if DEVICE.type == "cuda":
                peaks.append(torch.cuda.max_memory_allocated() - before)
            norm = built.update.step()
        found.append((norm, [u.master.detach().cpu().clone() for u in built.model.units], peaks))
        del built
    (norm, here, most), (other, there, less) = found
    assert norm == other and all(map(torch.equal, here, there))
    if DEVICE.type == "cuda":
        TABLE.append(f"activations on the host: {most[-1] / 1e6:.0f} MB to {less[-1] / 1e6:.0f} MB")
        assert less[-1] < 0.95 * most[-1]


def test_fp32_is_not_tf32(tmp_path):
    shared_device(gpu_jobs.job(tmp_path, "2mb"))
    x = torch.linspace(-1, 1, 1 << 16, device=DEVICE, dtype=torch.float64).view(256, 256).float()
    image, kernel = x.view(1, 16, 64, 64), x[:16, :144].reshape(16, 16, 3, 3)
    for product, *given in ((torch.mm, x, x), (torch.nn.functional.conv2d, image, kernel)):
        wide = [t.double() for t in given]
        off = (product(*given).double() - product(*wide)).abs().max()
        assert float(off / product(*(t.abs() for t in wide)).max()) < 2.0**-18


def test_a_world_of_nccl(tmp_path):
    """One rank's: groups are made, and what goes by the GPU and by the host keeps apart."""
    if DEVICE.type == "cpu":
        pytest.skip("nccl is of GPUs")
    from partita.comm.distributed.torch import TorchWorld

    shared_device(gpu_jobs.job(tmp_path, "2mb"))
    world = TorchWorld(0, 1, tmp_path / "world", gpus=True, timeout_s=30)
    try:
        comm = world.make((0,), axis="tp", lane="tp")
        x = torch.arange(4.0, device=DEVICE)
        assert comm is not None and torch.equal(comm.all_reduce(x, site="x"), x)
        for on in (DEVICE, "cpu"):
            y = x.to(on).clone()
            dist.all_reduce(y)
            assert torch.equal(y.cpu(), x.cpu())
    finally:
        world.close()


def test_verify_over_nccl_by_one_process(tmp_path):
    if DEVICE.type == "cpu":
        pytest.skip("nccl is of GPUs")
    from partita.verify.parity import verify

    found = verify(gpu_jobs.job(tmp_path, "2mb bf16"), backend="nccl", brief=True)
    assert found.equal, str(found)


def test_the_doctor_looks_at_it(text, capsys):
    assert command(["doctor", "job.toml", ON, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["checks"]
