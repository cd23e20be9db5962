"""Which page of the cache of keys and values belongs to whom.

A page holds `page_size` positions of a sequence. A page whose positions are all computed is *sealed* under a
key: the digest of its tokens and of the page before it, so a key stands for everything up to there. A
sequence that begins with the same tokens takes sealed pages instead of computing them; several may hold
one, and nobody writes to it. A page that nobody holds is free; one that is sealed can still be taken by its
key until it is given to somebody else, the longest unused first.

    free                   held
    unsealed   allocate    by one, written
    sealed     take        by any number, only read         release: free again, behind all others
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b


def key_of(before: bytes, tokens: Sequence[int]) -> bytes:
    """The key of a full page: `before` is that of the page before it, b"" for the first."""
    return blake2b(before + array("q", tokens).tobytes(), digest_size=16).digest()


class PagePool:
    """Pages 0 to `pages` - 1, all free at first."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.pages, self.page_size = pages, page_size
        self._holders = [0] * pages
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(
            range(pages)
        )  # the first is given away
        self._page: dict[bytes, int] = {}
        self._key: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Pages that hold `tokens` positions."""
        return -(-tokens // self.page_size)

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """The sealed pages of the first keys, up to the first that is not here. Takes none."""
        found = []
        for key in keys:
            page = self._page.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def take(self, pages: Sequence[int]) -> None:
        """Holds pages that `lookup` found, just now."""
        for page in pages:
            self._free.pop(page, None)
            self._holders[page] += 1

    def unheld(self, pages: Iterable[int]) -> int:
        """How many of the pages `take` would take from the free."""
        return sum(not self._holders[page] for page in pages)

    def allocate(self, count: int) -> list[int] | None:
        """Pages to be written, each held once; None, and nothing changed, where fewer are free."""
        if count > len(self._free):
            return None
        found = [self._free.popitem(last=False)[0] for _ in range(count)]
        for page in found:
            self._holders[page] = 1
            self._forget(page)
        return found

    def seal(self, page: int, key: bytes) -> None:
        """All positions of a held page are computed: others may take it. A key that is known keeps its
        page."""
        assert self._holders[page] > 0
        if key not in self._page and page not in self._key:
            self._page[key], self._key[page] = page, key

    def sealed(self, page: int) -> bool:
        """Whether others may read it."""
        return page in self._key

    def release(self, pages: Sequence[int]) -> None:
        """Holds them no more. The last page goes first: what begins a sequence is kept longest."""
        for page in reversed(pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            self._free[page] = None
            if page not in self._key:
                self._free.move_to_end(page, last=False)

    def check(self) -> None:
        """Asserts that free and held are apart and that keys and pages agree."""
        assert all(n >= 0 for n in self._holders)
        assert set(self._free) == {p for p, n in enumerate(self._holders) if not n}
        assert {page: key for key, page in self._page.items()} == self._key

    def _forget(self, page: int) -> None:
        key = self._key.pop(page, None)
        if key is not None:
            del self._page[key]
