"""The learner's rules, by number, and what holds after any history of answers, refusals, lies and jumping clocks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core import headers, outcome
from proxy.core.headers import Kind, Reading
from proxy.core.learner import (
    CEILING_SECONDS,
    COLD_CALLS,
    SILENCE_MAX,
    WORD_MAX,
    Learner,
    Reservation,
    Size,
    Source,
)
from proxy.core.usage import Usage

REQUESTS = outcome.of_answer(429, kind="requests")
TOKENS = outcome.of_answer(429, kind="tokens")
UNNAMED = outcome.of_answer(429)
SLOW_DOWN = outcome.of_answer(429, code="slow_down")
CALL = Size(input_tokens=100.0)


def told(limit, remaining, window=60.0, kind=Kind.REQUESTS, name=None):
    return (Reading(kind, limit, remaining, None, window, name or kind.value),)


def send_all(learner, now, size=CALL, most=1000):
    """Everything that may be sent now."""
    sent = []
    while len(sent) < most and learner.wait(size, now) == 0.0:
        sent.append(learner.take(size, now))
    return sent


# ── ceilings ──


@settings(deadline=None)
@given(
    st.floats(1, 10_000),
    st.floats(100, 1e6),
    st.lists(st.tuples(st.floats(0, 20), st.floats(1, 5_000), st.integers(0, 3)), max_size=80),
)
def test_no_configured_ceiling_is_exceeded_by_the_own_count(requests, tokens, calls):  # rule 1
    learner = Learner(requests_per_minute=requests, tokens_per_minute=tokens, learn=False, now=0.0)
    now, sent, used = 0.0, [], []
    for gap, weight, answer in calls:
        now += gap
        size = Size(input_tokens=weight)
        if learner.wait(size, now) == 0.0:
            reservation = learner.take(size, now)
            sent.append(now)
            used.append((now, weight))
            if answer == 0:
                learner.refused(reservation, UNNAMED, (), 0.0, now)
            if answer <= 1:
                learner.settle(reservation, Usage(input=int(weight)), now)
        for since in sent:
            span = now - since
            assert (
                sum(at >= since for at in sent) <= max(1.0, requests / 60 * CEILING_SECONDS) + requests / 60 * span + 1
            )
            spent = sum(weight for at, weight in used if at >= since)
            assert spent <= tokens / 60 * (CEILING_SECONDS + span) + 5_000


def test_a_changed_ceiling_holds_at_once_and_keeps_the_level():
    learner = Learner(requests_per_minute=600, learn=False, now=0.0)
    assert len(send_all(learner, 0.0)) == 60
    learner.configure(requests_per_minute=60, tokens_per_minute=None, learn=False)
    assert learner.wait(CALL, 0.0) == pytest.approx(1.0)
    learner.configure(requests_per_minute=None, tokens_per_minute=None, learn=False)
    assert len(send_all(learner, 0.0)) == 1000


# ── cold start ──


def test_of_an_unknown_upstream_a_few_calls_are_sent_and_two_more_for_each_answer():  # rule 4
    learner, now, sizes = Learner(now=0.0), 0.0, []
    waiting = send_all(learner, now)
    for _ in range(5):
        sizes.append(len(waiting))
        for reservation in waiting:
            learner.answered(reservation, (), now)
        waiting = []
        for _ in range(100):
            waiting += send_all(learner, now := now + 0.1)
    assert sizes == [COLD_CALLS * 2**number for number in range(5)]


def test_a_wall_is_not_run_into_by_everybody_at_once():  # rule 4
    learner = Learner(now=0.0)
    for _ in range(100):
        for reservation in send_all(learner, 0.0):
            learner.answered(reservation, (), 0.0)
    assert len(send_all(learner, 1.0)) <= COLD_CALLS


def test_the_first_answer_that_tells_its_limits_ends_the_cold_start():  # rule 4
    learner = Learner(now=0.0)
    first, *_ = send_all(learner, 0.0)
    learner.answered(first, told(500.0, 499.0), 1.0)
    assert learner.snapshot(1.0).cold_calls is None
    assert 450 <= len(send_all(learner, 1.0)) <= 492


def test_a_limit_of_the_day_alone_does_not_end_it():  # rule 4: Groq tells no requests per minute
    learner = Learner(now=0.0)
    first, *_ = send_all(learner, 0.0)
    learner.answered(first, told(14_400.0, 14_399.0, window=86_400.0), 1.0)
    assert len(send_all(learner, 1.0)) < 20


def test_while_it_is_not_known_what_a_call_is_charged_it_may_be_charged_much():  # rule 4
    for limit, least, most in ((1e8, 100, 107), (100_000.0, 30, 50), (3_000.0, 0, 8)):
        learner, now = Learner(now=0.0), 1.0
        first, *rest = send_all(learner, 0.0, Size(input_tokens=100.0, max_tokens=1000))
        learner.answered(first, told(limit, limit - 1200, kind=Kind.TOKENS), now)
        assert learner.snapshot(now).cold_calls is not None
        more = 0
        for _ in range(100):  # 40 a second, for fear of a sudden wall
            now += 0.025
            more += len(send_all(learner, now, Size(input_tokens=100.0, max_tokens=1000), most=1))
        assert least <= len(rest) + more <= most


def test_what_is_not_used_does_not_grow():
    learner = Learner(now=0.0)
    for second in range(200):
        reservation = learner.take(CALL, float(second))
        learner.answered(reservation, (), second + 0.5)
        learner.settle(reservation, None, second + 0.5)
    assert learner.snapshot(200.0).cold_calls == COLD_CALLS


# ── refusals ──


def test_a_refusal_holds_everybody_until_the_providers_word():  # rule 3
    learner = Learner(now=0.0)
    first, second, *_ = send_all(learner, 0.0)
    learner.refused(first, REQUESTS, (), 7.0, 0.1)
    assert learner.held(0.1) == pytest.approx(7.0)
    assert learner.wait(CALL, 0.1) >= 7.0
    learner.refused(second, TOKENS, (), 3.0, 0.2)
    assert learner.held(0.2) == pytest.approx(6.9)  # the longer one counts
    assert learner.wait(CALL, 5.0) >= 2.1 - 1e-9


@pytest.mark.parametrize("window", [60.0, 86_400.0])
def test_a_word_longer_than_a_minute_is_believed_of_longer_windows_only(window):
    learner = Learner(now=0.0)
    first, second, *_ = send_all(learner, 0.0)
    learner.answered(first, told(100.0, 0.0, window=window), 1.0)
    learner.refused(second, REQUESTS, told(100.0, 0.0, window=window), 3_000.0, 1.1)
    assert learner.held(1.1) == pytest.approx(WORD_MAX if window == 60.0 else 3_000.0)


def test_refusals_without_a_word_hold_for_twice_as_long_each_time():
    learner, now, holds = Learner(now=0.0), 0.0, []
    for _ in range(10):
        reservation = learner.take(CALL, now)
        learner.refused(reservation, UNNAMED, (), None, now)
        holds.append(learner.held(now))
        now += holds[-1]
    assert all(later >= min(WORD_MAX, 1.9 * earlier) for earlier, later in pairwise(holds))
    assert holds[-1] == WORD_MAX


def test_the_same_refusal_told_to_many_calls_holds_once():
    learner = Learner(now=0.0)
    for reservation in send_all(learner, 0.0):
        learner.refused(reservation, UNNAMED, (), None, 0.1)
    assert learner.held(0.1) <= 1.0


def test_after_a_hold_calls_leave_at_the_limits_pace():  # rule 3
    learner = Learner(now=0.0)
    first, second, *_ = send_all(learner, 0.0)
    learner.answered(first, told(600.0, 590.0), 1.0)
    send_all(learner, 1.0)
    learner.refused(second, REQUESTS, told(600.0, 0.0), 10.0, 1.5)
    times, now = [], 1.5
    while len(times) < 300:
        if (wait := learner.wait(CALL, now)) == 0.0:
            learner.take(CALL, now)
            times.append(now)
        else:
            now += wait
    assert times[0] >= 11.5
    assert all(sum(at <= other < at + 0.1 for other in times) <= 1 for at in times)  # 10 a second


def test_slow_down_bounds_the_tokens_per_second_of_late():
    learner, now = Learner(now=0.0), 0.0
    big = Size(input_tokens=1_000.0)
    for _ in range(600):
        now += 0.05
        reservation = learner.take(big, now)
        learner.answered(reservation, told(1e6, 9e5), now)
    learner.refused(learner.take(big, now), SLOW_DOWN, (), None, now)
    bound = learner.snapshot(now).tokens_per_second_max
    assert bound == pytest.approx(0.7 * 20_000, rel=0.1)


def test_a_refusal_that_headers_explain_teaches_nothing_else():  # rule 5
    learner = Learner(now=0.0)
    first, second, *_ = send_all(learner, 0.0)
    learner.answered(first, told(500.0, 499.0), 1.0)
    learner.refused(second, REQUESTS, told(500.0, 0.0), 1.0, 1.0)
    assert {limit.source for limit in learner.snapshot(2.0).limits} == {Source.HEADERS}


def test_headers_that_never_fall_are_no_help_and_refusals_teach():  # rule 5
    learner = Learner(now=0.0)
    first, second, *_ = send_all(learner, 0.0)
    learner.answered(first, told(500.0, 500.0), 1.0)
    learner.refused(second, REQUESTS, told(500.0, 500.0), 1.0, 1.0)
    assert Source.REFUSALS in {limit.source for limit in learner.snapshot(2.0).limits}
    assert learner.changes[-1].cause == "refusal"


def test_headers_that_tell_of_no_room_while_calls_are_answered_are_set_aside():  # rule 5
    learner, now = Learner(now=0.0), 0.0
    first, *_ = send_all(learner, now)
    learner.answered(first, told(0.0, 0.0), now)
    for _ in range(3):
        assert learner.wait(CALL, now) > 0.0
        now += learner.wait(CALL, now)
        learner.answered(learner.take(CALL, now), told(0.0, 0.0), now)
    assert now <= 3 * SILENCE_MAX
    assert learner.wait(CALL, now) == 0.0
    assert learner.snapshot(now).limits == ()


def test_a_limit_that_answers_no_longer_tell_is_forgotten():
    learner = Learner(now=0.0)
    learner.answered(learner.take(CALL, 0.0), told(500.0, 499.0), 0.0)
    learner.answered(learner.take(CALL, 400.0), told(80.0, 79.0, name="other"), 400.0)
    assert [limit.name for limit in learner.snapshot(400.0).limits] == ["other"]


def test_a_call_that_was_never_sent_is_not_counted():
    learner = Learner(now=0.0)
    learner.answered(learner.take(CALL, 0.0), told(100.0, 50.0), 0.0)
    before = learner.snapshot(0.0).limits[0].level
    learner.settle(learner.take(CALL, 0.0), Usage(), 0.0)
    assert learner.snapshot(0.0).limits[0].level == pytest.approx(before)
    assert learner.snapshot(0.0).used == 0.0


# ── changes and snapshot ──


def test_each_change_of_a_limit_is_told_with_its_cause():
    learner = Learner(now=0.0)
    for at, limit in ((0.0, 500.0), (1.0, 500.0), (2.0, 1000.0)):
        learner.answered(learner.take(CALL, at), told(limit, 100.0), at)
    first, second = learner.changes
    assert (first.limit, first.per_minute, first.before, first.source) == (
        "requests",
        pytest.approx(500.0),
        None,
        Source.HEADERS,
    )
    assert second.cause == "header"
    assert (second.before, second.per_minute) == pytest.approx((500.0, 1000.0))
    (limit,) = learner.snapshot(3.0).limits
    assert (limit.per_minute, limit.since, limit.changes) == (pytest.approx(1000.0), 2.0, 1)


def test_the_log_of_changes_is_bounded():
    learner = Learner(now=0.0)
    for number in range(2_000):
        learner.answered(learner.take(CALL, 0.0), told(100.0 + number, 50.0), 0.0)
    assert len(learner.changes) <= 256


def test_no_more_limits_are_kept_than_a_provider_can_have():
    learner = Learner(now=0.0)
    for number in range(100):
        learner.answered(learner.take(CALL, 0.0), told(100.0, 50.0, name=f"req-{number}-second"), 0.0)
    assert len(learner.snapshot(0.0).limits) <= 8


# ── any history ──

ODD = st.sampled_from([None, 0.0, 1.0, 5.0, 60.0, 500.0, 1e6, 1e15])
READINGS = st.lists(
    st.builds(
        lambda kind, limit, remaining, reset, window, name: Reading(kind, limit, remaining, reset, window, name),
        st.sampled_from(list(Kind)),
        ODD | st.floats(0, 1e4),
        ODD | st.floats(0, 1e4),
        ODD | st.floats(0, 1e3),
        st.sampled_from([None, 0.001, 1.0, 6.0, 60.0, 86_400.0, 2_592_000.0]),
        st.sampled_from(["requests", "tokens", "input_tokens", "req-10-second"]),
    ),
    max_size=3,
)
RETRY_AFTER = st.sampled_from([None, 0.0, 0.02, 1.0, 7.0, 60.0, 3600.0, headers.DAY])
STEP = st.one_of(
    st.tuples(st.just("send"), st.floats(0, 1e4), st.none() | st.integers(0, 10_000), st.integers(1, 30)),
    st.tuples(st.just("wait"), st.sampled_from([0.0, 1e-6, 0.3, 5.0, 61.0, 1e5])),
    st.tuples(st.just("answer"), st.integers(0, 40), READINGS),
    st.tuples(
        st.just("refuse"),
        st.integers(0, 40),
        st.sampled_from([REQUESTS, TOKENS, UNNAMED, SLOW_DOWN]),
        READINGS,
        RETRY_AFTER,
    ),
    st.tuples(st.just("fail"), st.integers(0, 40)),
    st.tuples(st.just("settle"), st.integers(0, 40), st.none() | st.integers(0, 5_000)),
    st.tuples(st.just("jump"), st.floats(-1e5, 1e5)),
)


@dataclass
class History:
    """Lives through steps, and keeps the caller's ledger beside the learner's."""

    learner: Learner
    now: float = 1_000.0
    open: list[Reservation] = field(default_factory=list)
    used: float = 0.0
    word_until: float = -math.inf

    def live(self, step) -> None:
        learner = self.learner
        match step:
            case ("send", tokens, max_tokens, times):
                size = Size(input_tokens=tokens, max_tokens=max_tokens)
                for _ in range(times):
                    if learner.wait(size, self.now) == 0.0:
                        self.open.append(learner.take(size, self.now))
            case ("wait", seconds):
                self.now += seconds
            case ("answer", which, readings) if self.open:
                learner.answered(self.open[which % len(self.open)], readings, self.now)
            case ("refuse", which, meaning, readings, retry_after) if self.open:
                reservation = self.open[which % len(self.open)]
                if not reservation.told:
                    self.word_until = max(self.word_until, self.now + (retry_after or 0.0))
                learner.refused(reservation, meaning, readings, retry_after, self.now)
            case ("fail", which) if self.open:
                learner.failed(self.open[which % len(self.open)], self.now)
            case ("settle", which, output) if self.open:
                reservation = self.open.pop(which % len(self.open))
                usage = None if output is None else Usage(input=7, output=output)
                for _ in range(2):  # the second time changes nothing
                    learner.settle(reservation, usage, self.now)
                unknown = 0.0 if reservation.refused else reservation.tokens
                self.used += unknown if usage is None else usage.input + usage.output
            case ("jump", seconds):
                self.word_until += min(0.0, seconds)
                self.now += seconds


@settings(deadline=None, max_examples=100)
@given(st.lists(STEP, max_size=60))
def test_after_any_history_wait_is_finite_and_the_ledgers_agree(steps):  # rules 2, 6, 7
    history = History(Learner(now=1_000.0))
    for step in steps:
        history.live(step)
        for size in (CALL, Size(input_tokens=1e6, max_tokens=0)):
            assert 0.0 <= history.learner.wait(size, history.now) < math.inf
        known = history.learner.snapshot(history.now)
        assert known.reserved == pytest.approx(sum(each.tokens for each in history.open), abs=1e-3)
        assert known.used == pytest.approx(history.used, rel=1e-9, abs=1e-3)
        assert known.unanswered == sum(not each.told for each in history.open)
        assert known.hold_seconds <= headers.DAY
        for limit in known.limits:
            assert math.isfinite(limit.per_minute)
            assert limit.per_minute >= 0.0
            assert math.isfinite(limit.level)


@settings(deadline=None, max_examples=100)
@given(st.lists(STEP, max_size=60))
def test_after_any_history_a_call_is_let_out_within_a_minute_or_the_providers_word(steps):  # rule 2
    history = History(Learner(now=1_000.0))
    for step in steps:
        history.live(step)
    learner, now = history.learner, history.now
    allowed = max(SILENCE_MAX, learner.held(now), min(history.word_until - now, headers.DAY))
    asked = 0
    while (wait := learner.wait(CALL, now)) > 0.0:
        now += wait
        asked += 1
        assert asked < 5_000
        assert now - history.now <= allowed + 1e-3


@settings(deadline=None, max_examples=100)
@given(st.lists(STEP, max_size=40), st.floats(1, 600), st.floats(1_000, 1e5))
def test_lies_never_lift_a_ceiling(steps, requests, tokens):  # rule 1
    history = History(Learner(requests_per_minute=requests, tokens_per_minute=tokens, now=1_000.0))
    began, sent = history.now, 0
    for step in steps:
        if step[0] == "jump":
            continue
        before = len(history.open)
        history.live(step)
        sent += max(0, len(history.open) - before)
    assert sent <= max(1.0, requests / 60 * CEILING_SECONDS) + requests / 60 * (history.now - began) + 1
