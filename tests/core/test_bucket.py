import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.core.bucket import Bucket

rates = st.floats(0.01, 1e6)
bursts = st.floats(1, 1e6)
costs = st.floats(0, 1e6)
gaps = st.floats(0, 100)


@given(rates, bursts, st.lists(st.tuples(costs, gaps), max_size=60))
def test_no_more_leaves_than_the_burst_and_the_refill(rate, burst, calls):
    """Rule 1."""
    bucket, now, taken, dearest = Bucket(rate, burst), 0.0, 0.0, 0.0
    for cost, gap in calls:
        now += gap
        if bucket.wait(cost, now) == 0.0:
            bucket.take(cost, now)
            taken += cost
            dearest = max(dearest, cost)
        assert taken <= burst + rate * now + max(0.0, dearest - burst) + 1e-6 * rate + 1e-6 * burst


@given(rates, bursts, costs, costs)
def test_who_waits_as_long_as_told_gets_in(rate, burst, first, second):
    bucket = Bucket(rate, burst, 1000.0)
    bucket.take(first, 1000.0)
    wait = bucket.wait(second, 1000.0)
    assert 0.0 <= wait < math.inf
    assert bucket.wait(second, 1000.0 + wait) == 0.0


def test_a_call_dearer_than_the_bucket_enters_when_it_is_full_and_leaves_a_debt():
    """Rule 2."""
    bucket = Bucket(10.0, 100.0)
    bucket.take(1.0, 0.0)
    assert bucket.wait(500.0, 0.0) == pytest.approx(0.1)
    assert bucket.wait(500.0, 0.1) == 0.0
    bucket.take(500.0, 0.1)
    assert bucket.level(0.1) == pytest.approx(-400.0)
    assert bucket.wait(1.0, 0.1) == pytest.approx(40.1)


@pytest.mark.parametrize("burst", [0.0, 5.0])
def test_a_rate_of_zero_lets_the_level_out_and_nothing_more(burst):
    """Rule 3."""
    bucket = Bucket(0.0, burst)
    bucket.take(5.0, 0.0)
    assert bucket.rate == 0.0
    assert 1e6 < bucket.wait(5.0 if burst else 1.0, 1e6 - 1) < math.inf


@given(rates, bursts, costs, st.floats(0, 1e6), st.floats(0, 1e9))
@example(rate=1.0, burst=1.0, cost=2.0, now=0.0, jump=1e9)
def test_a_clock_that_jumps_back_neither_grants_nor_stalls(rate, burst, cost, now, jump):
    """Rule 4."""
    bucket = Bucket(rate, burst, now)
    bucket.take(cost, now)
    level, wait = bucket.level(now), bucket.wait(burst, now)
    close = 1e-6 * (jump + now + 1) * rate + 1e-6 * burst
    assert bucket.level(now - jump) == pytest.approx(level, abs=close)
    assert bucket.wait(burst, now - jump) == pytest.approx(wait, abs=1e-6 * (jump + now + 1) + 1e-6)


@given(rates, bursts, st.lists(st.tuples(costs, st.floats(0, 2), gaps), max_size=40))
def test_reservations_less_refunds_are_what_was_used(rate, burst, calls):
    """Settled at once, the bucket is where it would be had the true cost been taken."""
    reserved, true, now = Bucket(rate, burst), Bucket(rate, burst), 0.0
    for cost, factor, gap in calls:
        now += gap
        reserved.take(cost, now)
        reserved.settle(cost * factor - cost, now)
        true.take(cost * factor, now)
        assert reserved.level(now) == pytest.approx(true.level(now), rel=1e-6, abs=1e-5 * (rate + burst))


def test_giving_back_never_fills_it_above_the_brim():
    bucket = Bucket(1.0, 10.0)
    bucket.take(5.0, 0.0)
    bucket.give_back(50.0, 0.0)
    assert bucket.level(0.0) == 10.0


@given(rates, bursts, costs, rates, bursts)
def test_a_change_of_the_limit_keeps_the_level_that_still_fits(rate, burst, cost, other_rate, other_burst):
    bucket = Bucket(rate, burst)
    bucket.take(cost, 0.0)
    level = bucket.level(0.0)
    bucket.change(other_rate, other_burst, 0.0)
    assert bucket.level(0.0) == pytest.approx(min(level, other_burst), rel=1e-6, abs=1e-6)
    assert (bucket.rate, bucket.burst) == (other_rate, other_burst)
    bucket.set_level(1e12, 0.0)
    assert bucket.level(0.0) == other_burst


def test_its_repr_tells_its_state():
    bucket = Bucket(2.0, 10.0)
    bucket.take(4.0, 0.0)
    assert repr(bucket) == "<Bucket 2/s, burst 10, level 6>"
