"""A run handed from plan to plan, one step under each, is one device's: loss, norm, and in what is saved
after each step every weight and every moment."""

import json
from dataclasses import replace

import image_jobs
import pytest
import torch
import verify_jobs
from safetensors import safe_open
from saves import save_run

from partita.comm.threads.local import local
from partita.model.reference import Reference, loss_and_gradients
from partita.parallel.laid import lay
from partita.simulate.predict import request_of
from partita.train.build import assemble, fingerprint
from partita.train.checkpoints.checkpoint import Ranks, save_alone
from partita.train.checkpoints.pieces import Piece
from partita.train.checkpoints.resume import Stated, header, load_run
from partita.train.optimizer.optim import state_names
from partita.verify.batches import open_data, rank_batch, whole_batch
from partita.verify.delayed import delayed_step
from partita.verify.judge import JudgeUpdate

EPSILON = 1e-9  # of a tensor's largest element
FLOOR = 1e-15  # of moments of a key's bias, whose gradient is nought
LORA = {"lora_rank": 2, "lora_targets": ("wq", "wo", "gate_up", "down")}
CHAINS = {
    "llama": (
        {"tied": True},
        "dp_shard2.zero3 tp2 2mb",
        "pp2:1f1b/4mb tp2+sp",
        "tp4+sp 2mb",
        "pp2:pipedream/4mb",
        "pp2:auto/4mb pipeline.copies=2 pipeline.costs=12_12_12,10_10_10x2,15_15_15",
        "dp_shard4.zero1 offload:nvme offload.targets=gradients,optimizer 2mb",
    ),
    "experts": (
        verify_jobs.EXPERTS,
        "dp_shard2.zero0 ep2 2mb",
        "tp2+sp etp2 2mb",
        "dp_shard4.zero3 ep2 2mb",
    ),
    "gpt2": (
        {"family": "gpt2", "dropout": 0.1},
        "tp2 2mb",
        "pp2:pipedream_2bw/4mb dp_shard2.zero1",
        "cp2:ulysses dp_shard2.zero2 2mb",
        "pp2:interleaved_1f1bx2/4mb dp_replicate2",
        "dp_shard2.zero3 offload:cpu offload.targets=parameters,gradients,optimizer 2mb",
        "2mb",
    ),
    "adapters": (
        {**verify_jobs.QWEN, **LORA},
        "pp2:zb_h1/4mb tp2+sp",
        "dp_replicate2 dp_shard2.zero3 2mb",
        "cp2:ring pp2:dualpipev/4mb",
        "tp2 dp_shard2.zero1 2mb",
        "pp2:gpipe/2mb pipeline.post_validation=true",
    ),
    "latents": (
        {**verify_jobs.EXPERTS, **verify_jobs.MLA, "router": "sigmoid"},
        "tp2+sp ep2 2mb",
        "pp2:dualpipe/4mb dp_shard2.zero1 ep2",
        "dp_shard2.zero2 tp2+sp etp2 2mb",
        "pp2:zb_h2/4mb",
    ),
    "images": (
        {},
        "cp2:halo 2mb",
        "tp2 split2 2mb",
        "cp2:halo dp_shard2.zero3 2mb",
    ),
}
QUICK = ("llama", "experts", "images")


def begin(job, folder, data, weights):
    """The checkpoint of a run that has not begun: the judge's weights, moments of nought."""
    pieces = [
        Piece(
            name,
            role,
            tuple((0, k) for k in w.shape),
            w if role == "weight" else torch.zeros_like(w),
        )
        for name, w in weights.items()
        for role in ("weight", *state_names(job.train))
    ]
    stated = Stated(lay(request_of(job)).layouts, 0, fingerprint(data))
    save_alone(folder, 0, 1, lambda rank: pieces, header(job, stated))


def judged(judge, job, data, step):
    """One device's step: loss, norm."""
    judge, batches = replace(judge, job=job), whole_batch(data, job, step)
    laid = lay(request_of(job))
    if laid.schedule.is_asynchronous:
        now = {n: w.clone() for n, w in judge.weights.items()}
        seen = delayed_step(laid, judge, [now], batches, step)
        return seen.loss, seen.norm
    reference = Reference(job.model, judge.weights, torch.float64, job.seed)
    reference.step = step
    loss, gradients = loss_and_gradients(reference, batches, frozen=judge.frozen)
    norm = judge.norm(gradients)
    judge.step(gradients, norm, step)
    return loss, norm


def saved(world, job, folder, step):
    """A rank's step from the checkpoint before it: loss, norm, and where it is saved."""
    built = assemble(job, world)
    begun = load_run(folder / f"step-{step:08}", job, built.model, built.update, built.fingerprint)
    assert begun == step == built.update.updates
    found = built.model.forward_backward(rank_batch(built, step)), built.update.step()
    ranks = Ranks(world.rank, world.size, built.agree)
    return *found, save_run(
        folder, step + 1, job, built.model, built.update, built.fingerprint, ranks
    )


def held(path):
    """Every tensor of a checkpoint by (name, role), put together here from the files' own keys."""
    shapes, found = json.loads((path / "manifest.json").read_text())["header"]["tensors"], {}
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as source:
            for key in source.keys():  # noqa: SIM118
                role, _, rest = key.partition(":")
                name, _, box = rest[:-1].partition("[")
                at = tuple(slice(*map(int, side.split(":"))) for side in box.split(","))
                whole = found.setdefault((name, role), torch.full(shapes[name], torch.nan).double())
                assert whole[at].isnan().all(), key
                whole[at] = source.get_tensor(key)
    return found


LATER = (pytest.mark.slow, pytest.mark.turns(2))


@pytest.mark.parametrize(
    "chain", [c if c in QUICK else pytest.param(c, marks=LATER) for c in CHAINS]
)
def test_a_run_handed_from_plan_to_plan_is_one_device_s(chain, tmp_path):
    model, *lines = CHAINS[chain]
    jobs = image_jobs if chain == "images" else verify_jobs
    deep = {} if chain == "images" else {"layers": 5}  # for every plan's stages
    job = jobs.job(tmp_path, "2mb fp64", **{**deep, **model})
    last = len(lines) + 2
    train = replace(job.train, lr=1e-2, steps=last, warmup_steps=2, lr_schedule="cosine")
    if chain == "images":  # as AlexNet's were trained
        train = replace(train, optimizer="sgd", momentum=0.9)
    job = replace(job, train=train)
    data, judge = open_data(job, job), JudgeUpdate.of(job, torch.float64)
    begin(job, tmp_path, data, judge.weights)
    for step, line in enumerate(lines):
        made = job.with_plan(f"{line} fp64")
        clip = 0.0 if "pipedream" in line else 0.5
        made = replace(made, train=replace(train, clip_grad_norm=clip))
        loss, norm = judged(judge, made, data, step)
        with local(made.plan.world_size, 20) as ranks:
            seen = ranks.run(saved, made, tmp_path, step)
        for mine in seen:
            assert mine[:2] == pytest.approx((loss, norm), rel=1e-11), line
        for (name, role), values in held(seen[0][2]).items():
            state = judge.optimizer.state.get(judge.weights[name], {})
            want = judge.weights[name] if role == "weight" else state.get(role, torch.zeros(1))
            off = (values - want).abs().max()
            assert off <= max(EPSILON * want.abs().max(), FLOOR), (line, name, role, float(off))
