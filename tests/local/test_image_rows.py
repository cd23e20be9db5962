"""Rows of images on cp, and LoRA beside convolutions: plans equal one device, and defects are named."""

from dataclasses import replace

import image_jobs
import pytest
import torch
from torch import nn

from partita.comm.threads.local import local
from partita.model.families.adapters import merged
from partita.model.reference_images import adapted
from partita.parallel.cp.halo import Window
from partita.parallel.cp.rows import Halo
from partita.parallel.dp.replicate import Reducer
from partita.parallel.regions import Region
from partita.parallel.split.conv import LowRank
from partita.spec.image import Conv
from partita.verify.parity import verify

LOW = {"lora_rank": 2, "lora_targets": ["linear", "kernel"], "lora_dropout": 0.3}
ODD = {"kernels": [5, 3, 4, 1], "strides": [2, 1, 1, 1], "paddings": [3, 2, 2, 1], "pools": [4]}


@pytest.mark.turns(2)
@pytest.mark.parametrize("plan, image", [
    ("cp3:halo tp2 2mb recompute:full recompute.collectives=keep fp16", ODD),
    ("cp2:halo dp_shard2.zero2 recompute:full fp8", {}),
    ("pp2:zb_h1/2mb cp2:halo dp_shard2.zero3 fp64", {}),
    ("pp2/2mb cp2:halo tp2 split2 offload:cpu offload.targets=activations bf16", ODD),
])  # fmt: skip
def test_rows_on_cp_equal_one_device(plan, image, tmp_path):
    """Of maps of 9, 9, 4, 4 and 1 rows, or with strides and paddings of many sizes: no cut divides them, and
    of the last some ranks hold none."""
    found = verify(image_jobs.job(tmp_path, plan, image), brief=True)
    assert found.equal and found.traffic_equal, str(found)


def test_halos_of_strides_and_paddings_come_from_more_than_the_next_rank(tmp_path):
    found = verify(image_jobs.job(tmp_path, "cp5:halo fp64", ODD, **LOW))
    assert found.equal and found.traffic_equal, str(found)


@pytest.mark.turns(2)
@pytest.mark.parametrize("plan", [
    "2mb recompute:full fp16", "tp2 split2 2mb fp64",
    "cp2:halo split2 offload:nvme offload.targets=activations,gradients,optimizer 2mb bf16",
    "pp2:zb_h1/2mb cp2:halo dp_shard2.zero3 fp64",
])  # fmt: skip
def test_lora_beside_convolutions_equals_one_device(plan, tmp_path):
    """Groups apart, groups that join, colors."""
    found = verify(image_jobs.job(tmp_path, plan, **LOW), brief=True)
    assert found.equal and found.traffic_equal, str(found)


def test_a_bias_that_trains_beside_a_frozen_base(tmp_path):
    """A and B have frozen kernels beside them, or B alone trains."""
    job = image_jobs.job(tmp_path, "pp2:zb_h1/2mb cp2:halo fp64", **LOW)
    train = replace(job.train, frozen=("*.kernel", "*_lora_a", "head.*"))
    found = verify(replace(job, train=train))
    assert found.equal and found.traffic_equal, str(found)


def diverges(folder, plan, **model):
    found = verify(image_jobs.job(folder, plan, **model))
    assert not found.equal and found.divergence is not None
    return found.divergence


def test_a_halo_row_that_is_dropped_is_named(monkeypatch, tmp_path):
    bring = Halo.bring

    def less(self, x):
        y = bring(self, x)
        above = self.window.own(self.mine).start - self.window.first(self.mine)
        if self.mine and above > 0:
            y[..., above - 1, :] = 0
        return y

    monkeypatch.setattr(Halo, "bring", less)
    at = diverges(tmp_path, "cp2:halo fp64")
    assert (at.phase, at.module, at.rank) == ("forward", "embedding", 1)
    assert at.expected == ("all_to_all", "cp")


def test_halo_gradients_that_nobody_adds_are_named(monkeypatch, tmp_path):
    """The message goes, and is not added: bytes are right, numbers are not."""
    give = Halo.give_back

    def keeps(self, dy):
        alone = replace(self, region=replace(self.region, comm=Silent(self.region.comm)))
        return give(alone, dy)

    monkeypatch.setattr(Halo, "give_back", keeps)
    at = diverges(tmp_path, "cp2:halo fp64")
    assert at.phase == "backward" and at.expected == ("all_to_all", "cp")


class Silent:
    """Sends what it is given, and brings zeros."""

    def __init__(self, inner):
        self.inner = inner

    def all_to_all(self, x, **rest):
        return torch.zeros_like(self.inner.all_to_all(x, **rest))


