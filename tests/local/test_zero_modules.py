"""ZeRO-3 over plain nn.Module blocks beside one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import partita as pt
from partita.base.errors import UsageError
from partita.comm.single import SingleComm
from partita.comm.threads.local import local
from partita.parallel.dp.modules import ShardedModules
from partita.parallel.draws import drawing


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
        held.append(sum(u.flat.untyped_storage().nbytes() > 0 for u in model.units))
        loss.backward()
        model.finish()
        optimizer.step()
        held.append(sum(u.flat.untyped_storage().nbytes() > 0 for u in model.units))
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


def shared_blocks() -> list[nn.Module]:
    """A frozen block first, one without parameters, one that is partly frozen, a table at both ends."""
    first, act, middle, last = (*blocks()[:1], nn.Tanh(), *blocks()[1:3])
    first.requires_grad_(False)
    middle[0].weight.requires_grad_(False)
    table = nn.Linear(5, 5, bias=False).double()
    table.weight.data.copy_(torch.linspace(-1, 1, 25, dtype=torch.float64).view(5, 5))
    return [first, act, nn.Sequential(table, nn.Tanh()), middle, last, table]


def clipped(world, prefetch):
    """Two microbatches a step, both forwards before the backwards; the norm is the whole gradient's."""
    model = ShardedModules(shared_blocks(), world.comm("dp_shard", "dp"), prefetch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.3)
    norms = []
    for step in range(2):
        optimizer.zero_grad()
        share = [batch(10 * step + m).chunk(world.size)[world.rank] for m in range(2)]
        for loss in [model(x).square().sum() for x in share]:
            loss.backward()
        model.finish()
        norms.append(float(model.clip_grad_norm(0.5)))
        optimizer.step()
    assert not any(u.flat.untyped_storage().nbytes() for u in model.units)
    return norms, [(u.parameters, u.shard.detach()) for u in model.units]


@pytest.mark.parametrize("prefetch", [0, 1, 9])
def test_frozen_and_tied_parameters_and_a_clipped_norm(prefetch):
    model = nn.Sequential(*shared_blocks())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.05, weight_decay=0.3)
    norms = []
    for step in range(2):
        optimizer.zero_grad()
        sum(model(batch(10 * step + m)).square().sum() for m in range(2)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(trained, 0.5)))
        optimizer.step()
    with local(3, 20) as ranks:
        found = ranks.run(clipped, prefetch)
    assert min(norms) > 0.5 and all(got == pytest.approx(norms, rel=1e-10) for got, _ in found)
    shards = zip(*([shard for _, shard in units] for _, units in found), strict=True)
    whole = [torch.cat(each) for each in shards]
    assert len(whole) == 5
    got = [
        x.tolist()
        for flat, (parameters, _) in zip(whole, found[0][1], strict=True)
        for x in flat[: sum(p.shape.numel() for p in parameters)].split(
            [p.shape.numel() for p in parameters]
        )
    ]
    want = sorted(p.detach().reshape(-1).tolist() for p in model.parameters())
    for a, b in zip(sorted(got), want, strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-11)


def test_ranks_that_begin_unlike_are_refused():
    def unlike(world, change):
        model = blocks()
        if world.rank == 1:
            change(model)
        with pytest.raises(UsageError) as found:
            ShardedModules(model, world.comm("dp_shard", "dp"))
        return str(found.value)

    def other_bit(model):
        model[2][0].bias.data[3] += 1e-15

    with local(3, 20) as ranks:
        bits = ranks.run(unlike, other_bit)
        fewer = ranks.run(unlike, lambda model: model.pop())
    assert all("block 2: 0.bias [7] of rank 1 is not rank 0's" in said for said in bits)
    assert all("rank 0 has 24, rank 1 has 18, rank 2 has 24 parameters" in said for said in fewer)


def test_what_blocks_draw_is_of_their_rank_and_call():
    def drawn(world, seed):
        model = ShardedModules([nn.Dropout(0.5), nn.Dropout(0.1)], world.comm(), seed=seed)
        return [model(torch.ones(64)) for _ in range(2)]

    with local(2, 20) as ranks:
        first, again, other = (ranks.run(drawn, seed) for seed in (0, 0, 1))
    flat = [x for mine in first for x in mine]
    same = [x for mine in again for x in mine]
    assert all(torch.equal(x, y) for x, y in zip(flat, same, strict=True))
    assert len({str(x.tolist()) for x in [*flat, *other[0], *other[1]]}) == 8
    with drawing(0, "rank", 0, "call", 0, "block", 0):
        whole = nn.functional.dropout(torch.ones(64), 0.5)
    assert torch.equal(
        flat[0] > 0, (flat[0] > 0) & (whole > 0)
    )  # the same by torch's own generator


def test_a_block_that_returns_no_tensor_and_a_plan_without_shards_are_refused():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    model = ShardedModules([Two()], SingleComm("dp_shard", "compute", (0,)))
    with pytest.raises(UsageError, match=r"rank 0: block 0 \(Two\) returned a tuple; each block"):
        model(torch.ones(1))

    def built(context):
        return ShardedModules(blocks(), context).comm.size

    with pt.local(2, "dp_shard2.zero3") as ranks:
        assert ranks.run(built) == [2, 2]
    with pt.local(2) as ranks, pytest.raises(UsageError, match="plan dp_replicate2 cuts no param"):
        ranks.run(built)
    with pytest.raises(UsageError, match="at least 1"):
        pt.local(0)


def test_between_uses_a_parameter_reads_nan_and_whole_brings_it_to_be_saved():
    """What is freed must not be read: that ends a process, not a call."""

    def save(world):
        held = blocks()
        model = ShardedModules(held, world.comm("dp_shard", "dp"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        model(batch(0).chunk(2)[world.rank]).square().sum().backward()
        model.finish()
        optimizer.step()
        between = torch.cat([p.detach().reshape(-1) for b in held for p in b.parameters()])
        with model.whole():
            saved = [{k: v.clone() for k, v in b.state_dict().items()} for b in held]
        return bool(between.isnan().all()), saved

    with local(2, 20) as ranks:
        found = ranks.run(save)
    alone = nn.Sequential(*blocks())
    alone(batch(0)).square().sum().backward()
    torch.optim.SGD(alone.parameters(), lr=0.05).step()
    for hidden, saved in found:
        assert hidden
        for block, state in zip(alone, saved, strict=True):
            for name, value in block.state_dict().items():
                assert torch.allclose(state[name], value, rtol=1e-12, atol=1e-12)


def test_a_block_that_writes_into_its_input_is_named_and_all_may_have_no_parameters():
    def run(world, kinds):
        model = ShardedModules([kind() for kind in kinds], world.comm("dp_shard", "dp"))
        model(torch.ones(2, 5, requires_grad=True)).sum().backward()
        model.finish()
        return float(model.clip_grad_norm(1.0))

    with local(2, 20) as ranks:
        assert ranks.run(run, [nn.Tanh, nn.Tanh]) == [0.0, 0.0]
        with pytest.raises(UsageError, match=r"block 1 \(ReLU\) changes its input in place; give"):
            ranks.run(run, [nn.Tanh, lambda: nn.ReLU(inplace=True)])
