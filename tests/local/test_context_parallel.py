"""Context parallelism: what a query sees, how tiles are merged, what travels and what is held."""

import time
import weakref

import pytest
import torch
import verify_jobs
from comm_contract import best_of

from partita.comm.clocked import ClockedWorld, Link
from partita.comm.threads.local import local
from partita.parallel.cp import balance
from partita.parallel.cp import ring as ring_module
from partita.parallel.cp import tile as tile_module
from partita.parallel.cp.balance import order
from partita.parallel.cp.ring import SharedKeys
from partita.parallel.cp.split import CAUSAL, FULL, PART, Split
from partita.parallel.cp.tile import Merged, attend, attend_back, is_short, plain, plain_back
from partita.parallel.cp.travel import Gather, Ring
from partita.parallel.cp.visible import Tokens, visible
from partita.parallel.regions import Region
from partita.verify.parity import verify


def test_what_a_query_sees_by_hand():
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1]])
    tokens = Tokens.first(8, documents)
    seen = visible(tokens.part(3, 8), tokens, window=3)[0]
    rows = [row.nonzero().flatten().tolist() for row in seen]
    assert rows == [[1, 2, 3], [2, 3, 4], [5], [5, 6], [5, 6, 7]]
    both = visible(tokens.part(5, 8), tokens, window=2, causal=False)[0]
    assert [row.nonzero().flatten().tolist() for row in both] == [[5, 6], [5, 6, 7], [6, 7]]


SEQ, HEADS, KV, DIM = 32, 4, 2, 8
PACKED = torch.tensor([[0] * 13 + [1] * 3 + [0] * 4 + [2] * 12, [5] * 32, [1] * 8 + [2] * 23 + [3]])


def split_of(ring, documents=None, window=0, causal=True):
    made = order(SEQ, ring, None if documents is None else documents.numpy(), window)
    positions = torch.from_numpy(made.positions)
    laid = (
        documents if documents is None else documents.gather(1, positions.expand(documents.shape))
    )
    return Split(made, Tokens(positions, laid), ring, window, causal)


RULES = {
    "causal": {}, "full": {"causal": False}, "window": {"window": 5},
    "packed": {"documents": PACKED}, "packed window": {"documents": PACKED, "window": 6},
    "both ways": {"documents": PACKED, "window": 6, "causal": False},
}  # fmt: skip


@pytest.mark.parametrize("ring", [2, 4])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_tiles_are_what_is_seen(rule, ring):
    tile_what_is_seen(split_of(ring, **rule))