def test_kernels_not_reduced_over_cp_are_named(monkeypatch, tmp_path):
    start = Reducer._start
    monkeypatch.setattr(
        Reducer, "_start", lambda self, unit: None if "unit[cp]" in unit.name else start(self, unit)
    )
    at = diverges(tmp_path, "cp2:halo fp64")
    assert at.phase == "gradient" and at.expected == ("all_reduce", "cp")
    at = diverges(tmp_path, "cp2:halo fp64", lora_rank=2, lora_targets=["kernel"])
    assert "lora_b" in at.module or "lora_a" in at.module
    assert at.phase == "gradient" and at.expected == ("all_reduce", "cp")


def test_an_adapter_without_its_scale_is_found(monkeypatch, tmp_path):
    """alpha / rank is 1 where alpha is left out, and would not show."""
    back = LowRank.back
    monkeypatch.setattr(
        LowRank, "back", lambda self, dy: back(replace(self, scale=1.0, drop=None), dy)
    )
    at = diverges(tmp_path, "cp2:halo fp64", lora_alpha=6.0, lora_targets=["kernel"], lora_rank=2)
    assert at.phase == "backward"


def halo_of(world, window, x):
    comm = world.make(range(world.size), axis="cp", lane="halo")
    move = Halo(Region("halo", comm, "test"), world.rank, window)
    held = window.held
    own = torch.zeros(*x.shape[:-2], held, x.shape[-1], dtype=x.dtype)
    rows = window.own(world.rank)
    own[..., : len(rows), :] = x[..., rows.start : rows.stop, :]
    y = move.bring(own)
    first, seen = window.first(world.rank), window.seen(world.rank)
    whole = torch.zeros_like(y)
    for row in seen:
        whole[..., row - first, :] = x[..., row, :]
    torch.manual_seed(world.rank)
    dy = torch.zeros_like(y)
    dy[..., seen.start - first : seen.stop - first, :] = (world.rank + 1.0) if seen else 0.0
    return torch.equal(y, whole), float((y * dy).sum()), float((own * move.give_back(dy)).sum())


@pytest.mark.parametrize(
    "window",
    [
        Window(13, 13, 3, 1, 1, 4), Window(27, 13, 3, 2, 0, 3), Window(9, 3, 7, 2, 2, 4),
        Window(2, 4, 3, 1, 2, 3),
    ],
    ids=str,
)  # fmt: skip
def test_a_halo_and_its_backward_are_transposes(window):
    """<halo x, dy> = <x, halo' dy>, summed over all ranks, wherever the windows lie."""
    x = torch.randn(
        2, 3, window.size, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    with local(window.ways) as ranks:
        found = ranks.run(halo_of, window, x)
    assert all(same for same, *_ in found)
    forward, back = (sum(f[i] for f in found) for i in (1, 2))
    assert forward == pytest.approx(back, rel=1e-12) and forward


class Judge:
    """What `adapted` asks of a reference."""

    def __init__(self, a, b):
        self.weights = {"blocks.0.conv.kernel_lora_a": a, "blocks.0.conv.kernel_lora_b": b}
        self.samples, self.spec = None, type("S", (), {"lora_dropout": 0.0, "lora_scale": 1.5})
        self.weight = self.weights.__getitem__

    def drop(self, site, x, samples, p):
        return x


@pytest.mark.parametrize("apart", [True, False])
def test_the_judges_adapter_is_what_a_merged_kernel_makes(apart):
    """W + (alpha / rank) B A, group by group, as one convolution of torch; and so are weights merged."""
    dice = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=dice)

    groups, filters, channels, rank = 2, 3, 2, 2
    seen = (channels,) if apart else (groups, channels)
    w, b = draw(groups, filters, *seen, 3, 3), draw(groups, filters, rank)
    a = draw(*((groups,) if apart else ()), rank, *seen, 3, 3)
    x, ways = draw(2, groups * channels, 7, 7), groups if apart else 1
    flat = w.flatten(0, 1).flatten(1, -3)
    y = nn.functional.conv2d(x, flat, None, 2, 1, groups=ways)
    conv = Conv(channels, filters, 0 if apart else 2, 3, 2, 1, 7, 4, 4, False, False)
    got = adapted(Judge(a, b), "blocks.0.conv.kernel", x, y, conv, ways)
    low = torch.einsum("gfr,gr...->gf..." if apart else "gfr,r...->gf...", b, a)
    whole = merged(w, a, b, 1.5)
    assert torch.allclose(whole, w + 1.5 * low, rtol=1e-12, atol=1e-12)
    want = nn.functional.conv2d(x, whole.flatten(0, 1).flatten(1, -3), None, 2, 1, groups=ways)
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-12)
