"""The two-point learner against buckets whose limit is known, by its rules."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core.journal import Journal, features
from proxy.core.two_point import CALM_SECONDS, CATCH_UP, TwoPoint

CALL = features(0.0, None)


class House:
    """A source that always has more, and a provider that is a leaky bucket and says `retry-after` in whole seconds."""

    def __init__(self, rate, *, burst=None, now=100.0):
        self.journal, self.now, self.rate = Journal(), now, rate
        self.learner = TwoPoint(self.journal, tokens=False, now=now)
        self.burst = self.level = rate * 60 if burst is None else burst
        self.sent: list[float] = []
        self.refused: list[float] = []

    def run(self, seconds, *, others=0.0, random=None):
        """Send whenever it may be; nobody sends more than 1,000 a second."""
        end, held = self.now + seconds, 0.0
        while self.now < end:
            wait = max(held - self.now, self.learner.wait(1.0, self.now), 0.001)
            self.pass_time(wait)
            if random is not None:
                self.level -= sum(random.random() < others * wait / 20 for _ in range(20))
            if self.now < held or self.learner.wait(1.0, self.now) > 0.0:
                continue
            mark = self.journal.write(CALL, self.now)
            self.learner.take(1.0, self.now)
            if self.level >= 1.0:
                self.level -= 1.0
                self.sent.append(self.now)
                continue
            self.refused.append(self.now)
            hold = math.ceil((1.0 - self.level) / self.rate)
            held = self.now + hold
            self.learner.refused(mark, hold, self.now)

    def pass_time(self, seconds):
        self.now += seconds
        self.level = min(self.burst, self.level + seconds * self.rate)


@pytest.mark.parametrize("rate", [1.0, 8.33, 50.0])
def test_between_two_refusals_the_admitted_is_the_limit(rate):
    house = House(rate)
    house.run(2_000 / rate)
    assert house.learner.rate == pytest.approx(rate, rel=0.01)


@pytest.mark.parametrize("rate", [1.0, 8.33, 50.0])
def test_once_learned_a_cycle_costs_one_refusal_and_wastes_nothing(rate):  # rule 1
    house = House(rate)
    house.run(4_000 / rate)
    sent, refused = len(house.sent), len(house.refused)
    house.run(8_000 / rate)
    assert len(house.sent) - sent >= 0.99 * 8_000
    assert len(house.refused) - refused <= 0.003 * 8_000


def test_refusals_on_their_way_are_the_same_refusal():  # rule 2
    house = House(10.0)
    house.run(400.0)
    rate = house.learner.rate
    marks = [house.journal.write(CALL, house.now) for _ in range(50)]
    assert house.learner.refused(marks[0], 1.0, house.now + 0.05)
    before = house.learner.rate
    for mark in marks[1:]:
        assert not house.learner.refused(mark, 1.0, house.now + 0.06)
    assert house.learner.rate == before > 0.8 * rate


def test_where_others_take_a_share_what_they_leave_is_learned():  # rule 3
    house = House(10.0)
    house.run(2_000.0, others=2.0, random=Random(3))
    assert house.learner.rate == pytest.approx(8.0, rel=0.05)


def test_a_fallen_limit_is_followed_after_a_few_refusals():
    house = House(10.0)
    house.run(600.0)
    house.rate, house.burst = 4.0, 240.0
    house.level = min(house.level, house.burst)
    refused = len(house.refused)
    house.run(60.0)
    assert len(house.refused) - refused <= 10
    assert house.learner.rate == pytest.approx(4.0, rel=0.15)


def test_a_risen_limit_is_climbed_to():  # rule 4
    house = House(50.0)
    house.run(300.0)
    house.rate, house.burst = 150.0, 9_000.0
    house.run(90.0)
    assert house.learner.rate == pytest.approx(150.0, rel=0.1)


@pytest.mark.parametrize("factor", [0.1, 0.0])
def test_a_limit_that_fell_far_is_tried_for_more_before_long(factor):  # rule 6
    house = House(8.33)
    house.run(300.0)
    house.rate, house.burst = max(1e-2, factor * 8.33), max(1e-2, factor * 500.0)
    house.level, refused = 0.0, len(house.refused)
    house.run(60.0)
    assert len(house.refused) - refused <= 10
    house.rate, house.burst = 8.33, 500.0
    house.run(90.0)
    began = len(house.sent)
    house.run(60.0)
    assert len(house.sent) - began >= 0.8 * 8.33 * 60


def test_a_limit_that_stays_low_is_tried_less_and_less():  # rule 6
    house = House(8.33)
    house.run(300.0)
    house.rate, house.burst = 0.833, 50.0
    house.level = 0.0
    house.run(1_500.0)
    refused = len(house.refused)
    house.run(3_600.0)
    assert len(house.refused) - refused <= 0.01 * 3_600 * 0.833


def test_a_small_bucket_is_no_reason_to_stay_slow():  # rule 4: the first refusal tells hardly anything
    house = House(8.33, burst=50.0)
    house.run(120.0)
    assert len(house.sent) >= 0.85 * 8.33 * 120
    assert house.learner.rate == pytest.approx(8.33, rel=0.05)


def test_idleness_is_no_measurement():  # rule 5
    house = House(10.0)
    house.run(600.0)
    house.pass_time(3_600.0)
    house.run(900.0)
    assert house.learner.rate == pytest.approx(10.0, rel=0.05)


def test_after_a_hold_nobody_hurries_and_after_idleness_a_few_may_leave_at_once():
    house = House(100.0)
    house.run(200.0)
    mark = house.journal.write(CALL, house.now)
    house.learner.refused(mark, 30.0, house.now)
    house.level = 0.0
    house.pass_time(30.0)
    began = len(house.sent)
    house.run(20.0)
    times = house.sent[began:]
    assert len(times) <= 1.01 * CATCH_UP * 100.0 * 20
    house.pass_time(2 * CALM_SECONDS + 60.0)
    at_once = 0
    while house.learner.wait(1.0, house.now) == 0.0:
        house.journal.write(CALL, house.now)
        house.learner.take(1.0, house.now)
        at_once += 1
    assert 50 <= at_once <= 500


def test_calls_that_were_never_sent_are_not_counted():
    house = House(10.0)
    house.run(300.0)
    before = house.learner.saved(house.now)
    mark = house.journal.write(CALL, house.now)
    house.learner.take(1.0, house.now)
    house.learner.unsent(mark)
    assert house.learner.saved(house.now) == pytest.approx(before)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.floats(0, 100), st.booleans(), st.sampled_from([0.0, 0.02, 1.0, 60.0]), st.floats(0, 1e4)),
        max_size=80,
    ),
    st.booleans(),
)
def test_the_estimate_is_never_zero_and_never_unbounded(history, tokens):  # rule 7
    journal, now = Journal(), 0.0
    learner = TwoPoint(journal, tokens=tokens, now=now)
    for gap, refused, hold, size in history:
        now += gap
        x = features(size, None)
        cost = learner.cost(x)
        assert 0.0 <= learner.wait(cost, now) < math.inf
        mark = journal.write(x, now)
        learner.take(cost, now)
        if refused:
            learner.refused(mark, hold, now)
            assert learner.rate is not None
            assert 0.0 < learner.rate < 1e9
            assert math.isfinite(learner.saved(now))
