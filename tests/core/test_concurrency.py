"""Learned concurrency against a server whose batch is known."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from proxy.core.concurrency import LEAST, MOST, START, Gradient


def settled(knee: int, *, seed: int, most: int | None = None, rounds: int = 4000) -> list[float]:
    """The limit over time, kept full, at a server that is constant up to `knee` calls and queues what is more."""
    gradient, random, seen = Gradient(most), Random(seed), []
    for _ in range(rounds):
        in_flight = int(gradient.limit)
        prompt = random.uniform(50, 4000)
        load = max(1.0, in_flight / knee)
        gradient.observed((prompt + 500) / 8000 * load * random.lognormvariate(0, 0.1), prompt, in_flight)
        seen.append(gradient.limit)
    return seen


def test_it_finds_the_neighbourhood_of_the_batch_and_stays_there():
    for seed in range(5):
        tail = sorted(settled(64, seed=seed, rounds=20_000)[-5000:])
        assert tail[len(tail) // 5] >= 64, (seed, tail[len(tail) // 5])  # a probe takes it lower for a short while
        assert tail[-1] <= 64 * 2, (seed, tail[-1])


def test_it_follows_a_server_that_became_slower_for_good():
    gradient = Gradient()
    for pace in (8000.0, 2000.0):
        for _ in range(5000):
            load = max(1.0, int(gradient.limit) / 64)
            gradient.observed(1500 / pace * load, 1000, int(gradient.limit))
        assert 60 <= gradient._limit <= 64 * 1.75


def test_long_prompts_are_no_sign_of_load():
    gradient = Gradient()
    for _ in range(200):
        gradient.observed(0.1, 300, int(gradient.limit))
    before = gradient.limit
    for _ in range(200):
        gradient.observed(1.0, 7500, int(gradient.limit))  # ten times the size, ten times the time
    assert gradient.limit >= before


def test_what_is_not_used_proves_nothing():
    gradient = Gradient()
    for _ in range(500):
        gradient.observed(0.1, 300, 2)
    assert gradient.limit == START


def test_a_503_cuts_once_for_all_that_were_sent_before():
    gradient = Gradient()
    for sent_at in (1.0, 1.1, 1.2):
        gradient.dropped(sent_at, 2.0)
    assert gradient.limit == START * 0.9
    gradient.dropped(2.5, 3.0)
    assert gradient.limit == START * 0.9 * 0.9


def test_a_ceiling_holds_and_may_be_moved():
    assert max(settled(64, seed=1, most=30)) <= 30
    gradient = Gradient(2)
    assert gradient.limit == 2
    gradient.configure(None)
    for _ in range(300):
        gradient.observed(0.1, 300, int(gradient.limit))
    assert gradient.limit > START


@given(
    st.lists(st.tuples(st.floats(1e-6, 1e6), st.floats(0, 1e7), st.integers(0, 5000))),
    st.none() | st.integers(1, 10_000),
)
def test_it_stays_between_its_bounds_whatever_is_observed(history, most):
    gradient = Gradient(most)
    for seconds, tokens, in_flight in history:
        gradient.observed(seconds, tokens, in_flight)
        gradient.dropped(seconds, seconds)
        assert min(LEAST, gradient.most) <= gradient.limit <= (most or MOST)
