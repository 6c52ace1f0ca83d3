"""Who goes next: in order, within the budget, and always to the end, however small the cache."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.engine.gather import silent
from shoal.engine.pages import UNIT, Key, Pages
from shoal.engine.request import Request
from shoal.engine.scheduler import Scheduler, Work
from shoal.engine.stream import Draft, Stream


class Fake:
    """Streams without a model: tokens appear, drafts are right by chance."""

    def __init__(self, n_pages: int, budget: int, lookahead: int = 0, seed: int = 0, stores: bool = False):
        self.pages, self.budget, self.stores = Pages(n_pages), budget, stores
        self.disk: set[Key] = set()
        self.scheduler = Scheduler(self.pages, budget, lookahead, self.disk.__contains__)
        self.rng, self.arrivals, self.lookahead = random.Random(seed), 0, lookahead
        self.finished: list[Stream] = []

    def add(self, n: int, max_tokens: int, priority: int = 0, text: int = 0) -> Stream:
        request = Request((text,) * n, max_tokens, silent, priority=priority)
        stream = Stream(request, self.arrivals, 0)
        self.arrivals += 1
        self.scheduler.add(stream)
        return stream

    def load(self) -> bool:
        """One page of whoever waits for one."""
        for s in self.scheduler.running:
            if self.scheduler.loads(s):
                self.pages.keep(s.pages[s.kept], s.key(s.kept))
                s.load()
                return True
        return False

    def step(self) -> list[Work]:
        work = self.scheduler.schedule()
        assert sum(len(w.tokens) for w in work) <= self.budget
        assert [len(w.tokens) for w in work] == sorted(len(w.tokens) for w in work)
        assert len({id(w.stream) for w in work}) == len(work)
        for w in work:
            assert w.stream in self.scheduler.running and w.start == w.stream.computed
            assert (w.start + len(w.tokens)) <= len(w.stream.pages) * UNIT
            self._advance(w)
        self.scheduler.check()
        return work

    def _advance(self, w: Work) -> None:
        s = w.stream
        right = 0
        while right < len(s.drafts) and self.rng.random() < 0.6:
            right += 1
        new = [*w.tokens[1 : 1 + right], self.rng.randrange(3)] if w.draws else []
        s.computed = w.start + (len(new) if s.drafts else len(w.tokens))
        s.drafts = []
        for token in new:
            if s.accept(token):
                self.scheduler.remove(s)
                self.finished.append(s)
                return
        while (s.kept + 1) * UNIT <= s.computed:
            self.pages.keep(s.pages[s.kept], s.key(s.kept))
            if self.stores:
                self.disk.add(s.key(s.kept))
            s.kept += 1
        if s.decoding:
            room = min(self.lookahead, s.limit - len(s.tokens) - 1)
            s.drafts = [Draft(0)] * self.rng.randint(0, max(0, room))

    def run(self, most: int = 5000) -> int:
        steps = 0
        while self.scheduler.running or self.scheduler.waiting:
            assert self.load() or self.step() or self.load(), "nothing to do, yet not done"
            steps += 1
            assert steps < most, "no end in sight"
        assert self.pages.used == 0
        return steps


def test_prompts_come_in_chunks_behind_the_decoding():
    fake = Fake(16, budget=20)
    a, b = fake.add(5, 9), fake.add(50, 3)
    assert [(w.stream, len(w.tokens), w.draws) for w in fake.step()] == [(a, 5, 1), (b, 15, 0)]
    assert [(w.stream, len(w.tokens), w.draws) for w in fake.step()] == [(a, 1, 1), (b, 19, 0)]
    assert [(w.stream, len(w.tokens), w.draws) for w in fake.step()] == [(a, 1, 1), (b, 16, 1)]
    fake.run()


def test_priority_then_arrival():
    fake = Fake(2, budget=64)
    late, early = fake.add(60, 60, priority=1, text=1), fake.add(60, 60, text=2)
    third = fake.add(60, 60, text=0)
    assert [fake.scheduler.position(s) for s in (early, third, late)] == [0, 1, 2]
    fake.run()
    assert fake.finished == [early, third, late]


def test_a_low_priority_makes_room():
    fake = Fake(3, budget=64)
    low = fake.add(60, 90, priority=5)
    fake.step()
    high = fake.add(100, 90, text=1)
    work = fake.step()
    assert [w.stream for w in work] == [high] and fake.scheduler.waiting == [low] and not low.pages
    fake.run()
    assert fake.finished == [high, low]


def test_a_prompt_of_low_priority_lets_others_pass():
    fake = Fake(32, budget=64)
    low = fake.add(600, 3, priority=5)
    fake.step()
    high = fake.add(100, 3, text=1)
    assert [(w.stream, len(w.tokens)) for w in fake.step()] == [(high, 64)]
    assert [(w.stream, len(w.tokens)) for w in fake.step()] == [(low, 28), (high, 36)]
    fake.run()


def test_nobody_waits_for_a_prefix_that_a_later_one_computes():
    fake = Fake(32, budget=64)
    fake.add(600, 3, priority=5)
    fake.step()
    fake.add(300, 3, priority=1, text=1)
    high = fake.add(600, 3)
    assert [w.stream for w in fake.step()] == [high]
    fake.run()


def test_the_last_gives_its_pages_and_finds_most_of_them_again():
    fake = Fake(5, budget=512)
    first, last = fake.add(120, 100), fake.add(120, 100, text=1)
    while not fake.scheduler.preemptions:
        fake.step()
    assert not last.pages and first.pages
    fake.run()
    assert fake.finished == [first, last] and len(last.tokens) == 220


def test_a_shared_prefix_is_computed_once():
    fake = Fake(16, budget=512)
    fake.add(200, 5)
    fake.run()
    again = fake.add(200, 5)
    (work,) = fake.step()
    assert (work.start, len(work.tokens), again.cached) == (192, 8, 192)
    whole = fake.add(192, 5)  # its last token must be computed
    assert [w.start for w in fake.step() if w.stream is whole] == [128]


def test_what_is_on_the_disk_is_not_computed_and_nobody_waits_for_it():
    fake = Fake(8, budget=64, stores=True)
    fake.add(200, 5)
    fake.run()
    fake.pages.forget()
    again, other = fake.add(200, 5), fake.add(10, 50, text=1)
    assert [(w.stream, len(w.tokens)) for w in fake.step()] == [(other, 10)] and again.pages
    for _ in range(3):
        assert fake.load() and fake.step()[0].stream is other
    assert again.cached == 192 and again.decoding
    fake.run()


def test_answers_to_one_prompt_compute_it_once():
    fake, computed = Fake(32, budget=128), 0
    same = [fake.add(200, 20) for _ in range(5)]
    other = fake.add(100, 20, text=1)
    while fake.scheduler.running or fake.scheduler.waiting:
        work = fake.step()
        computed += sum(len(w.tokens) for w in work if not w.draws or len(w.tokens) > 1)
        if computed == 128:
            assert fake.scheduler.running == [same[0]]
    assert computed == 200 + 4 * 8 + 100 and [s.cached for s in same] == [0, 192, 192, 192, 192]
    assert other in fake.finished


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.integers(3, 8), st.sampled_from([1, 2, 7, 64, 200]), st.integers(0, 3), st.booleans())
def test_any_mix_comes_to_its_end(seed: int, n_pages: int, budget: int, lookahead: int, stores: bool):
    fake, rng = Fake(n_pages, budget, lookahead, seed, stores), random.Random(seed)
    for _ in range(12):
        n = rng.randint(1, n_pages * UNIT - 1)
        most = min(60, n_pages * UNIT - n)
        fake.add(n, rng.randint(1, most), rng.randint(0, 2), rng.randint(0, 2))
        for _ in range(rng.randint(0, 6)):
            fake.load()
            fake.step()
        if rng.random() < 0.2 and fake.scheduler.running:
            fake.scheduler.remove(rng.choice(fake.scheduler.running))
    fake.run(20000)
    assert all(len(s.tokens) == s.limit for s in fake.finished)
