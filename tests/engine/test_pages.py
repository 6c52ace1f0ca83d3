"""Books of the cache: every page in one state, shared by equal prefixes only, evicted the longest unused first."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.pages import UNIT, Key, Pages, chained, root, units


def keys(tokens: list[int], salt: str = "") -> list[Key]:
    chain = [root(salt)]
    for start in range(0, len(tokens) - UNIT + 1, UNIT):
        chain.append(chained(chain[-1], tokens[start : start + UNIT]))
    return chain[1:]


def kept(pages: Pages, chain: list[Key]) -> list[int]:
    taken = pages.take(len(chain))
    for page, key in zip(taken, chain):
        pages.keep(page, key)
    return taken


def test_no_salt_begins_where_another_chain_goes_on():
    before, tokens = b"a" * 16, [i * 0x01010101 for i in range(UNIT)]  # all of it UTF-8
    salt = (before + b"".join(token.to_bytes(4, "little") for token in tokens)).decode()
    assert root(salt) != chained(before, tokens)


def test_a_key_stands_for_all_tokens_before_it_and_the_salt():
    a, b = list(range(192)), [7, *range(1, 192)]
    assert keys(a) == keys(list(a)) and len(set(keys(a))) == 3
    assert not set(keys(a)) & set(keys(b))  # they differ in the first token only
    assert not set(keys(a)) & set(keys(a, "another tenant"))
    assert keys(a)[:2] == keys(a[:128] + [5] * 64)[:2]
    assert [units(n) for n in (0, 1, 64, 65)] == [0, 1, 1, 2]


def test_a_prefix_is_found_as_far_as_it_goes():
    pages, chain = Pages(8), keys(list(range(256)))
    first = kept(pages, chain[:3])
    assert pages.known(chain) == 3 and pages.known([b"unknown", *chain]) == 0
    assert pages.share(chain) == first  # while in use
    pages.give(first)
    pages.give(first)
    assert pages.used == 0 and pages.available == 8
    assert pages.share([chain[0], b"unknown", chain[1]]) == first[:1]
    pages.check([first[:1]])


def test_keys_are_read_no_further_than_needed():
    pages, chain = Pages(4), keys(list(range(128)))
    pages.give(kept(pages, chain[:1]))
    read = []
    pages.share(read.append(key) or key for key in [*chain, b"never"])
    assert read == chain


def test_the_longest_unused_goes_first_and_ends_before_beginnings():
    pages, a, b = Pages(4), keys(list(range(128))), keys(list(range(1000, 1128)))
    first, second = kept(pages, a), kept(pages, b)
    pages.give(first)
    pages.give(second)
    pages.give(pages.share(a))  # used again
    assert pages.take(1) == second[1:]
    assert pages.share(b) == second[:1]
    assert sorted(pages.take(2)) == sorted(first) and pages.available == 0


def test_a_second_page_of_the_same_tokens_stays_private():
    pages, chain = Pages(4), keys(list(range(64)))
    first, second = kept(pages, chain), kept(pages, chain)
    pages.give(second)
    assert pages.share(chain) == first
    pages.check([first, first])


def test_what_is_forgotten_is_not_found_but_stays_with_its_owner():
    pages, a, b = Pages(4), keys(list(range(64))), keys(list(range(1, 65)))
    mine, other = kept(pages, a), kept(pages, b)
    pages.give(other)
    pages.forget(mine)
    assert pages.share(a) == [] and pages.share(b) == other
    pages.give(other)
    pages.forget()
    assert pages.share(b) == []
    pages.check([mine])


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_any_walk_keeps_the_books_right(seed: int, n: int):
    rng, pages, owners = random.Random(seed), Pages(n), []
    texts = [keys([text] * 64 * 4) for text in range(3)]
    for _ in range(60):
        move = rng.choice(["admit", "give", "forget", "take"])
        if move == "admit":
            chain = rng.choice(texts)[: rng.randint(1, 4)]
            shared = pages.share(chain)
            if len(chain) - len(shared) <= pages.available:
                new = pages.take(len(chain) - len(shared))
                for page, key in zip(new, chain[len(shared) :]):
                    if rng.random() < 0.8:
                        pages.keep(page, key)
                owners.append(shared + new)
            else:
                pages.give(shared)
        elif move == "give" and owners:
            pages.give(owners.pop(rng.randrange(len(owners))))
        elif move == "forget":
            pages.forget(rng.sample(range(n), rng.randint(0, n)) if rng.random() < 0.8 else None)
        elif move == "take" and pages.available:
            owners.append(pages.take(rng.randint(0, pages.available)))
        pages.check(owners)
    for pages_of_one in owners:
        pages.give(pages_of_one)
    pages.check([])
    assert pages.used == 0


def test_the_check_sees_what_is_wrong():
    pages = Pages(4)
    mine = kept(pages, keys(list(range(64))))
    with pytest.raises(AssertionError, match="references"):
        pages.check([])
    pages._free.append(mine[0])
    with pytest.raises(AssertionError):
        pages.check([mine])
    with pytest.raises(AssertionError):
        Pages(2).give([0])
