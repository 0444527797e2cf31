"""Fixed windows, learned from refusals alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core.journal import Journal, features
from proxy.core.silent import Silent
from proxy.core.window import Window, fitting

CALL = features(0.0, None)


class House:
    """A source that always has more, and a provider with a quota for each window. Calls take 20 ms to get there."""

    WAY = 0.02

    def __init__(self, seconds, quota, *, phase=0.0):
        self.journal, self.now = Journal(), 1_000.0
        self.silent = Silent(self.journal, tokens=False, now=self.now)
        self.seconds, self.quota, self.phase = seconds, quota, phase
        self.used: dict[int, int] = {}
        self.refused: list[float] = []
        self.known = False

    def run(self, seconds):
        end, held = self.now + seconds, 0.0
        while self.now < end:
            wait = self.silent.wait(CALL, self.now) if self.known else 0.0
            self.now += max(held - self.now, wait, 0.005)
            if self.known and self.silent.wait(CALL, self.now) > 0.0:
                continue
            mark = self.journal.write(CALL, self.now)
            slot = self.silent.take(CALL, self.now)
            there = self.now + self.WAY + self.phase
            number = math.floor(there / self.seconds)
            if self.used.get(number, 0) < self.quota:
                self.used[number] = self.used.get(number, 0) + 1
                continue
            self.refused.append(self.now)
            hold = math.ceil((number + 1) * self.seconds - there)
            self.known = True
            self.silent.refused(mark, slot, hold, True, self.now + 2 * self.WAY)
            held = self.now + hold


@pytest.mark.parametrize("phase", [0.0, 3.3, 7.77])
@pytest.mark.parametrize(("seconds", "quota"), [(10, 10), (10, 100), (60, 60), (60, 600)])
def test_each_windows_quota_is_used_and_hardly_exceeded(seconds, quota, phase):
    house = House(seconds, quota, phase=phase)
    house.run(10 * seconds)  # learn
    refused, windows = len(house.refused), set(house.used)
    house.run(100 * seconds)
    later = [count for number, count in house.used.items() if number not in windows][:-1]
    assert sum(later) >= 0.97 * quota * len(later)
    assert len(house.refused) - refused <= max(0.003 * sum(later), 3)


def test_a_window_is_spent_evenly():
    house = House(60, 60)
    house.run(600)
    marks = []
    end = house.now + 60.0
    while house.now < end:
        house.now += max(house.silent.wait(CALL, house.now), 0.005)
        if house.silent.wait(CALL, house.now) == 0.0:
            house.journal.write(CALL, house.now)
            house.silent.take(CALL, house.now)
            marks.append(house.now)
    assert max(sum(at <= other < at + 5.0 for other in marks) for at in marks) <= 8


def test_a_larger_quota_is_found():  # rules 1 and 2
    house = House(10, 50)
    house.run(200)
    house.quota = 200
    house.run(600)
    assert house.silent.rate == pytest.approx(20.0, rel=0.05)


def test_what_is_no_window_after_all_is_learned_as_a_bucket():  # rule 3
    journal, now, level = Journal(), 0.0, 0.0
    silent = Silent(journal, tokens=False, now=now)
    refused = sent = 0
    while now < 3_000.0:  # a bucket of 2 calls a minute: its holds look like windows
        step = max(silent.wait(CALL, now) if refused else 0.0, 0.05)
        now, level = now + step, min(2.0, level + step / 30.0)
        if refused and silent.wait(CALL, now) > 0.0:
            continue
        mark, slot = journal.write(CALL, now), silent.take(CALL, now)
        if level >= 1.0:
            level, sent = level - 1.0, sent + 1
        else:
            refused += 1
            silent.refused(mark, slot, math.ceil((1.0 - level) * 30.0), True, now)
            now += math.ceil((1.0 - level) * 30.0)
            level = 1.0
    assert sent >= 60  # of 100
    assert refused <= 0.4 * sent


def test_the_shortest_window_that_fits_a_hold():
    assert fitting(0.5) == 1.0
    assert fitting(8.0) == 10.0
    assert fitting(10.5) == 10.0  # told in whole seconds, rounded up
    assert fitting(12.0) == 60.0
    assert fitting(3_000.0) == 3600.0
    assert fitting(1e9) is None


@settings(deadline=None)
@given(
    st.sampled_from([1.0, 10.0, 60.0]),
    st.floats(0.01, 1e4),
    st.lists(
        st.tuples(st.floats(0, 30), st.floats(0.01, 1e4), st.none() | st.floats(0, 100), st.booleans()), max_size=60
    ),
)
def test_whatever_happens_it_waits_no_longer_than_to_the_next_window(seconds, used, history):
    now = 0.0
    window = Window(seconds, min(seconds, 5.0), used, now)
    for gap, cost, hold, refused in history:
        now += gap
        wait = window.wait(cost, now)
        assert 0.0 <= wait <= 3_610.0
        if wait == 0.0:
            slot = window.take(cost, now)
            if refused:
                window.refused(slot, hold, now)
        assert 0.0 < window.rate < math.inf
        assert math.isfinite(window.left(now))
        if window.broken:
            return
