"""Which page of the cache belongs to whom. Bookkeeping only: the numbers themselves are in cache.py.

A page holds 64 tokens. A stream owns a list of pages; a full page may be kept under a key, and a stream that begins
with the same tokens shares it instead of computing it again. The key of a unit of 64 tokens hashes the unit before it
too, so it stands for everything from the first token on; the chain begins with the tenant's salt, so tenants never
see each other's prefixes. A page is always one of three things:

    used   someone refers to it (several, where it is shared)
    idle   nobody does, but it is kept under a key: found again, or evicted, the one unused longest first
    free   nobody does, and nobody will look for it
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from itertools import takewhile
from struct import pack

UNIT = 64  # tokens in a page, and in a unit of the prefix cache

Key = bytes


def units(tokens: int) -> int:
    """Pages that so many tokens fill or begin."""
    return -(-tokens // UNIT)


def root(salt: str) -> Key:
    """Where a tenant's chain begins; `person` keeps it apart from every unit of every chain."""
    return blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16, person=b"salt").digest()


def chained(before: Key, tokens: Sequence[int]) -> Key:
    """The key of a unit whose predecessor has key `before`."""
    assert len(tokens) == UNIT, len(tokens)
    return blake2b(before + pack(f"<{UNIT}I", *tokens), digest_size=16).digest()


class Pages:
    def __init__(self, n: int):
        self.n = n
        self._references = [0] * n
        self._free = list(range(n - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()  # longest unused first
        self._page: dict[Key, int] = {}
        self._key: dict[int, Key] = {}

    @property
    def available(self) -> int:
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        return self.n - self.available

    def owners(self, page: int) -> int:
        return self._references[page]

    def take(self, n: int) -> list[int]:
        """`n` pages for one owner; idle ones are evicted where free ones don't suffice."""
        assert n <= self.available, f"{n} pages asked, {self.available} available"
        taken = [self._free.pop() if self._free else self._evict() for _ in range(n)]
        for page in taken:
            self._references[page] = 1
        return taken

    def known(self, keys: Iterable[Key]) -> int:
        """How many of the first of `keys` have a page. Keys are read lazily."""
        return sum(1 for _ in takewhile(self._page.__contains__, keys))

    def share(self, keys: Iterable[Key]) -> list[int]:
        """The pages kept under the first of `keys`, as far as they go; one more owner each. Keys are read lazily."""
        shared = []
        for key in keys:
            page = self._page.get(key)
            if page is None:
                break
            self._references[page] += 1
            self._idle.pop(page, None)
            shared.append(page)
        return shared

    def keep(self, page: int, key: Key) -> None:
        """The page is full, whoever looks for `key` may share it. A second page of the same tokens stays private."""
        assert self._references[page] and page not in self._key, page
        if key not in self._page:
            self._page[key], self._key[page] = page, key

    def give(self, pages: Sequence[int]) -> None:
        """One owner less for each. Of pages that fall idle together the later go first: they need the earlier."""
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} has no owner"
            self._references[page] -= 1
            if not self._references[page]:
                if page in self._key:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def forget(self, pages: Iterable[int] | None = None) -> None:
        """Nobody shall find these pages again (None: any page); whoever owns them keeps them."""
        for page in list(self._key if pages is None else pages):
            key = self._key.pop(page, None)
            if key is not None:
                del self._page[key]
                if page in self._idle:
                    del self._idle[page]
                    self._free.append(page)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page[self._key.pop(page)]
        return page

    def check(self, owners: Iterable[Sequence[int]]) -> None:
        """Every page is in exactly one state, and owned as often as `owners` (their lists of pages) say."""
        expected = [0] * self.n
        for pages in owners:
            assert len(set(pages)) == len(pages), f"an owner holds a page twice: {pages}"
            for page in pages:
                expected[page] += 1
        assert expected == self._references, f"owners {expected}, references {self._references}"
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free), "a page is free twice"
        assert not free & idle, free & idle
        assert {page for page in range(self.n) if not self._references[page]} == free | idle
        assert {page: key for key, page in self._page.items()} == self._key, "keys and pages disagree"
        assert idle <= self._key.keys() and not free & self._key.keys()