@pytest.mark.parametrize("ring", [2, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_tiles_of_any_window_are_what_is_seen(causal, ring):
    """A window that ends where a chunk does, or one token before or behind."""
    for window in range(1, SEQ + 2):
        tile_what_is_seen(split_of(ring, window=window, causal=causal))


@pytest.mark.parametrize("window", [0, 6])
def test_tiles_of_many_chunks_a_rank_are_what_is_seen(window, monkeypatch):
    """As packed documents of many tokens have them: eight chunks a rank, those of each sample its own."""
    monkeypatch.setattr(balance, "SMALLEST", 1)
    split = split_of(2, documents=PACKED, window=window)
    assert split.order.chunk == 2 and len(set(split.order.rows)) > 1
    tile_what_is_seen(split, sparing=not window)


def tile_what_is_seen(split, sparing=True):
    """Tiles laid side by side are the mask of one device, and no pair is in two. `sparing`: nothing is made
    between chunks that do not see each other (of a window's last chunk only another document may be near)."""
    ring, chunk, share = split.ring, split.order.chunk, split.share
    for mine in range(ring):
        want = split.mask(mine)[:, 0].expand(3, -1, -1)
        got = torch.zeros(3, share, SEQ, dtype=torch.int)
        area = torch.zeros_like(got)
        for other in range(ring):
            block, touched = got[..., other * share :][..., :share], area[..., other * share :]
            for tile in split.tiles(mine, other):
                seen = split.seen(tile, mine, other)
                part = block[tile.rows, tile.q, tile.k]
                if tile.kind == CAUSAL:
                    assert tile.q == tile.k and mine == other
                    part += torch.ones(part.shape[1:], dtype=torch.int).tril()
                else:
                    part += 1 if seen is None else seen[:, 0].int()
                touched[tile.rows, tile.q, tile.k] += 1
                assert (tile.kind == PART) == (seen is not None)
        assert torch.equal(got, want.int())
        assert area.max() == 1
        if not sparing:
            continue
        grid = want.unflatten(1, (-1, chunk)).unflatten(3, (-1, chunk)).amax((2, 4))
        blank = ~grid.repeat_interleave(chunk, 1).repeat_interleave(chunk, 2)
        own = torch.zeros(SEQ, dtype=torch.bool)
        own[mine * share : (mine + 1) * share] = True
        assert not (area.bool() & blank & ~own).any()


def test_a_ring_without_documents_makes_no_mask():
    split = split_of(4)
    kinds = [[t.kind for o in range(4) for t in split.tiles(m, o)] for m in range(4)]
    assert all(sorted(k) == sorted([CAUSAL, FULL, FULL, FULL]) for k in kinds)


def dense(q, k, v, split):
    """One device, in laid order."""
    group = HEADS // KV
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seen = visible(split.tokens, split.tokens, split.window, split.causal).unsqueeze(1)
    scores = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1) @ v


def inputs(dtype=torch.float64):
    dice = torch.Generator().manual_seed(0)
    sizes = [(3, n, SEQ, DIM) for n in (HEADS, KV, KV, HEADS)]
    return [torch.randn(s, generator=dice, dtype=torch.float64).to(dtype) for s in sizes]


def on_a_rank(world, way, split, tensors, log):
    share = split.share
    comm = world.comm("cp", "cp")
    comm = log(comm) if log else comm
    regions = (Region("ring", comm, "k:ring"), Region("ring", comm, "v:ring"))
    core = SharedKeys(way(comm), regions)
    at = slice(world.rank * share, (world.rank + 1) * share)
    q, k, v, g = (t[:, :, at].clone() for t in tensors)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    batch = type("Batch", (), {"split": split})
    out = core(*leaves, batch, 0, True)
    out.backward(g)
    return [out.detach(), *(t.grad for t in leaves)]


def shared(way, split, tensors, log=None):
    with local(split.ring, 20) as ranks:
        found = ranks.run(on_a_rank, way, split, tensors, log)
    return [torch.cat(parts, 2) for parts in zip(*found, strict=True)]


@pytest.mark.parametrize("way", [Ring, Gather])
@pytest.mark.parametrize("ring", [2, 4])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_shares_make_what_one_device_makes(rule, ring, way):
    split = split_of(ring, **rule)
    q, k, v, g = inputs()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    want = dense(*leaves, split)
    want.backward(g)
    got = shared(way, split, [t.detach() for t in (q, k, v, g)])
    for a, b in zip(got, [want.detach(), *(t.grad for t in leaves)], strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_without_a_kernel_are_the_same(causal):
    q, k, v, g = inputs()
    seen = (
        None
        if causal
        else torch.rand(3, 1, SEQ, SEQ, generator=torch.Generator().manual_seed(1)) > 0.5
    )
    if seen is not None:
        seen[1, 0, 3] = False  # a query that sees nothing
    (out, lse), (out2, lse2) = attend(q, k, v, seen, causal), plain(q, k, v, seen, causal)
    assert torch.allclose(out, out2, atol=1e-13) and torch.allclose(lse, lse2, atol=1e-13)
    assert causal or bool((lse[1, :, 3] == -torch.inf).all() and (out[1, :, 3] == 0).all())
    lse = lse.clamp(min=-1e30)
    back = [f(g, (q, k, v), out, lse, seen, causal) for f in (attend_back, plain_back)]
    for a, b in zip(*back, strict=True):
        assert torch.allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("queries", [32, 160, 161])
@pytest.mark.parametrize("masked", [False, True])
def test_few_queries_of_16_bits_are_as_near_to_float64_on_either_side_of_the_gate(
    queries, masked, monkeypatch
):
    monkeypatch.setattr(tile_module, "CHUNK", 2 * 2 * queries * 8)  # two samples of three
    dice = torch.Generator().manual_seed(queries)
    q, g = (torch.randn(3, 2, queries, 8, generator=dice).bfloat16() for _ in range(2))
    k, v = (torch.randn(3, 1, queries, 8, generator=dice).bfloat16() for _ in range(2))
    seen = torch.rand(3, 1, queries, queries, generator=dice) > 0.5 if masked else None
    if seen is not None:
        seen |= torch.eye(queries, dtype=torch.bool)
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    torch.nn.functional.scaled_dot_product_attention(
        *exact, attn_mask=seen, is_causal=not masked, enable_gqa=True
    ).backward(g.double())
    out, lse = attend(q, k, v, seen, not masked)
    assert is_short(q) == (queries <= 160)
    for got, want in zip(attend_back(g, (q, k, v), out, lse, seen, not masked), exact, strict=True):
        assert want.grad is not None
        assert float((got.double() - want.grad).norm()) <= 4 * 2.0**-9 * float(want.grad.norm())


def test_a_row_that_sees_nothing_first_is_merged():
    q, k, v, _ = inputs()
    nothing = torch.zeros(1, 1, SEQ, SEQ, dtype=torch.bool)
    whole = split_of(2).tiles(0, 0)[0].__class__(slice(None), slice(0, SEQ), slice(0, SEQ), PART)
    merged = Merged(q, v.shape[-1])
    merged.add(whole, *attend(q, k, v, nothing, False))
    merged.add(whole, *attend(q, k, v, None, True))
    want, lse = attend(q, k, v, None, True)
    assert torch.equal(merged.out, want) and torch.equal(merged.lse, lse)


class Coming:
    """A handle that tells its Comm what came."""

    def __init__(self, handle, counting):
        self.handle, self.counting = handle, counting

    def wait(self):
        came = self.handle.wait()
        self.counting.came(came)
        return came


class Counting:
    """A Comm that knows how many shares of others are alive: keys alone, values go with them."""

    def __init__(self, inner):
        self.inner, self.alive, self.most = inner, [], 0
        self.rank, self.size = inner.rank, inner.size

    def send(self, x, to, *, key, site):
        return self.inner.send(x, to, key=key, site=site)

    def receive(self, like, source, *, key, site):
        handle = self.inner.receive(like, source, key=key, site=site)
        return Coming(handle, self) if key.slot == 0 else handle

    def came(self, x):
        self.alive = [r for r in self.alive if r() is not None] + [weakref.ref(x)]
        self.most = max(self.most, len(self.alive))


def test_a_ring_holds_two_shares_at_a_time():
    counts = []

    def log(comm):
        mine = Counting(comm)
        counts.append(mine)
        return mine

    split = split_of(4)
    got = shared(Ring, split, inputs(), log)
    assert torch.allclose(got[0], dense(*inputs()[:3], split), atol=1e-12)
    assert [c.most for c in counts] == [2] * 4


COMPUTE_S = 0.06  # of each share


def timed_ring(world, split, tensors, transfer_s):
    """Seconds of one forward on a rank whose shares take `transfer_s` to be handed on."""
    link = Link(latency_s=transfer_s / 2, bytes_per_s=1e12)  # k, then v
    comm = ClockedWorld(world, {"cp": link}).make(range(split.ring), axis="cp", lane="cp")
    core = SharedKeys(Ring(comm), (Region("ring", comm, "k:ring"), Region("ring", comm, "v:ring")))
    at = slice(world.rank * split.share, (world.rank + 1) * split.share)
    q, k, v, _ = (t[:, :, at].contiguous() for t in tensors)
    comm.barrier(site="start")
    start = time.perf_counter()
    core.forward(q, k, v, split)
    return time.perf_counter() - start


@pytest.mark.timed
@pytest.mark.parametrize("transfer_s", [0.03, 0.12])
def test_what_is_seen_of_a_transfer_is_what_compute_does_not_hide(transfer_s, monkeypatch):
    """n shares computed, n-1 handed on: n C + (n-1) max(0, T - C), within 10 %."""
    ring, kernel = 4, ring_module.attend

    def takes_its_time(*given):
        time.sleep(COMPUTE_S)
        return kernel(*given)

    monkeypatch.setattr(ring_module, "attend", takes_its_time)
    want = ring * COMPUTE_S + (ring - 1) * max(0.0, transfer_s - COMPUTE_S)

    def soonest():
        with local(ring, 20) as ranks:
            return [min(ranks.run(timed_ring, split_of(ring), inputs(), transfer_s))]

    best_of(soonest, want, 1.1 * want)


PLANS = (
    "cp2:ring", "cp4:ring", "cp2:ulysses", "cp4:ulysses", "cp4:hybrid2x2", "cp2:all_gather",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("context")


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.turns(2)
@pytest.mark.parametrize("family", ["llama", slow("gpt2")])
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_equals_one_device_with_documents(plan, family, folder):
    found = verify(verify_jobs.job(folder, f"{plan} fp64", family, packed=True, layers=2))
    assert found.equal, str(found)


WITH = ("tp2+sp", "dp2", "pp2/2mb", "recompute:full")


@pytest.mark.turns(4)
@pytest.mark.slow
@pytest.mark.parametrize("other", WITH)
@pytest.mark.parametrize("plan", PLANS)
def test_with_every_other_room(plan, other, folder):
    """Eight heads and 16 tokens, so that every rank has some; the families take turns."""
    turn = (PLANS.index(plan) + WITH.index(other)) % 2
    family, model = (("llama", {}), ("gpt2", {"dropout": 0.2}))[turn]
    job = verify_jobs.job(
        folder, f"{plan} {other} fp64", family, heads=8, seq=16, layers=2, **model
    )
    found = verify(job, brief=True)
    assert found.equal, str(found)


@pytest.mark.parametrize("plan", ["cp8:hybrid4x2", "cp8:hybrid2x4"])
def test_a_hybrid_wider_one_way_than_the_other(plan, folder):
    """Two kv heads on four ranks of Ulysses; a ring of four."""
    job = verify_jobs.job(folder, f"{plan} fp64", batch=2, seq=16, layers=1, packed="4x2" in plan)
    found = verify(job, brief=True)
    assert found.equal and found.traffic_equal, str(found)


@pytest.mark.parametrize(
    "plan",
    [
        "cp2:ring tp2+sp pp2/2mb",
        slow("cp4:hybrid2x2 recompute:full dp2"),
        slow("cp2:ulysses tp2+sp"),
    ],
)
def test_composed_with_dropout_and_documents(plan, folder):
    found = verify(
        verify_jobs.job(folder, f"{plan} fp64", "gpt2", packed=True, dropout=0.2, layers=2),
        brief=True,
    )
    assert found.equal, str(found)


@pytest.mark.parametrize(
    "plan", ["cp2:ring bf16", slow("cp2:ulysses bf16"), slow("cp2:all_gather fp32")]
)
def test_at_its_own_precision_and_with_a_window(plan, folder):
    found = verify(verify_jobs.job(folder, plan, sliding_window=3, layers=2), brief=True)
    assert found.equal, str(found)


@pytest.mark.parametrize(
    ("plan", "family", "model"),
    [
        ("cp2:ring tp2+sp", "gpt2", {"dropout": 0.2, "packed": True, "sliding_window": 3}),
        ("cp2:ulysses ep2", "llama", {**verify_jobs.EXPERTS, "capacity_factor": 1.0}),
        slow("tp2+sp pp2/2mb recompute:full", "llama", verify_jobs.MLA),
        slow(
            "cp2:ulysses ep2", "llama", {**verify_jobs.EXPERTS, "lora_rank": 2, "lora_dropout": 0.3}
        ),
    ],
)
def test_a_sequence_that_does_not_divide_is_filled_up(plan, family, model, folder):
    """7 tokens laid as 8: nobody sees, routes or drops the last one, which has no position of its own."""
    job = verify_jobs.job(folder, f"{plan} fp64", family, batch=2, seq=7, **{"layers": 2, **model})
    found = verify(job, brief=True)
    assert found.equal and found.traffic_equal, str(found)


@pytest.mark.slow
def test_odd_sizes(folder):
    """A ring of 3, kv heads shared over Ulysses x tp, 4 of them on 6 ranks, 12 tokens."""
    assert verify(verify_jobs.job(folder, "cp3:ring fp64", seq=12, packed=True, layers=2)).equal
    assert verify(verify_jobs.job(folder, "cp2:ulysses tp2+sp fp64", kv_heads=1, layers=2)).equal
    assert verify(verify_jobs.job(folder, "cp3:all_gather fp64", seq=9, layers=2)).equal
    more = {"heads": 12, "hidden": 48, "layers": 2}
    for plan, kv_heads in (("cp6:ulysses fp64", 4), ("cp4:hybrid2x2 tp2 fp64", 6)):
        found = verify(
            verify_jobs.job(folder, plan, packed=True, kv_heads=kv_heads, **more), brief=True
        )
        assert found.equal and found.traffic_equal, str(found)
