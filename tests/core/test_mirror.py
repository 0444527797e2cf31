"""The mirror against a provider whose bucket is known, by its rules."""

from __future__ import annotations

import heapq
import math
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core import headers
from proxy.core.headers import Kind, Reading
from proxy.core.journal import Journal, features
from proxy.core.mirror import PACED_SECONDS, Mirror

CALL = features(500.0, None)


def reading(limit, remaining, window=60.0, kind=Kind.REQUESTS):
    return Reading(kind, limit, remaining, None, window, kind.value)


class House:
    """A source that always has more, and a provider that tells OpenAI's headers; answers come after 0.3 to 4 s and
    calls overtake each other by up to 20 ms."""

    def __init__(self, limit, *, burst=None, tokens=False, seed=0, others=0.0):
        self.random, self.journal, self.now = Random(seed), Journal(), 1_000.0
        self.limit, self.burst, self.tokens, self.others = limit, burst or limit, tokens, others
        self.level, self.at = float(self.burst), self.now
        self.mirror: Mirror | None = None
        self.events: list = []
        self.sent = self.refused = 0
        self.taken = 0.0

    def run(self, seconds):
        end = self.now + seconds
        self.push(self.now, "send")
        while self.events and self.events[0][0] <= end:
            self.now, _, what, *more = heapq.heappop(self.events)
            getattr(self, what)(*more)
        self.events = [event for event in self.events if event[2] != "send"]
        self.now = end

    def push(self, at, *what):
        heapq.heappush(self.events, (at, self.random.random(), *what))

    def send(self):
        x = features(self.random.uniform(100, 1_000), None) if self.tokens else CALL
        if self.mirror is not None:
            wait = self.mirror.wait(x, self.now)
            assert 0.0 <= wait < math.inf
            if wait > 0.0:
                return self.push(self.now + wait, "send")
            self.mirror.take(x, self.now)
        mark = self.journal.write(x, self.now)
        self.sent += 1
        self.push(self.now + self.random.uniform(0.01, 0.03), "arrive", mark)
        return self.push(self.now + (0.0 if self.mirror else 1.0), "send")

    def arrive(self, mark):
        passed, self.at = self.now - self.at, self.now
        self.level = min(self.burst, self.level + passed * self.limit / 60)
        for _ in range(10):
            if self.random.random() < self.others * passed / 10:
                self.level -= 1
        cost = mark.features[0] * 1_000 * 1.2 if self.tokens else 1.0
        refused = self.level < cost
        if not refused:
            self.level -= cost
            self.taken += cost
        remaining = math.floor(self.level)
        reset = f"{round((self.burst - remaining) / self.limit * 60 * 1_000)}ms"
        name = "tokens" if self.tokens else "requests"
        said = {
            f"x-ratelimit-limit-{name}": str(int(self.burst)),
            f"x-ratelimit-remaining-{name}": str(max(0, remaining)),
            f"x-ratelimit-reset-{name}": reset,
        }
        delay = 0.02 if refused else self.random.uniform(0.3, 4.0)
        self.push(self.now + delay, "told", mark, headers.readings(said, 0.0)[0], refused, (cost - self.level))

    def told(self, mark, said, refused, lacking):
        if self.mirror is None:
            self.mirror = Mirror(said, mark, self.journal, self.now)
            return
        self.mirror.read(said, mark, self.now, refused=refused)
        if refused:
            self.refused += 1
            assert self.mirror.explains(mark, said.remaining, self.now)
            hold = lacking / self.limit * 60
            self.mirror.refused(mark, said.remaining, hold, True, self.now)


@pytest.mark.parametrize(("limit", "burst"), [(60, None), (500, None), (500, 50), (3_000, None)])
def test_the_whole_limit_is_used_and_nothing_is_refused(limit, burst):
    house = House(limit, burst=burst)
    house.run(10.0)
    before = house.taken
    house.run(120.0)
    assert house.taken - before >= 0.99 * limit * 2 - 2
    assert house.refused == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_charge_that_is_not_what_it_was_taken_for_is_found_out(seed):
    house = House(300_000, tokens=True, seed=seed)
    house.run(300.0)
    assert house.taken >= 0.97 * (300_000 * 6)
    assert house.refused <= 20  # all of them before the charge is known


def test_a_smaller_bucket_than_the_limit_is_not_overrun():  # rule 1
    journal = Journal()
    marks = [journal.write(CALL, 0.0) for _ in range(8)]
    mirror = Mirror(reading(500.0, 49.0), marks[0], journal, 1.0)
    assert mirror.level(1e6) <= 50.0


def test_a_bucket_found_larger_is_believed():  # rule 1
    journal = Journal()
    mirror = Mirror(reading(500.0, 49.0), journal.write(CALL, 0.0), journal, 1.0)
    mirror.take(CALL, 30.0)
    mirror.read(reading(500.0, 290.0), journal.write(CALL, 30.0), 31.0)
    assert mirror.burst == 291.0


def test_what_others_take_is_learned():  # rule 2
    house = House(600, others=4.0)
    house.run(300.0)
    before, refused = house.sent, house.refused
    house.run(300.0)
    assert house.sent - before == pytest.approx(6.0 * 300, rel=0.05)
    assert house.refused - refused <= 0.02 * 1_800  # nobody waits out a refusal here


def test_calls_sent_at_once_tell_little_of_the_level():  # rule 3
    journal = Journal()
    mirror = Mirror(reading(1_000.0, 1_000.0), journal.write(CALL, 0.0), journal, 0.0)
    marks = []
    for _ in range(400):
        mirror.take(CALL, 1.0)
        marks.append(journal.write(CALL, 1.0))
    mirror.take(CALL, 2.0)
    journal.write(CALL, 2.0)
    level = mirror.level(2.0)
    mirror.read(reading(1_000.0, 995.0), marks[399], 2.0)  # it was among the first to arrive
    assert mirror.level(2.0) - level < 100
    mirror.read(reading(1_000.0, 601.0), marks[3], 2.1)  # and this one among the last
    assert abs(mirror.level(2.1) - level) < 100


