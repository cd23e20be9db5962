"""Continuous batching over a model whose next token is a digest of all before it, and pages that hold it."""

from __future__ import annotations

from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partita.serve.drafts import Lookup
from partita.serve.pages import PagePool, key_of
from partita.serve.scheduler import Scheduler, Seq, no_draft

VOCAB = 3  # few, so that texts repeat and drafts hit


def said(tokens) -> bytes:
    """What a cache holds at the last of these tokens: it knows all of them."""
    return blake2b(bytes(tokens), digest_size=8).digest()


def follows(tokens) -> int:
    return said(tokens)[0] % VOCAB


def written(prompt: list[int], most: int) -> list[int]:
    """The answer of one that is alone."""
    tokens = list(prompt)
    while len(tokens) < most:
        tokens.append(follows(tokens))
    return tokens


class World:
    """A scheduler and the memory that its pages are."""

    def __init__(
        self, pages: int, page_size: int, budget: int, most: int, drafts: bool, depth: int = 1
    ) -> None:
        self.pool = PagePool(pages, page_size)
        self.scheduler = Scheduler(self.pool, budget, most, depth)
        self.under_way: list = []  # steps: memory has what they write, nobody knows what they say
        self.cells: list[list[bytes | None]] = [[None] * page_size for _ in range(pages)]
        self.lookups: dict[Seq, Lookup] = {}
        self.drafts = self.draft if drafts else no_draft
        self.live: list[Seq] = []
        self.ended: list[Seq] = []
        self.accepted = 0

    def add(self, seq: Seq) -> None:
        self.live.append(seq)
        self.lookups[seq] = Lookup()
        self.scheduler.add(seq)

    def end(self, seq: Seq) -> None:
        self.live.remove(seq)
        self.ended.append(seq)
        self.scheduler.finish(seq)

    def draft(self, seq: Seq, most: int):
        return self.lookups[seq].draft(seq.tokens, min(most, 3))

    def step(self) -> None:
        while len(self.under_way) < self.scheduler.depth and (shares := self.started()):
            self.under_way.append(shares)
        for share in self.under_way.pop(0) if self.under_way else ():
            if self.scheduler.counts(share):
                self.follow(share)

    def started(self) -> list:
        """A step that is handed out."""
        shares = self.scheduler.plan(self.drafts)
        s, pool, size = self.scheduler, self.pool, self.pool.page_size
        pool.check()
        running = [q.order for q in s.running]
        assert running == sorted(running) and len(running) <= s.max_sequences
        assert all(r < w.order for r in running[-1:] for w in s.waiting), "somebody overtook"
        assert self.under_way or bool(shares) == bool(self.live), (
            "nothing runs, or nothing is there"
        )
        flying = [s.seq for step in self.under_way for s in step if self.scheduler.counts(s)]
        assert not {share.seq for share in shares} & set(flying)
        assert sum(share.count for share in shares) <= s.max_batch_tokens
        assert len({share.seq for share in shares}) == len(shares)
        held = [p for q in s.running for p in set(q.pages)]
        assert pool.pages - pool.free == len(set(held))
        for share in shares:
            seq = share.seq
            tokens = seq.tokens[: share.start] + list(share.tokens)
            assert len(share.tokens) == share.count > 0 and len(tokens) < seq.most
            for place in range(share.start):
                assert self.cells[seq.pages[place // size]][place % size] == said(
                    tokens[: place + 1]
                )
            for place in range(share.start, len(tokens)):
                page = seq.pages[place // size]
                assert not pool.sealed(page) and held.count(page) == 1, "a shared page is written"
                self.cells[page][place % size] = said(tokens[: place + 1])
        return shares

    def follow(self, share) -> None:
        seq = share.seq
        for guess in (*share.draft, None) if share.chooses else ():
            seq.tokens.append(follows(seq.tokens))
            if len(seq.tokens) == seq.most or seq.tokens[-1] != guess:
                break
            self.accepted += 1
        self.scheduler.commit(share)
        if len(seq.tokens) == seq.most:
            self.end(seq)


requests = st.tuples(
    st.integers(0, 6),  # steps before it comes
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=20),
    st.integers(1, 12),  # tokens to choose
    st.integers(1, 3),  # choices
    st.one_of(st.none(), st.integers(0, 8)),  # steps until it is cancelled
)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(requests, min_size=1, max_size=8),
    st.integers(1, 4),
    st.integers(0, 10),
    st.integers(1, 5),
    st.integers(0, 12),
    st.booleans(),
    st.integers(1, 3),
)
def test_every_request_ends_once_and_gives_its_pages_back(
    asked, page_size, spare, most, extra, drafts, depth
):
    """Arrivals, lengths, cancels, choices, few pages, small steps: all at random."""
    longest = max(len(prompt) + new for _, prompt, new, _, _ in asked)
    world = World(-(-longest // page_size) + spare, page_size, most + extra, most, drafts, depth)
    cancels: dict[int, list[Seq]] = {}
    step, all_of, expected = 0, [], {}
    for number, (later, prompt, new, choices, cancelled) in enumerate(asked):
        for _ in range(later):
            step = stepped(world, cancels, step)
        leader = None
        for index in range(choices):
            size = len(prompt)
            seq = Seq((number, index), list(prompt), size, size + new, leader=leader)
            leader = leader or seq
            world.add(seq)
            all_of.append(seq)
            expected[seq] = written(prompt, size + new)
            if cancelled is not None:
                cancels.setdefault(step + cancelled, []).append(seq)
    while world.live:
        step = stepped(world, cancels, step)
        assert step < 5000
    assert sorted(q.order for q in world.ended) == [q.order for q in all_of]
    for seq in all_of:
        assert seq.tokens == expected[seq][: len(seq.tokens)]
    assert world.pool.free == world.pool.pages and not world.scheduler.waiting


def stepped(world: World, cancels: dict[int, list[Seq]], step: int) -> int:
    for seq in cancels.pop(step, ()):
        if seq in world.live:
            world.end(seq)
    world.step()
    return step + 1


def alone(prompt: list[int], most: int, number: int = 0) -> Seq:
    return Seq((number, 0), list(prompt), len(prompt), most)


def test_a_short_prompt_is_not_kept_waiting_by_a_long_one():
    world = World(pages=100, page_size=4, budget=16, most=4, drafts=False)
    long, short = alone([1] * 200, 201), alone([2] * 6, 8, number=1)
    world.add(long)
    world.step()
    world.add(short)
    world.step()
    assert len(short.tokens) == 7 and long.computed == 16 + 10
    world.step()
    assert short in world.ended and long.computed == 26 + 15


def test_the_last_to_come_is_preempted_and_first_back():
    world = World(pages=6, page_size=2, budget=8, most=3, drafts=False)
    first, second, third = (alone([i] * 3, 3 + n, i) for i, n in ((0, 8), (1, 8), (2, 1)))
    for seq in (first, second, third):
        world.add(seq)
    while world.live:
        world.step()
        if first not in world.ended:
            assert first in world.scheduler.running  # the first is never the one to give way
    assert world.scheduler.preemptions > 0 and world.ended[0] is first
    assert all(q.tokens == written(q.tokens[:3], q.most) for q in world.ended)


def test_stages_have_a_step_each():
    world = World(pages=40, page_size=4, budget=64, most=4, drafts=False, depth=2)
    for i in range(4):
        world.add(alone([i % VOCAB] * 3, 12, number=i))
    for _ in range(4):
        world.step()
    first, second = world.scheduler.plan(), world.under_way[0]
    assert len(first) == len(second) == 2 and not world.scheduler.plan()
    assert {s.seq for s in first}.isdisjoint(s.seq for s in second)


def test_what_begins_alike_is_computed_once():
    world = World(pages=40, page_size=4, budget=64, most=4, drafts=False)
    prompt = [0, 1, 2, 0, 1] * 4
    leader = alone(prompt, 23)
    world.add(leader)
    for index in (1, 2):
        world.add(Seq((0, index), list(prompt), 20, 23, leader=leader))
    world.step()
    assert [q.order for q in world.scheduler.running] == [(0, 0)]
    world.step()
    assert world.scheduler.hits == 2 * 16 and world.pool.free == 40 - 4 - (2 + 1 + 1)
    while world.live:
        world.step()
    again = alone([*prompt[:8], 2, 2], 12, number=1)
    world.add(again)
    world.step()
    assert again.cached == 8


def test_pages_are_given_away_by_how_long_nobody_used_them():
    pool = PagePool(3, 2)
    keys = [key_of(b"", [i, i]) for i in range(3)]
    for key in keys[:2]:
        (page,) = pool.allocate(1) or ()
        pool.seal(page, key)
        pool.release([page])
    assert pool.free == 3 and pool.allocate(4) is None
    pool.take(pool.lookup(keys[:1]))  # used again: the second is now the oldest
    pool.release(pool.lookup(keys[:1]))
    pool.allocate(2)  # the one that holds nothing, and the oldest
    assert pool.lookup(keys[1:2]) == [] and len(pool.lookup(keys[:2])) == 1
    pool.check()


def test_a_key_stands_for_everything_before_it():
    assert key_of(key_of(b"", [1, 2]), [3, 4]) != key_of(key_of(b"", [2, 2]), [3, 4])


@pytest.mark.parametrize(
    "tokens, most, guessed",
    [
        ([1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),
        ([1, 2, 9, 5, 1, 2], 9, [9, 5, 1, 2]),
        ([1, 2, 3], 4, []),
        ([7, 7, 7, 7], 3, [7]),
    ],
)
def test_what_followed_before_is_guessed(tokens, most, guessed):
    lookup = Lookup()
    for size in range(1, len(tokens)):
        lookup.draft(tokens[:size], most)
    assert lookup.draft(tokens, most) == guessed
