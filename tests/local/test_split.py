"""The split of channels: a plan equals the grouped network on one device; the judge equals plain torch."""

from dataclasses import replace

import image_jobs
import pytest
import torch
from test_drift import look, recorded_in_order
from torch import nn

from partita.comm.threads.local import local
from partita.model.reference import Reference, loss_and_gradients, weight_shapes
from partita.parallel.regions import Region
from partita.parallel.tp.loss import CrossEntropy
from partita.spec.job import Job
from partita.spec.model import ModelSpec
from partita.train.build import assemble, microbatch
from partita.train.data.dataset import open_dataset
from partita.verify.parity import verify
from partita.verify.shrink import shrink

PLANS = (
    "split4 dp_replicate2 2mb fp64", "split2 fp32", "split2 2mb bf16", "split2 2mb fp16", "split2 2mb fp8",
    "split4 dp_shard2.zero2 2mb recompute:full recompute.every=2 fp64",
    "recompute:selective split2 order:pp,dp_replicate,cp,dp_shard,tp pp2/2mb fp64",
    "tp2 fp32", "tp2 split2 2mb recompute:full recompute.collectives=keep bf16", "tp2 2mb fp8",
    "pp2:zb_h1/2mb tp2 dp_shard2.zero3 recompute:full fp64",
)  # fmt: skip


@pytest.mark.turns(2)
@pytest.mark.parametrize("plan", PLANS)
def test_a_split_equals_one_device(plan, tmp_path):
    found = verify(image_jobs.job(tmp_path, plan), brief=True)
    assert found.equal, str(found)
    assert all(s.loss > 0.1 for t in found.trials for s in t.judge)


def test_a_rank_in_the_middle_norms_what_lies_on_both_sides(tmp_path):
    """Of sixteen channels four ranks make four each; a window is five wide."""
    image = {"groups": 1, "channels": [16, 16, 8, 8]}
    found = verify(image_jobs.job(tmp_path, "tp4 fp64", image))
    assert found.equal and found.traffic_equal, str(found)


@pytest.mark.parametrize(
    "plan", ["2mb fp64", "tp2 split2 2mb fp32", "pp2/2mb split4 dp_shard2.zero3 fp64"]
)
def test_lora_of_fully_connected_layers_equals_one_device(plan, tmp_path):
    found = verify(image_jobs.job(tmp_path, plan, lora_rank=2, lora_dropout=0.3), brief=True)
    assert found.equal and found.traffic_equal, str(found)


def test_known_images_are_counted_once_whoever_has_their_class(tmp_path):
    """Classes lie on tp: a rank sees its own logits and the largest of all."""
    plans = "2mb fp64", "tp2 cp2:halo 2mb fp64"
    one, cut = (image_jobs.job(tmp_path, plan) for plan in plans)
    with local(1) as ranks:
        (want,) = ranks.run(knows, one)
    with local(4) as ranks:
        found = ranks.run(knows, cut)
    assert 0 < want < 8 and sum(found) == want


@pytest.mark.parametrize("ways", [1, 2])
def test_of_equal_logits_the_first_is_the_likeliest(ways):
    """A network that tells nothing apart knows one class."""
    logits = torch.zeros(1, 8, 6)
    logits[0, 6, 4] = logits[0, 7, 2] = logits[0, 7, 5] = 1
    targets = torch.tensor([[0, 1, 2, 3, 4, 5, 4, 5]])
    valid = torch.ones_like(targets, dtype=torch.bool)

    def hit(world):
        comm, rows = world.make(range(ways), axis="tp", lane="tp"), 6 // ways
        region = Region("reduce_from" if ways > 1 else "identity", comm, "loss")
        layer = CrossEntropy(world.rank * rows, rows, region, region, region)
        hits = []
        with torch.no_grad():
            own = logits[..., world.rank * rows : (world.rank + 1) * rows]
            layer(own.clone(), targets, valid, 8, hits=hits)
        return hits[0].flatten().tolist()

    with local(ways) as ranks:
        found = ranks.run(hit)
    assert found == [[True, *[False] * 5, True, False]] * ways


def knows(world, job):
    """Of a step's images."""
    built = assemble(job, world)
    with torch.no_grad():
        built.model.evaluate(built.batch(0))
    return built.model.take_known()


@pytest.mark.parametrize("plan", ["split2 pp2:zb_h1/2mb fp64", "split2 dp_shard2.zero3 bf16"])
def test_kernels_may_be_frozen(plan, tmp_path):
    job = image_jobs.job(tmp_path, plan)
    train = replace(job.train, frozen=("embedding.*", "blocks.*.conv.kernel"))
    found = verify(replace(job, train=train), brief=True)
    assert found.equal and found.traffic_equal, str(found)


