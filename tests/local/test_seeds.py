"""The same numbers under every cut, at the cost of the shard; Philox against its known answers."""

import math
import resource
import time

import pytest
import torch

from partita.comm.random import seeds


def words(*values):
    return [torch.tensor([v], dtype=torch.int64) for v in values]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # Random123, kat_vectors, philox4x32 10
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, answer):
    assert tuple(int(w) for w in seeds.philox(words(*counter), key)) == answer
    here = seeds._philox_here([w.numpy() for w in words(*counter)], key)
    assert tuple(here[0].tolist()) == answer


def test_numpy_draws_what_torch_draws():
    """Of samples and elements that broadcast, beyond 32 bits too."""
    block, sample = torch.arange(37) + 2**34 - 5, torch.arange(4).view(-1, 1)
    counter = (block & seeds.MASK, block >> 32, sample, torch.tensor(3))
    key = seeds.key_of(5, "dropout", "a site")
    want = torch.stack(torch.broadcast_tensors(*seeds.philox(counter, key)), -1)
    assert torch.equal(seeds._blocks(key, block, sample, 3), want)


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((7, 5, 6), ((0, 7), (0, 5), (0, 6))),
        ((7, 5, 6), ((2, 5), (1, 4), (3, 5))),
        ((7, 50), ((1, 6), (3, 49))),
        ((7, 50), ((3, 4), (13, 50))),
        ((40, 3, 2), ((7, 40), (0, 3), (0, 2))),
        ((40, 3, 2), ((7, 40), (1, 3), (0, 2))),
        ((301,), ((7, 300),)),
        ((4, 4), ((1, 1), (0, 4))),
    ],
)
def test_a_box_holds_the_values_of_the_whole_tensor(shape, box, monkeypatch):
    monkeypatch.setattr(seeds, "CHUNK", 64)  # so that small tensors are drawn in several chunks
    count = math.prod(shape)
    whole = seeds.normal(3, "w", torch.arange(count)).view(shape) * 0.5
    cut = whole[tuple(slice(a, b) for a, b in box)]
    assert torch.equal(seeds.normal_box(3, "w", shape, box, std=0.5, dtype=torch.float64), cut)


def test_streams_differ_by_seed_and_name_and_ignore_the_default_generator():
    i = torch.arange(1000)
    a = seeds.uniform(0, "a", i)
    torch.manual_seed(99)
    assert torch.equal(a, seeds.uniform(0, "a", i))
    for other in (seeds.uniform(1, "a", i), seeds.uniform(0, "b", i), seeds.uniform(-1, "a", i)):
        assert (a != other).sum() > 990


def test_moments_of_a_million_values():
    i = torch.arange(1_000_000)
    u, z = seeds.uniform(5, "u", i), seeds.normal(5, "z", i)
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 2e-3 and abs(u.var() - 1 / 12) < 5e-4
    assert abs(z.mean()) < 5e-3 and abs(z.var() - 1) < 1e-2 and abs((z**4).mean() - 3) < 0.1
    assert abs((z[1:] * z[:-1]).mean()) < 5e-3


def test_indices_beyond_32_bits_are_their_own_elements():
    low = torch.arange(100)
    assert not torch.equal(seeds.normal(0, "w", low), seeds.normal(0, "w", low + 2**40))
    assert seeds.normal(0, "w", low + (2**63 - 101)).isfinite().all()


