"""The regions by their types, with Meta's spmd_types as the oracle.

A type says what the ranks of an axis hold of one value, and so what its gradient is:

    I   the same, and so is its gradient     R   the same, gradients are terms of a sum
    P   terms of a sum, one gradient         S   shares along a dim, as its gradient's

spmd_types' operation between two types is run on the same inputs and gradients (its ranks are
LocalTensors over a fake process group): the region that the rooms insert there must bring the same values
and gradients. The types themselves are checked on the way.
"""

import pytest
import spmd_types as spmd
import spmd_types.checker
import torch
import torch.distributed as dist
from spmd_types import I, P, R, S
from spmd_types._mesh_axis import _reset
from torch.distributed._local_tensor import LocalTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from partita.comm.threads.local import local
from partita.parallel.cp import ulysses
from partita.parallel.regions import Region

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")  # spmd_types' own
RANKS, SHAPE = 4, (2, 8, 4, 3)
TYPES = {  # kind -> from, to, how large each dim of the result is beside the input's, theirs
    "copy_to": (I, R, (1, 1), spmd.convert),
    "reduce_from": (P, I, (1, 1), spmd.all_reduce),
    "gather_from": (S(1), R, (RANKS, 1), spmd.all_gather),
    "scatter_to": (P, S(1), (1 / RANKS, 1), spmd.reduce_scatter),
    "exchange": (S(2), S(1), (1 / RANKS, RANKS), spmd.all_to_all),
    "exchange back": (S(1), S(2), (RANKS, 1 / RANKS), spmd.all_to_all),
}


def draws(shape, alike, seed):
    """A tensor of each rank."""
    dice = torch.Generator().manual_seed(seed)
    found = [torch.randn(shape, generator=dice, dtype=torch.float64) for _ in range(RANKS)]
    return [found[0]] * RANKS if alike else found


def theirs(kind, x, dy):
    """Values and gradients of every rank."""
    source, to, _, move = TYPES[kind]
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    try:
        axis = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("tp",)).get_group("tp")
        with LocalTensorMode(RANKS) as mode:
            held = mode.rank_map(lambda r: x[r].clone()).requires_grad_()
            with spmd.checker.typecheck():
                local_type = {t: spmd.V if isinstance(t, spmd.Shard) else t for t in (source, to)}
                spmd.assert_type(held, {axis: local_type[source]})
                y = move(held, axis, src=source, dst=to)
                spmd.assert_type(y, {axis: local_type[to]})
            y.backward(mode.rank_map(lambda r: dy[r]))
            return [[t._local_tensors[r].detach() for r in range(RANKS)] for t in (y, held.grad)]
    finally:
        dist.destroy_process_group()
        _reset()


def ours(kind, x, dy):
    """The same on thread ranks."""

    def one(world):
        comm = world.make(range(RANKS), axis="tp", lane="tp")
        region = Region(kind.partition(" ")[0], comm, "test")
        mine = x[world.rank].clone().requires_grad_()
        if kind == "exchange":
            y = ulysses._ToHeads.apply(mine, region)
        elif kind == "exchange back":
            y = ulysses._ToSequence.apply(mine, region, True)
        else:
            y = region(mine)
        y.backward(dy[world.rank])
        return y.detach(), mine.grad

    with local(RANKS, 20) as ranks:
        return [list(found) for found in zip(*ranks.run(one), strict=True)]


@pytest.mark.parametrize("kind", TYPES)
def test_a_region_is_the_operation_of_its_types(kind):
    source, to, (first, second), _ = TYPES[kind]
    b, n, m, d = SHAPE
    x = draws(SHAPE, source in (I, R), 1)
    dy = draws((b, int(n * first), int(m * second), d), to in (I, P), 2)
    for mine, their in zip(ours(kind, x, dy), theirs(kind, x, dy), strict=True):
        for a, b in zip(mine, their, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_region_in_another_ones_place_is_not():
    """Passing on what must be added up: the values differ, or the gradient does."""
    x, dy = draws(SHAPE, True, 1), draws(SHAPE, False, 2)
    want, got = theirs("copy_to", x, dy), ours("identity", x, dy)
    assert torch.equal(got[0][0], want[0][0]) and not torch.allclose(got[1][0], want[1][0])
