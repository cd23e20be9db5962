"""Faults planted in what outlives a step: weight versions, updates that are undone, states elsewhere,
adapters; verify sees each."""

from dataclasses import replace

import image_jobs
import pytest
import torch
import verify_jobs

from partita.comm.protocol import Done
from partita.comm.recording import RecordingComm
from partita.model import images
from partita.parallel.lora import LowRank
from partita.parallel.offload import cpu
from partita.parallel.pp.versions import Versions
from partita.train import pipeline, post_validation
from partita.train.step import Update
from partita.verify.parity import verify

AFTER = "pipeline.post_validation=true"
LOW = {"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": ("wq", "gate_up", "down")}


def judged(job):
    found = verify(job)
    assert not found.equal and found.divergence is not None, str(found)
    return found.divergence


def flowing(folder, plan, **model):
    made = verify_jobs.job(folder, f"{plan} fp64", layers=2, **model)
    return replace(made, train=replace(made.train, clip_grad_norm=0.0))


@pytest.mark.parametrize("name", ["pipedream", "pipedream_2bw"])
def test_a_weight_version_off_by_one(name, tmp_path, monkeypatch):
    """2BW has used two versions only in its third step."""
    right = pipeline.version_rule

    def older(schedule, tied=False):
        rule = right(schedule, tied)
        return lambda k, newest: max(0, rule(k, newest) - 1)

    monkeypatch.setattr(pipeline, "version_rule", older)
    assert judged(flowing(tmp_path, f"pp2:{name}/4mb")).phase == "forward"


def test_backward_with_the_newest_version(tmp_path, monkeypatch):
    backward = Versions.backward

    def newest(self, microbatch):
        self._used[microbatch] = self.newest
        backward(self, microbatch)

    monkeypatch.setattr(Versions, "backward", newest)
    assert judged(flowing(tmp_path, "pp2:pipedream_2bw/4mb")).phase == "gradient"


@pytest.mark.parametrize("m", [2, 3, 4])
def test_a_drain_loses_the_last_microbatch(m, tmp_path, monkeypatch):
    """Its targets count in the last step, however many microbatches there are."""
    receive = RecordingComm.receive

    def drops(self, like, source, *, key, site):
        handle = receive(self, like, source, key=key, site=site)
        last = key.kind == "B" and key.microbatch == 3 * m - 1
        return Done(torch.zeros_like(handle.wait())) if last else handle

    monkeypatch.setattr(RecordingComm, "receive", drops)
    made = flowing(tmp_path, f"pp2:pipedream/{m}mb", batch=12)
    assert judged(made).phase == "gradient"


def restored_but(what):
    """`Saved.restore` after which something is as the update left it."""
    restore = post_validation.Saved.restore

    def spoilt(self):
        if what == "master":
            kept = self._changed[0].clone()
            restore(self)
            self._changed[0].copy_(kept)
        elif what == "moments":
            states = self.update.optimizer.state
            kept = {x: {n: v.clone() for n, v in s.items()} for x, s in states.items()}
            restore(self)
            states |= kept
        else:
            kept = self.update.updates
            restore(self)
            self.update.updates = kept

    return spoilt


@pytest.mark.parametrize("what", ["master", "moments", "count"])
def test_an_update_not_undone_whole(what, tmp_path, monkeypatch):
    monkeypatch.setattr(post_validation.Saved, "restore", restored_but(what))
    made = verify_jobs.job(tmp_path, f"pp2:zb_h1/4mb fp64 {AFTER}", layers=2)
    assert judged(made).phase == "optimizer"


def test_forwards_that_are_not_run_again(tmp_path, monkeypatch):
    confirm = post_validation.Guess._confirm
    monkeypatch.setattr(post_validation.Guess, "_confirm", lambda self: confirm(self) or True)
    made = verify_jobs.job(tmp_path, f"pp2:zb_h1/4mb fp64 {AFTER}", layers=2)
    assert judged(made).phase == "forward"


def test_a_clip_that_a_guess_never_looks_at(tmp_path, monkeypatch):
    monkeypatch.setattr(Update, "clips", lambda self, norm: False)
    made = verify_jobs.job(tmp_path, f"pp2:zb_h1/4mb fp64 {AFTER}", layers=2)
    assert judged(made).phase == "optimizer"


def test_a_chunk_of_moments_in_the_place_of_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "CHUNK", 64)
    chunks = cpu.HostStream.chunks

    def moved(self, units):
        for c in chunks(self, units):
            yield c
            for name in c.away.states.keys() - {cpu.MASTER} if c.first else ():
                c.away.states[name][c.first - 64 : c.end - 64].copy_(c.tensors[name])

    monkeypatch.setattr(cpu.HostStream, "chunks", moved)
    made = verify_jobs.job(tmp_path, "2mb offload:cpu offload.targets=optimizer fp64", layers=1)
    assert judged(made).phase == "optimizer"


def test_adapters_of_gate_and_up_take_each_other_s_gradient(tmp_path, monkeypatch):
    right = LowRank.accumulate

    def swapped(self, dy, x, dhs):
        right(replace(self, b=self.b[::-1]), dy, x, dhs)

    monkeypatch.setattr(LowRank, "accumulate", swapped)
    at = judged(verify_jobs.job(tmp_path, "tp2 dp2 fp64", layers=1, **LOW))
    assert (at.phase, at.module) == ("gradient", "blocks.0.mlp.gate_up_lora_b")


def test_a_response_norm_over_the_seam_of_two_groups(tmp_path, monkeypatch):
    across = lambda x: x.copy_(sum(x.roll(i, 2) for i in range(-2, 3)))  # noqa: E731
    monkeypatch.setattr(images, "window_sums", across)
    at = judged(image_jobs.job(tmp_path, "split2 fp64"))
    assert (at.phase, at.module) == ("forward", "embedding")
