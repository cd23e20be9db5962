"""What every World must do, whatever carries it: the bodies of the contract tests, run on every rank."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import torch

from partita.base.errors import CommError
from partita.comm.protocol import Key, Where

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)


def tensor_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype, salt: int) -> torch.Tensor:
    """What `rank` brings: small integers, so that every sum is exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * salt + rank)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


def collectives(world, cases: int = 30) -> int:
    """Random shapes, dtypes, dims and groups: every collective against what one process computes."""
    dice = random.Random(7)
    n = world.size
    groups = [tuple(range(n)), tuple(range(0, n, 2)), tuple(reversed(range(n)))]
    comms = [(g, world.make(g, axis=f"axis{i}", lane="tp")) for i, g in enumerate(groups)]
    for case in range(cases):
        ranks, comm = dice.choice(comms)
        shape = tuple(dice.choice((1, 2, 3, 5)) for _ in range(dice.randint(1, 3)))
        dtype, dim = dice.choice(DTYPES), dice.randrange(len(shape))
        kind = dice.choice(
            ("all_reduce", "max", "all_gather", "reduce_scatter", "broadcast", "all_to_all")
        )
        if comm is None:
            continue
        one_case(comm, ranks, (case, kind, shape, dtype, dim))
    return cases


def one_case(comm, ranks, what) -> None:
    """One collective; `ranks` is the group's order."""
    case, kind, shape, dtype, dim = what
    n, site = len(ranks), f"case{case}"
    if kind == "reduce_scatter":
        shape = tuple(s * n if i == dim else s for i, s in enumerate(shape))
    if kind == "all_to_all":
        shape = (shape[0] * n, *shape[1:])
    every = [tensor_of(r, shape, dtype, case) for r in ranks]
    mine = every[comm.rank].clone()
    if kind == "all_reduce":
        got, want = comm.all_reduce(mine, site=site), sum(every[1:], every[0])
    elif kind == "max":
        got, want = comm.all_reduce(mine, site=site, op="max"), torch.stack(every).amax(0)
    elif kind == "all_gather":
        got, want = comm.all_gather(mine, site=site, dim=dim), torch.cat(every, dim)
    elif kind == "reduce_scatter":
        got = comm.reduce_scatter(mine, site=site, dim=dim)
        want = sum(every[1:], every[0]).chunk(n, dim)[comm.rank]
    elif kind == "broadcast":
        got, want = comm.broadcast(mine, site=site, root=n - 1), every[n - 1]
    else:
        got = comm.all_to_all(mine, site=site)
        want = torch.cat([x.chunk(n)[comm.rank] for x in every])
    assert torch.equal(got, want), (what, ranks)
    assert torch.equal(mine, every[comm.rank]), "a collective changed its argument"
    got.add_(1)  # results are the rank's own


def uneven(world) -> int:
    """Rows that differ by pair, some none: exchanged at once and two exchanges under way; counts told."""
    comm = world.make(range(world.size), axis="ep", lane="ep")
    n, me = world.size, world.rank
    rows = [[(3 * a + 5 * b) % 4 for b in range(n)] for a in range(n)]
    mine = torch.tensor(rows[me])
    assert comm.counts(mine, site="counts") == rows
    take = [rows[a][me] for a in range(n)]
    every = [tensor_of(a, (sum(rows[a]), 3), torch.float32, 1) for a in range(n)]
    want = torch.cat([x.split(rows[a])[me] for a, x in enumerate(every)])
    counts = {"send_counts": rows[me], "receive_counts": take}
    first = comm.start_all_to_all(every[me], site="first", **counts)
    second = comm.start_all_to_all(every[me] + 1, site="second", **counts)
    assert torch.equal(second.wait(), want + 1)
    assert torch.equal(first.wait(), want)
    assert torch.equal(comm.all_to_all(every[me], site="third", **counts), want)
    return n


