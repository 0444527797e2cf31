"""What a provider charges, learned from what was charged."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core.charge import Charge
from proxy.core.journal import features


def taught(weights, *, calls=200, seed=0, noise=0.0, together=1, max_tokens=(0, 2000)):
    """A charge that saw `calls` calls, `together` at a time, of a provider that charges by `weights`."""
    charge, random = Charge(), Random(seed)
    for _ in range(calls):
        x, charged = (0.0, 0.0, 0.0), 0.0
        for _ in range(together):
            size = random.uniform(50, 2_000)
            most = random.choice([None, random.randint(*max_tokens)])
            x = tuple(sum(pair) for pair in zip(x, features(size, most), strict=True))
            true = weights[0] * size + (weights[2] if most is None else weights[1] * most)
            charged += true * (1 + noise * random.uniform(-1, 1))
        charge.learn(x, charged, together, 1.0)
    return charge


@pytest.mark.parametrize("weights", [(1.0, 0.0, 0.0), (1.0, 1.0, 16.0), (1.3, 0.0, 250.0), (0.7, 0.5, 0.0)])
@pytest.mark.parametrize("together", [1, 7])
def test_whatever_the_provider_charges_is_found_out(weights, together):
    charge = taught(weights, together=together)
    for size, most in ((100.0, 500), (2_000.0, None), (1_000.0, 0)):
        true = weights[0] * size + (weights[2] if most is None else weights[1] * most)
        assert charge.of(features(size, most)) == pytest.approx(max(1.0, true), rel=0.03, abs=10)


def test_noise_is_told_from_error():
    quiet, loud = taught((1.0, 0.0, 0.0)), taught((1.0, 0.0, 0.0), noise=0.3, calls=1_000)
    x = features(1_000.0, None)
    assert quiet.variance_of(x, 1) < 20**2
    assert (0.5 * 173) ** 2 < loud.variance_of(x, 1) < (2 * 173) ** 2  # the deviation of a uniform 30 % of 1,000


def test_before_it_learned_anything_it_is_unsure_of_max_tokens_most():
    charge = Charge()
    assert charge.of(features(100.0, 5_000)) == pytest.approx(100.0)
    assert charge.variance_of(features(100.0, 5_000), 1) > 1_000**2
    assert charge.variance_of(features(100.0, 0), 1) < 100**2


def test_a_change_of_the_providers_mind_is_followed():
    charge = taught((1.0, 1.0, 0.0), calls=500)
    random = Random(7)
    for _ in range(1_500):
        size = random.uniform(50, 2_000)
        charge.learn(features(size, random.randint(0, 2_000)), size, 1, 1.0)
    assert charge.of(features(1_000.0, 1_000)) == pytest.approx(1_000, rel=0.1)


amounts = st.floats(-1e15, 1e15) | st.sampled_from([0.0, 1e-9, 1.0])
rows = st.tuples(
    st.floats(0, 1e6), st.none() | st.integers(0, 10**7), amounts, st.integers(1, 10_000), st.floats(0, 1e15)
)


@settings(deadline=None)
@given(st.lists(rows, max_size=60))
def test_after_any_lies_it_stays_finite(history):
    charge = Charge()
    for size, most, charged, calls, doubt in history:
        charge.learn(features(size, most), charged, calls, doubt)
        for x in (features(size, most), features(100.0, None), features(0.0, 0)):
            assert 1.0 <= charge.of(x) < math.inf
            assert 0.0 <= charge.variance_of(x, calls) < math.inf


def test_the_same_call_a_hundred_thousand_times_does_not_unsettle_it():
    charge = Charge()
    x = features(777.0, 500)
    for _ in range(100_000):
        charge.learn(x, 777.0, 1, 1.0)
    assert charge.of(x) == pytest.approx(777.0, rel=1e-3)
    assert charge.variance_of(features(100.0, None), 1) < 10_000**2