def test_the_margin_shrinks_as_calls_are_answered():  # rule 4
    journal = Journal()
    mirror = Mirror(reading(100_000.0, 100_000.0, kind=Kind.TOKENS), journal.write(CALL, 0.0), journal, 0.0)
    marks = []
    for number in range(50):
        mirror.take(CALL, number / 5)
        marks.append(journal.write(CALL, number / 5))
    unsure = mirror._reckon_margin(10.0)
    for number, mark in enumerate(marks):
        left = 100_000 - 500 * (number + 1) + 1_666.7 * number / 5
        mirror.read(reading(100_000.0, min(100_000.0, left), kind=Kind.TOKENS), mark, 10.0)
    assert mirror._reckon_margin(10.0) < unsure


def test_a_full_bucket_of_tokens_is_not_drained_in_one_instant():  # rule 5
    journal = Journal()
    mirror = Mirror(reading(1e6, 1e6, kind=Kind.TOKENS), journal.write(CALL, 0.0), journal, 0.0)
    for number in range(200):  # until it knows what a call is charged
        mirror.take(CALL, number / 1_000)
        left = 900_000.0 - 500.0 * number + 16.67 * number
        mirror.read(reading(1e6, left, kind=Kind.TOKENS), journal.write(CALL, number / 1_000), 0.5)
    at_once = 0
    while mirror.wait(CALL, 1.0) == 0.0:
        mirror.take(CALL, 1.0)
        journal.write(CALL, 1.0)
        at_once += 1
    assert 8 <= at_once <= 100
    assert mirror.wait(CALL, 1.0) < 0.1


def test_a_full_bucket_is_drained_beside_what_flows_back():  # rule 5
    small, journal = features(20.0, None), Journal()
    mirror = Mirror(reading(10_100.0, 10_100.0, 10.0, Kind.TOKENS), journal.write(small, 0.0), journal, 0.0)
    for number in range(1, 400):  # what flows back, until it knows what a call is charged
        at = 20.0 / 1_010.0 * number
        mirror.take(small, at)
        mirror.read(reading(10_100.0, 9_700.0, 10.0, Kind.TOKENS), journal.write(small, at), at)
    now = began = 10.0
    sent = 0.0
    while now < began + 5.0:
        if (wait := mirror.wait(small, now)) > 0.0:
            now += wait
            continue
        mirror.take(small, now)
        journal.write(small, now)
        sent += 20.0
    assert sent >= 1_010.0 * 5.0 + 0.6 * 10_100.0


def test_after_a_refusal_calls_leave_one_by_one_at_the_limits_pace():  # rule 6
    journal = Journal()
    mirror = Mirror(reading(600.0, 600.0), journal.write(CALL, 0.0), journal, 0.0)
    for number in range(600):
        mirror.take(CALL, number / 10)
        mark = journal.write(CALL, number / 10)
    mirror.refused(mark, 0.0, 20.0, True, 60.0)
    now, times = 80.0, []
    while now < 80.0 + PACED_SECONDS - 1.0:
        if (wait := mirror.wait(CALL, now)) > 0.0:
            now += wait
            continue
        mirror.take(CALL, now)
        journal.write(CALL, now)
        times.append(now)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert min(gaps) >= 0.1 - 1e-6


def test_the_window_follows_the_law_of_the_header_and_no_single_oddity():
    journal = Journal()
    mirror = Mirror(reading(50.0, 49.0, window=6.0), journal.write(CALL, 0.0), journal, 0.0)
    assert mirror.window == 60.0  # an odd window, told once
    mirror.read(reading(50.0, 40.0, window=6.0), journal.write(CALL, 0.1), 0.2)
    assert mirror.window == 60.0
    mirror.read(reading(50.0, 30.0, window=6.0), journal.write(CALL, 0.2), 0.3)
    assert mirror.window == 6.0
    for number in range(20):  # always the same words: no law, whoever repeats them
        mirror.read(reading(50.0, 0.0, window=0.01), journal.write(CALL, 1.0 + number), 1.0 + number)
    assert mirror.window == 6.0


AMOUNTS = st.sampled_from([None, 0.0, 1.0, 50.0, 1e4, 1e15]) | st.floats(0, 1e5)


@settings(deadline=None)
@given(
    st.floats(0, 1e15),
    AMOUNTS,
    st.sampled_from(list(Kind)),
    st.lists(
        st.tuples(st.floats(0, 100), AMOUNTS, AMOUNTS, st.sampled_from([None, 0.01, 60.0, 86_400.0]), st.booleans()),
        max_size=40,
    ),
)
def test_after_any_headers_it_stays_finite(limit, remaining, kind, history):
    journal, now = Journal(), 0.0
    mirror = Mirror(Reading(kind, limit, remaining, None, 60.0, "x"), journal.write(CALL, now), journal, now)
    for gap, limit_told, left, window, refused in history:
        now += gap
        assert 0.0 <= mirror.wait(CALL, now) < math.inf
        mirror.take(CALL, now)
        mark = journal.write(CALL, now)
        mirror.read(Reading(kind, limit_told, left, None, window, "x"), mark, now, refused=refused)
        if refused:
            mirror.refused(mark, left, 1.0, mirror.explains(mark, left, now), now)
        assert math.isfinite(mirror.level(now))
        assert mirror.level(now) <= mirror.burst