def test_a_gradient_that_no_one_adds_up_is_named(monkeypatch, tmp_path):
    """Where groups meet each rank has a part of the gradient; one that keeps its own share of its own part
    is found in backward, with the collective that is missing."""
    whole = Region.backward

    def alone(self, dx):
        if "conv.join" not in self.site:
            return whole(self, dx)
        return dx.chunk(self.comm.size, 1)[self.comm.rank].clone()

    monkeypatch.setattr(Region, "backward", alone)
    found = verify(image_jobs.job(tmp_path, "split2 fp64"))
    at = found.divergence
    assert not found.equal and at is not None and at.phase == "backward"
    assert at.module == "blocks.0" and at.expected == ("reduce_scatter", "split")


class Plain(nn.Module):
    """The same network as one writes it in torch."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        image = spec.image
        layers, before = [], image.colors
        for i, c in enumerate(image.channels):
            groups = 1 if i == 0 or i + 1 in image.joins else image.groups
            sizes = image.kernels[i], image.strides[i], image.paddings[i]
            layers += [nn.Conv2d(before, c, *sizes, groups=groups), nn.ReLU()]
            if i + 1 in image.norms:
                layers.append(Within(image.groups, nn.LocalResponseNorm(5, 5e-4, 0.75, 2.0)))
            if i + 1 in image.pools:
                layers.append(nn.MaxPool2d(3, 2))
            before = c
        layers.append(nn.Flatten())
        before = image.features
        for _ in range(image.dense):
            layers += [nn.Linear(before, spec.hidden), nn.ReLU()]
            before = spec.hidden
        self.layers = nn.Sequential(*layers, nn.Linear(before, spec.vocab))


class Within(nn.Module):
    """A norm of each group by itself."""

    def __init__(self, groups, inner):
        super().__init__()
        self.groups, self.inner = groups, inner

    def forward(self, x):
        return torch.cat([self.inner(part) for part in x.chunk(self.groups, 1)], 1)


def test_the_judge_is_the_network_written_in_torch(tmp_path):
    """Loss and every gradient, in float64; weights are laid out alike but for their dims."""
    spec = ModelSpec.from_toml({**image_jobs.MODEL, "image": image_jobs.IMAGE, "dropout": 0.0})
    plain = Plain(spec).double()
    theirs = list(plain.parameters())
    assert sum(p.numel() for p in theirs) == spec.parameters()
    shapes = weight_shapes(spec)
    weights = {n: p.detach().reshape(s) for (n, s), p in zip(shapes.items(), theirs, strict=True)}
    source = image_jobs.job(tmp_path, "1mb")
    data = open_dataset(source.data, source.train, vocab=7, seed=0, image=spec.image)
    batch = microbatch(data.microbatch(0, range(8)), range(8))
    batch.valid[3] = False
    loss, gradients = loss_and_gradients(Reference(spec, weights, torch.float64), [batch])
    logits = plain.layers(batch.ids.double())
    ours = nn.functional.cross_entropy(logits[batch.valid[:, 0]], batch.targets[batch.valid])
    ours.backward()
    assert loss == pytest.approx(float(ours.detach()), rel=1e-12)
    for (name, g), p in zip(gradients.items(), theirs, strict=True):
        assert torch.allclose(g, p.grad.reshape(g.shape), rtol=1e-10, atol=1e-12), name


@pytest.mark.parametrize("plan", [
    "split2 2mb bf16", "split4 2mb fp32", "2mb recompute:full fp32", "tp2 split2 2mb fp32", "tp2 2mb bf16",
    "cp2:halo 2mb fp32", "cp3:halo split2 2mb bf16", "cp2:halo tp2 2mb recompute:full fp32",
])  # fmt: skip
def test_the_program_does_not_drift(plan, tmp_path):
    """Kept storages, FLOPs, sites, bytes, order, names and shapes are those declared."""
    job = image_jobs.job(tmp_path, plan)
    with local(job.plan.world_size, 20) as ranks:
        for rows in ranks.run(look, job):
            for name, kept, declared_kept, flops, declared_flops in rows:
                assert kept == declared_kept, (name, kept, declared_kept)
                assert flops == declared_flops, (name, flops, declared_flops)
        for traffic, weights, first, calls in ranks.run(recorded_in_order, job):
            assert traffic and weights
            assert sorted(c for c in first if c[1] in "FB") == sorted(calls)


def test_a_model_too_big_is_shrunk_with_its_groups():
    job = Job.of("alexnet", "laptop", "split2 dp_shard8.zero1 2mb", global_batch_size=64, seq_len=1)
    small, told = shrink(job)
    assert told and small.model.image.groups == 2 and small.model.image.joins == (3,)
    assert small.plan.mesh.split == 2 and small.model.parameters() < 100_000
