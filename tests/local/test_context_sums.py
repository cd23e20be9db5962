"""What a rank adds up of tiles, forward and backward, is added up wide and rounded once."""

from types import SimpleNamespace

import pytest
import torch
from test_context_parallel import SEQ, inputs, shared, split_of

from partita.parallel.cp import ring as ring_module
from partita.parallel.cp import ulysses
from partita.parallel.cp.travel import Gather, Ring


def made_up(q, k, v, seen=None, causal=False, scale=None):
    """Numbers of bf16 in place of a tile's output, each tile with the same share in its queries."""
    return (q.float().abs() + means(k)).bfloat16(), torch.zeros(q.shape[:3])


def made_up_back(g, tensors, *_):
    """Numbers of bf16 in place of a tile's gradients of q, k and v."""
    q, k, v = tensors
    parts = (q.float().abs() + means(k), k.float().abs() + means(q), v.float().abs() + means(g))
    return [part.bfloat16() for part in parts]


def means(x):
    return x.float().abs().mean((1, 2), keepdim=True)


@pytest.mark.parametrize("way", [Ring, Gather])
def test_bf16_is_added_up_wide_and_rounded_once(way, monkeypatch):
    """Outputs of a ring of eight, and gradients of q, k and v: as near to the sum of all tiles' as bf16 has
    numbers, whatever the kernel."""
    monkeypatch.setattr(ring_module, "attend", made_up)
    monkeypatch.setattr(ring_module, "attend_back", made_up_back)
    split, ring = split_of(8, causal=False), 8
    low = [t.bfloat16() for t in inputs()]
    shares = [t.chunk(ring, 2) for t in low]
    want = [torch.zeros_like(t, dtype=torch.float64).chunk(ring, 2) for t in (low[0], *low[:3])]
    tiles = torch.zeros(ring, SEQ // ring)
    for mine, owner in ((m, o) for m in range(ring) for o in range(ring)):
        q, k, v, g = shares[0][mine], shares[1][owner], shares[2][owner], shares[3][mine]
        for tile in split.tiles(mine, owner):
            rows, keys = (tile.rows, slice(None), tile.q), (tile.rows, slice(None), tile.k)
            tiles[mine, tile.q] += 1
            want[0][mine][rows] += made_up(q[rows], k[keys], v[keys])[0]
            found = made_up_back(g[rows], (q[rows], k[keys], v[keys]))
            for whole, at, part in zip(
                (want[1][mine], want[2][owner], want[3][owner]), (rows, keys, keys), found, strict=True
            ):  # fmt: skip
                whole[at] += part
    sums = [torch.cat(parts, 2) for parts in want]
    sums[0] /= tiles.flatten()[:, None]
    assert int(tiles.min()) >= ring  # enough to be lost one after the other
    for got, sum_ in zip(shared(way, split, low), sums, strict=True):
        assert bool(((got.double() - sum_).abs() <= 1.01 * 2.0**-8 * sum_).all())


def test_copies_of_a_key_s_gradient_are_added_up_wide(monkeypatch):
    """Of a key that Ulysses hands in eight times."""
    monkeypatch.setattr(ulysses, "to_sequence", lambda g, region: g)
    g = torch.rand(1, 8, 64, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    got, _ = ulysses._ToHeads.backward(SimpleNamespace(region=None, heads=1), g)
    assert torch.equal(got, g.double().sum(1, keepdim=True).bfloat16())
