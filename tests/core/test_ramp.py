from __future__ import annotations

import pytest

from proxy.core.ramp import CUT, RISE, RISE_SECONDS, Ramp


def sent(ramp, per_second, seconds, now, *, size=1_000.0):
    """Tokens that leave in so many seconds when so many per second are asked for."""
    tokens, step = 0.0, size / per_second
    end = now + seconds
    while now < end:
        if ramp.wait(size, now) == 0.0:
            ramp.take(size, now)
            tokens += size
        now += step
    return tokens


def test_nothing_is_bounded_until_slow_down():
    ramp = Ramp(0.0)
    assert sent(ramp, 1e6, 10.0, 0.0) == pytest.approx(1e7, rel=0.01)
    assert ramp.rate is None


def test_slow_down_cuts_the_rate_of_late_and_lets_it_rise_by_half_in_fifteen_minutes():
    ramp = Ramp(0.0)
    sent(ramp, 50_000.0, 60.0, 0.0)
    ramp.slow_down(60.0)
    assert ramp.rate == pytest.approx(CUT * 50_000, rel=0.1)
    began = ramp.rate
    tokens = sent(ramp, 200_000.0, RISE_SECONDS, 60.0)
    assert ramp.rate == pytest.approx(RISE * began, rel=0.05)
    assert began * RISE_SECONDS < tokens < RISE * began * RISE_SECONDS


def test_small_rates_rise_quickly_and_the_bound_is_forgotten_when_nobody_is_near_it():
    ramp = Ramp(0.0)
    sent(ramp, 1_000.0, 60.0, 0.0)
    ramp.slow_down(60.0)
    sent(ramp, 1_000.0, 600.0, 60.0, size=100.0)
    assert ramp.rate is None


def test_slow_down_of_an_idle_upstream_never_bounds_it_to_nothing():
    ramp = Ramp(0.0)
    ramp.slow_down(100.0)
    assert 0.0 < ramp.wait(100.0, 100.0) < 1_000.0
