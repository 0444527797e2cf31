"""The breaker's rules, by number."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.core import outcome
from proxy.core.breaker import PROBE_SECONDS, SHUT_MAX, SHUT_SECONDS, Breaker, State
from proxy.core.outcome import OK, Meaning, Reason

MONEY = outcome.of_answer(429, code="insufficient_quota")
UNNAMED = outcome.of_answer(429)
REQUESTS = outcome.of_answer(429, kind="requests")
DENIED = outcome.of_answer(401)
FAILED = outcome.of_answer(500)


def after(*meanings: Meaning, now: float = 0.0) -> Breaker:
    breaker = Breaker()
    for meaning in meanings:
        breaker.ended(meaning, None, now)
    return breaker


def test_money_shuts_at_once_and_for_twice_as_long_each_time():  # rule 1
    breaker, now, seconds = Breaker(), 0.0, SHUT_SECONDS
    for _ in range(8):
        breaker.ended(MONEY, None, now)
        assert (breaker.state(now), breaker.reason) == (State.SHUT, Reason.MONEY)
        assert breaker.shut_for(now) == seconds
        assert not breaker.admits(now + seconds - 0.1, 0.9)
        now += seconds
        assert breaker.admits(now, 0.0)
        seconds = min(SHUT_MAX, 2 * seconds)
    assert seconds == SHUT_MAX


def test_one_call_probes_and_its_success_opens():  # rule 2
    breaker = after(MONEY)
    assert breaker.admits(SHUT_SECONDS, 0.9)
    assert not breaker.admits(SHUT_SECONDS + 1, 0.9)
    breaker.ended(OK, None, SHUT_SECONDS + 2)
    assert (breaker.state(SHUT_SECONDS + 2), breaker.shut_for(SHUT_SECONDS + 2)) == (State.CLOSED, 0.0)
    assert breaker.admits(SHUT_SECONDS + 2, 0.0)


def test_a_probe_that_tells_nothing_makes_room_for_another():  # rule 2
    breaker = after(MONEY)
    assert breaker.admits(SHUT_SECONDS, 0.0)
    breaker.ended(outcome.CANCELLED, None, SHUT_SECONDS + 1)
    assert not breaker.admits(SHUT_SECONDS + 2, 0.0)
    assert breaker.admits(SHUT_SECONDS + PROBE_SECONDS, 0.0)


def test_three_refused_credentials_in_a_row_shut():  # rule 1
    assert after(DENIED, DENIED).state(0.0) is State.CLOSED
    assert after(DENIED, DENIED, OK, DENIED, DENIED).state(0.0) is State.CLOSED
    assert after(DENIED, DENIED, DENIED).reason is Reason.AUTH


def test_three_nameless_refusals_with_no_word_are_money():  # rule 1
    assert after(UNNAMED, UNNAMED, UNNAMED).state(0.0) is State.SHUT
    breaker = Breaker()
    for _ in range(10):
        breaker.ended(UNNAMED, 5.0, 0.0)
        breaker.ended(REQUESTS, None, 0.0)
    assert breaker.state(0.0) is State.CLOSED


def test_failures_turn_a_share_away_and_calls_in_flight_do_not():  # rule 3
    breaker = Breaker()
    assert all(breaker.admits(0.0, 0.0) for _ in range(1000))
    breaker = after(*[FAILED] * 50)
    assert breaker.state(0.0) is State.LIMITED
    assert not breaker.admits(0.0, 0.97)
    assert breaker.admits(0.0, 0.99)
    assert after(*[FAILED] * 10, *[OK] * 20).state(0.0) is State.CLOSED  # 2 of 3 were accepted
    assert after(*[REQUESTS] * 500).state(0.0) is State.CLOSED  # pacing is not the breaker's matter


def test_what_is_long_ago_does_not_count():  # rule 3
    breaker = after(*[FAILED] * 50)
    assert breaker.state(119.0) is State.LIMITED
    assert breaker.state(121.0) is State.CLOSED


@given(
    st.lists(
        st.tuples(
            st.floats(-5, 200), st.floats(0, 1, exclude_max=True), st.sampled_from([OK, FAILED, MONEY, DENIED, UNNAMED])
        )
    )
)
def test_it_never_keeps_away_for_longer_than_its_longest_word(history):
    breaker, now = Breaker(), 1000.0
    for gap, draw, meaning in history:
        now += gap  # clocks jump back
        if breaker.admits(now, draw):
            breaker.ended(meaning, None, now)
        assert 0.0 <= breaker._share(now) < 1.0
    assert breaker.shut_for(now) <= SHUT_MAX + 5 * len(history)
    assert breaker.admits(now + breaker.shut_for(now) + 121.0, 0.0)