def test_a_1024th_of_a_two_billion_element_parameter_costs_its_own_elements():
    rows, width, ways = 1_000_000, 2048, 1024
    boxes = [
        ((0, rows), (1022, 1024)),  # a column cut: runs of two elements
        ((976, 1952), (0, width)),  # a row cut: one run
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for box in boxes:
        start = time.thread_time()
        part = seeds.normal_box(0, "embedding.table", (rows, width), box)
        assert part.numel() == pytest.approx(rows * width / ways, rel=0.01)
        assert time.thread_time() - start < 8
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown * 1024 < 150e6  # the shard is 8 MB; the whole would be 8 GB


def test_dropout_is_a_function_of_step_site_sample_and_element():
    samples, elements = torch.tensor([0, 3, 9]), torch.arange(24 * 16).view(24, 16)
    mask = seeds.dropout_mask(1, 7, "blocks.0.mlp", samples, elements, 0.25)
    assert mask.shape == (3, 24, 16) and mask.dtype == torch.bool
    part = seeds.dropout_mask(1, 7, "blocks.0.mlp", samples[1:2], elements[3:, 8:], 0.25)
    assert torch.equal(part[0], mask[1, 3:, 8:])
    for changed in (
        seeds.dropout_mask(1, 8, "blocks.0.mlp", samples, elements, 0.25),
        seeds.dropout_mask(1, 7, "blocks.1.mlp", samples, elements, 0.25),
        seeds.dropout_mask(2, 7, "blocks.0.mlp", samples, elements, 0.25),
        seeds.dropout_mask(1, 7, "blocks.0.mlp", samples + 1, elements, 0.25),
    ):
        assert not torch.equal(mask, changed)


@pytest.mark.parametrize("box", [((0, 24), (0, 16)), ((3, 20), (8, 16)), ((5, 6), (1, 15))])
def test_a_dropout_box_is_the_mask_of_its_elements(box, monkeypatch):
    monkeypatch.setattr(seeds, "CHUNK", 50)
    samples, elements = torch.tensor([4, 2]), torch.arange(24 * 16).view(24, 16)
    (a, b), (c, d) = box
    whole = seeds.dropout_mask(1, 7, "s", samples, elements[a:b, c:d], 0.4)
    boxed = seeds.dropout_box(1, 7, "s", samples, shape=(24, 16), box=box, p=0.4)
    assert torch.equal(whole, boxed)


@pytest.mark.parametrize("width", [5, 13])
def test_rows_of_many_samples_draw_their_own_elements(width, monkeypatch):
    monkeypatch.setattr(seeds, "CHUNK", 30)  # a few rows at once
    samples, first = torch.tensor([3, 0, 5, 5, 3]), torch.tensor([0, 7, 22, 26, 1])
    whole = seeds.dropout_mask(1, 2, "site", samples, torch.arange(40), 0.3)
    rows = seeds.dropout_rows(1, 2, "site", samples, first, width, 0.3)
    want = [mask[at : at + width] for mask, at in zip(whole, first.tolist(), strict=True)]
    assert torch.equal(rows, torch.stack(want))
    none = samples[:0]
    assert seeds.dropout_rows(1, 2, "site", none, none, width, 0.3).shape == (0, width)


def test_dropout_keeps_the_stated_share():
    samples, elements = torch.arange(50), torch.arange(10_000)
    for p in (0.0, 0.1, 0.5, 1.0):
        kept = seeds.dropout_mask(0, 0, "s", samples, elements, p).double().mean()
        assert abs(kept - (1 - p)) < 3e-3
        assert p not in (0.0, 1.0) or kept == 1 - p


def test_initial_values_follow_the_rule():
    def value(name, shape):
        box = tuple((0, n) for n in shape)
        return seeds.initial_value(0, name, shape, box, layers=8)

    assert torch.equal(value("blocks.0.attention.norm", (4,)), torch.ones(4))
    for bias in ("blocks.0.attention.norm_bias", "blocks.0.mlp.fc1_bias"):
        assert torch.equal(value(bias, (4,)), torch.zeros(4))
    assert value("blocks.0.mlp.fc1", (300, 300)).std() == pytest.approx(0.02, rel=0.02)
    assert value("embedding.table", (300, 300)).std() == pytest.approx(0.02, rel=0.02)
    for name in ("attention.wo", "mlp.down", "mlp.fc2"):
        std = value(f"blocks.1.{name}", (300, 300)).std()
        assert std == pytest.approx(0.02 / 4, rel=0.02)


def test_masks_and_values_are_independent_of_each_other():
    """Of neighbours in any key (element, sample, site, step, seed, name) and of each other: correlations of
    200,000 pairs stay within 5 standard deviations, 0.011."""
    rows, samples = torch.arange(1000), torch.arange(201)

    def mask(seed=1, step=7, site="blocks.0.mlp"):
        return seeds.dropout_mask(seed, step, site, samples, rows, 0.3).double() - 0.7

    def value(name, seed=1):
        box = ((0, 201), (0, 1000))
        made = seeds.initial_value(seed, name, (201, 1000), box, layers=1, dtype=torch.float64)
        return made / made.std()

    def correlation(a, b):
        return float((a * b).mean() / (a.square().mean() * b.square().mean()).sqrt())

    a, w = mask(), value("blocks.0.mlp.fc1")
    pairs = [
        (a, mask(seed=2)), (a, mask(step=8)), (a, mask(site="blocks.1.mlp")), (a[1:], a[:-1]),
        (a[:, 1:], a[:, :-1]), (w, value("blocks.1.mlp.fc1")), (w, value("blocks.0.mlp.fc1", seed=2)),
        (w[1:], w[:-1]), (w[:, 1:], w[:, :-1]), (a, w),
    ]  # fmt: skip
    assert max(abs(correlation(x, y)) for x, y in pairs) < 0.011