def in_place(world) -> int:
    """`out`: a buffer beside the argument, the argument itself, a part of it, or what it is a part of; of
    one chunk and of many, in the order they were started or not."""
    comm = world.make(range(world.size), axis="dp_replicate", lane="dp")
    n, me = world.size, world.rank
    for salt, size in enumerate((3, 4096, 400_001)):
        every = [tensor_of(r, (n * size,), torch.float32, salt) for r in range(n)]
        total, mine = sum(every[1:], every[0]), slice(me * size, (me + 1) * size)
        for dtype in (torch.float32, torch.bfloat16):
            beside, own, scattered = (every[me].to(dtype, copy=True) for _ in range(3))
            result, part = torch.empty_like(own), scattered[mine]
            gathered = torch.zeros_like(own)
            gathered[mine] = total[mine].to(dtype)
            started = [
                comm.start_all_reduce(beside, site="beside", out=result),
                comm.start_all_reduce(own, site="own", out=own),
                comm.start_reduce_scatter(scattered, site="part", out=part),
                comm.start_all_gather(gathered[mine], site="whole", out=gathered),
            ]
            got = [h.wait() for h in (reversed(started) if salt % 2 else started)]
            got = got[::-1] if salt % 2 else got
            for found, place in zip(got, (result, own, part, gathered), strict=True):
                assert found.data_ptr() == place.data_ptr()
            assert torch.equal(beside, every[me].to(dtype))
            assert torch.equal(result.float(), total) and torch.equal(own.float(), total)
            assert torch.equal(part.float(), total[mine]) and torch.equal(gathered.float(), total)
            others = torch.arange(n * size) // size != me
            assert torch.equal(scattered[others], beside[others]), "only the own part is written"
    return n


def large_and_overlapped(world) -> float:
    """Tensors beyond any buffer, and three collectives under way at once, waited for out of order."""
    comm = world.make(range(world.size), axis="tp", lane="tp")
    n = world.size
    big = tensor_of(world.rank, (n * 700_001,), torch.float32, 1)
    total = sum(tensor_of(r, (n * 700_001,), torch.float32, 1) for r in range(n))
    assert torch.equal(comm.all_reduce(big, site="big"), total)
    assert torch.equal(comm.reduce_scatter(big, site="big"), total.chunk(n)[world.rank])
    whole = comm.all_gather(big[:600_000].view(200, 3000), site="big", dim=1)
    assert torch.equal(whole.chunk(n, 1)[world.rank], big[:600_000].view(200, 3000))
    for turn in range(20):
        x = torch.full((4092,), float(world.rank + turn))
        assert comm.moves(x.nbytes)
        first = comm.start_all_reduce(x, site="a")
        second = comm.start_all_gather(x[:5], site="b")
        third = comm.start_reduce_scatter(x, site="c")
        assert third.wait()[0] == sum(r + turn for r in range(n))
        assert torch.equal(
            second.wait(), torch.cat([torch.full((5,), float(r + turn)) for r in range(n)])
        )
        assert first.wait()[0] == sum(r + turn for r in range(n))
    return float(total.sum())


def mixed_order(world, count: int = 12) -> int:
    """Many collectives of two crossed groups under way at once, waited for in another order."""
    n = world.size
    orders = (tuple(range(n)), (*range(0, n, 2), *range(1, n, 2)))
    comms = [world.make(ranks, axis=f"axis{i}", lane="dp") for i, ranks in enumerate(orders)]
    dice, own = random.Random(3), random.Random(world.rank)  # shared; how late this rank is
    started = []
    for case in range(count):
        which, size = dice.randrange(2), dice.choice((1, 7, 300))
        kind = dice.choice(("all_reduce", "max", "all_gather", "reduce_scatter"))
        comm, ranks, site = comms[which], orders[which], f"case{case}"
        every = [tensor_of(r, (n * size, 2), dice.choice(DTYPES), case) for r in ranks]
        every = [x.to(every[0].dtype) for x in every]
        mine, total = every[comm.rank], sum(every[1:], every[0])
        if kind == "all_reduce":
            started.append((comm.start_all_reduce(mine, site=site), total))
        elif kind == "max":
            handle = comm.start_all_reduce(mine, site=site, op="max")
            started.append((handle, torch.stack(every).amax(0)))
        elif kind == "all_gather":
            handle = comm.start_all_gather(mine, site=site, dim=case % 2)
            started.append((handle, torch.cat(every, case % 2)))
        else:
            handle = comm.start_reduce_scatter(mine, site=site)
            started.append((handle, total.chunk(n)[comm.rank]))
        if own.random() < 0.3:
            time.sleep(0.001 * own.random())
    dice.shuffle(started)
    for handle, want in started:
        assert torch.equal(handle.wait(), want)
    return count


