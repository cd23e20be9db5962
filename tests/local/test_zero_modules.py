"""ZeRO-3 over plain nn.Module blocks beside one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from partita.comm.local import local
from partita.parallel.dp.modules import ShardedModules


def blocks() -> list[nn.Module]:
    found: list[nn.Module] = []
    for i in range(4):
        layer = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 5))
        for name, p in layer.named_parameters():
            noise = torch.Generator().manual_seed(100 * i + len(name) + p.numel())
            p.data = torch.randn(p.shape, generator=noise) / 3
        found.append(layer.double())
    return found


def batch(step: int) -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(step), dtype=torch.float64)


def one_process(kind) -> list[torch.Tensor]:
    model = nn.Sequential(*blocks())
    optimizer = kind(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step)).square().sum().backward()
        optimizer.step()
    return [torch.cat([p.detach().reshape(-1) for p in b.parameters()]) for b in model]


def sharded(world, kind, prefetch):
    model = ShardedModules(blocks(), world.comm("dp_shard", "dp"), prefetch)
    optimizer = kind(model.parameters(), lr=0.05)
    held = []
    for step in range(3):
        optimizer.zero_grad()
        loss = model(batch(step).chunk(world.size)[world.rank]).square().sum()
        held.append(sum(f.untyped_storage().nbytes() > 0 for f in model._flats))
        loss.backward()
        model.finish()
        optimizer.step()
        held.append(sum(f.untyped_storage().nbytes() > 0 for f in model._flats))
    return [s.detach() for s in model.parameters()], held


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adagrad, torch.optim.SGD])
@pytest.mark.parametrize("size, prefetch", [(2, 1), (3, 0), (3, 9)])
def test_any_optimizer_on_shards_is_one_process(kind, size, prefetch):
    with local(size, 20) as ranks:
        found = ranks.run(sharded, kind, prefetch)
    for i, whole in enumerate(one_process(kind)):
        got = torch.cat([shards[i] for shards, _ in found])[: whole.numel()]
        assert torch.allclose(got, whole, rtol=1e-12, atol=1e-13)
    assert all(held == [0] * 6 for _, held in found)