def messages(world, count: int = 12, size: int = 70_000) -> int:
    """Keyed messages both ways between neighbours, received in another order than sent."""
    down = world.make(range(world.size), axis="pp", lane="pp_down")
    up = world.make(range(world.size), axis="pp", lane="pp_up")
    right, left = (down.rank + 1) % down.size, (down.rank - 1) % down.size
    like = torch.empty(size)
    posted = [down.receive(like, left, key=Key("F", 1, m), site="s") for m in range(count)]
    for m in range(count):
        down.send(
            torch.full((size,), float(10 * world.rank + m)), right, key=Key("F", 1, m), site="s"
        )
        up.send(torch.full((3,), float(m)), left, key=Key("B", 0, m), site="s")
    for m in reversed(range(count)):
        assert (posted[m].wait() == 10 * down.ranks[left] + m).all()
    for m in range(count):
        got = up.receive(torch.empty(3), right, key=Key("B", 0, m), site="s").wait()
        assert (got == m).all()
    return count


def disagreement(world, how: str) -> str:
    """Rank 1 does something else than the others; the error's text on this rank."""
    comm = world.make(range(world.size), axis="tp", lane="tp")
    comm.all_reduce(torch.zeros(2), site="before")
    try:
        if how == "op" and world.rank == 1:
            comm.all_gather(torch.zeros(4), site="blocks.0.mlp.down:reduce_from")
        elif how == "shape" and world.rank == 1:
            comm.all_reduce(torch.zeros(5), site="blocks.0.mlp.down:reduce_from")
        elif how == "order" and world.rank == 1:
            comm.all_reduce(torch.zeros(4), site="blocks.1.mlp.down:reduce_from")
        else:
            comm.all_reduce(torch.zeros(4), site="blocks.0.mlp.down:reduce_from")
    except CommError as error:
        return str(error)
    return ""


def where(step: int) -> Where:
    return Where(step=step, phase="F", activity="forward")


def clocked(world, body):
    """A body over transfers that take their time."""
    from partita.comm.clocked import ClockedWorld, Link

    link = Link(latency_s=1e-4, bytes_per_s=2e9)
    return body(
        ClockedWorld(world, {"tp": link, "dp": link, "pp_down": link, "pp_up": Link(1e-5, 1e9)})
    )


def best_of(
    measure: Callable[[], Sequence[float]], least: float, most: float, tries: int = 8
) -> None:
    """In one of several tries all the times measured lie between `least` and `most`: other work on the
    machine wakes sleepers late, and ranks apart."""
    found = []
    for _ in range(tries):
        found.append([round(t, 4) for t in measure()])
        if all(0.99 * least <= t <= most for t in found[-1]):
            return
    raise AssertionError(f"{found} s, never all between {least:g} and {most:g}")


def overlap(world, computes: float) -> tuple[float, float]:
    """Seconds of (start, then compute, then wait) for a collective of 0.4 s, and for two messages that
    queue on one link: 0.2 s each."""
    from partita.comm.clocked import ClockedWorld, Link

    timed = ClockedWorld(world, {"dp": Link(0.2, 4e5), "pp_down": Link(0.1, 8e5)})
    dp, down = (timed.make(range(world.size), axis="a", lane=n) for n in ("dp", "pp_down"))
    x = torch.zeros(20_000)  # 80 kB
    dp.barrier(site="even")
    begin = time.perf_counter()
    handle = dp.start_all_reduce(x, site="x")
    time.sleep(computes)
    handle.wait()
    collective = time.perf_counter() - begin
    right, left = (down.rank + 1) % down.size, (down.rank - 1) % down.size
    dp.barrier(site="even")
    begin = time.perf_counter()
    came = [down.receive(x, left, key=Key("F", 1, m), site="s") for m in range(2)]
    for m in range(2):
        down.send(x, right, key=Key("F", 1, m), site="s")
    time.sleep(computes)
    for handle in came:
        handle.wait()
    return collective, time.perf_counter() - begin
