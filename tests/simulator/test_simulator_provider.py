"""The simulated provider's decisions, in virtual time. Numbers in brackets are the rules of `provider.py`."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from math import ceil, floor, inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.simulator import (
    ALWAYS,
    Admitted,
    Change,
    Fault,
    Profile,
    Provider,
    Refused,
    Size,
    Style,
    profiles,
)
from proxy.simulator.meter import Bucket

SMALL = Size(400, 100)  # 100 tokens of prompt
# 500 a minute from a bucket of 50, and nothing drawn by chance.
PLAIN = Profile(requests_per_minute=500, requests_burst=50, first_token_sigma=0, output_sigma=0)
pauses = st.lists(st.floats(0, 3, allow_nan=False), min_size=1, max_size=300)


def admitted_times(provider: Provider, arrivals: list[float]) -> list[float]:
    times = []
    for at in arrivals:
        decision = provider.arrive(at, SMALL)
        if isinstance(decision, Admitted):
            provider.leave(decision, at)
            times.append(at)
    return times


def running(gaps: list[float]) -> list[float]:
    now, times = 0.0, []
    for gap in gaps:
        now += gap
        times.append(now)
    return times


def refused(provider: Provider, now: float, size: Size = SMALL) -> Refused:
    decision = provider.arrive(now, size)
    assert isinstance(decision, Refused)
    return decision


def admitted(provider: Provider, now: float, size: Size = SMALL) -> Admitted:
    decision = provider.arrive(now, size)
    assert isinstance(decision, Admitted)
    return decision


@given(pauses)
def test_no_stretch_of_time_admits_more_than_the_bucket_and_what_ran_in_meanwhile(gaps: list[float]) -> None:
    times = admitted_times(Provider(replace(PLAIN, requests_per_minute=60, requests_burst=5)), running(gaps))
    for first, begin in enumerate(times):
        for last in range(first, len(times)):
            assert last - first + 1 <= 5 + (times[last] - begin) * 1.0 + 1e-3


@given(pauses)
def test_no_window_admits_more_than_its_quota(gaps: list[float]) -> None:
    times = admitted_times(Provider(Profile(requests_per_minute=24, window_seconds=10)), running(gaps))
    for window in range(floor(times[-1] / 10) + 1):
        assert sum(1 for at in times if floor(at / 10) == window) <= 4


@given(pauses, st.integers(0, 5))
def test_the_same_arrivals_make_the_same_run(gaps: list[float], seed: int) -> None:
    profile = replace(
        profiles.TIGHT, charge_noise=0.3, cross_requests_per_minute=60, cross_tokens=500, error_rate=0.1, cut_rate=0.1
    )

    def run() -> list[object]:
        provider = Provider(profile, seed)
        told: list[object] = []
        for at in running(gaps):
            decision = provider.arrive(at, SMALL)
            told.append(
                (decision.headers, decision.first_token, decision.output_tokens, decision.fault, decision.charged)
                if isinstance(decision, Admitted)
                else (decision.status, decision.headers, decision.body)
            )
        return [*told, provider.stats]

    assert run() == run()


def test_a_refusal_changes_nothing_of_what_chance_gives_to_later_calls() -> None:
    """[4]"""
    profile = Profile(requests_per_minute=60, requests_burst=1, charge_noise=0.3, stall_rate=0.5)
    free, tight = Provider(replace(profile, requests_burst=10), 7), Provider(profile, 7)
    for at in (0.0, 0.1):
        free.arrive(at, SMALL)
        tight.arrive(at, SMALL)
    one, other = admitted(free, 60.0), admitted(tight, 60.0)
    assert (one.first_token, one.output_tokens, one.fault, one.charged) == (
        other.first_token,
        other.output_tokens,
        other.fault,
        other.charged,
    )


@given(st.integers(1, 40_000), st.lists(st.floats(0, 2, allow_nan=False), min_size=1, max_size=60))
def test_limit_level_and_window_follow_from_one_answer(limit: int, gaps: list[float]) -> None:
    bucket = Bucket("requests", limit, 60.0, period=60.0, now=0.0)
    for at in running(gaps):
        bucket.advance(at)
        if bucket.wait(1.0) == 0.0:
            bucket.take(1.0)
        if bucket.remaining < limit:
            assert bucket.reset * limit / (limit - bucket.remaining) == pytest.approx(60.0)


@pytest.mark.parametrize(
    "profile",
    [
        PLAIN,
        Profile(tokens_per_minute=6_000, tokens_burst=700),
        Profile(requests_per_minute=60, window_seconds=10),
        Profile(requests_per_day=100),
        replace(PLAIN, charge_refused=True),
    ],
    ids=["requests", "tokens", "window", "day", "charged refusals"],
)
@given(st.floats(0, 100))
def test_who_waits_as_long_as_told_is_served(profile: Profile, now: float) -> None:
    provider = Provider(replace(profile, first_token_sigma=0, output_sigma=0))
    for _ in range(5):
        while isinstance(decision := provider.arrive(now, SMALL), Admitted):
            provider.leave(decision, now)
        now += int(decision.headers["retry-after-ms"]) / 1000
        provider.leave(admitted(provider, now), now)


def test_a_burst_of_300_straight_at_the_tight_provider_is_mostly_refused() -> None:
    provider = Provider(profiles.TIGHT)
    for number in range(300):
        provider.arrive(number / 1000, SMALL)
    assert provider.stats.admitted == 50 + 2  # the bucket, and what ran in within 0.3 s
    assert provider.stats.refused == {"requests": 248}
    assert provider.stats.peak_in_flight == 52


def test_a_refused_call_draws_nothing() -> None:
    """[3]"""
    provider = Provider(Profile(requests_per_minute=60, requests_burst=10, tokens_per_minute=6_000, tokens_burst=150))
    admitted(provider, 0.0)
    assert refused(provider, 0.0).scope == "tokens"
    assert provider.levels(0.0) == {"requests": 9, "tokens": 50}


def test_charged_refusals_starve_who_does_not_wait() -> None:
    hammered = Provider(Profile(requests_per_minute=60, requests_burst=1, charge_refused=True))
    times = admitted_times(hammered, [number / 10 for number in range(600)])
    assert times == [0.0]


def test_what_a_call_is_charged_follows_the_formula() -> None:
    profile = Profile(tokens_per_minute=10_000, max_tokens_weight=1.0, charge_factor=2.0)
    assert admitted(Provider(profile), 0.0).charged == 2 * (400 / 4 + 100)
    noisy = Provider(replace(profile, charge_factor=1.0, charge_noise=0.3, tokens_per_minute=10_000_000), 3)
    charges = [admitted(noisy, 0.0).charged for _ in range(1000)]
    assert 140 <= min(charges) < 150
    assert 250 < max(charges) <= 260
    assert sum(charges) / 1000 == pytest.approx(200, rel=0.02)
    assert noisy.stats.tokens_charged == pytest.approx(sum(charges))


def test_one_call_larger_than_the_limit_is_told_so_and_not_when_to_come_back() -> None:
    refusal = refused(Provider(Profile(tokens_per_minute=1_000)), 0.0, Size(40_000))
    assert refusal.scope == "too_large"
    assert str(refusal.body).count("Request too large for gpt-4o-mini") == 1
    assert "retry-after" not in refusal.headers
    assert refusal.wait is None


def test_a_limit_of_nothing_admits_nothing_and_still_says_something_finite() -> None:
    refusal = refused(Provider(Profile(requests_per_minute=0, tokens_per_minute=0)), 5.0)
    assert refusal.headers["retry-after"] == "60"
    assert refusal.headers["x-ratelimit-limit-requests"] == "0"
    assert refusal.headers["x-ratelimit-reset-requests"] == "1m0s"


def test_limits_change_at_their_time_and_never_by_a_windfall() -> None:
    provider = Provider(replace(PLAIN, changes=(Change(10.0, 0.1), Change(20.0, 2.0))))
    assert admitted(provider, 9.0).headers["x-ratelimit-limit-requests"] == "50"
    lowered = admitted(provider, 10.0)
    assert lowered.headers["x-ratelimit-limit-requests"] == "5"
    assert lowered.headers["x-ratelimit-remaining-requests"] == "4"
    raised = admitted(provider, 20.0)
    assert raised.headers["x-ratelimit-limit-requests"] == "100"
    assert raised.headers["x-ratelimit-remaining-requests"] == "4"
    assert admitted(provider, 23.0).headers["x-ratelimit-remaining-requests"] == "53"  # 4 + 3 s * 1000 / 60 - 1


def test_a_change_may_change_the_way_of_speaking() -> None:
    provider = Provider(replace(PLAIN, changes=(Change(1.0, style=Style.AZURE), Change(2.0, style=Style.NONE))))
    assert admitted(provider, 0.0).headers["x-ratelimit-reset-requests"] == "120ms"
    assert admitted(provider, 1.0).headers["x-ratelimit-reset-requests"] == "120"
    assert admitted(provider, 2.0).headers == {}


@pytest.mark.parametrize("window", [None, 10.0])
def test_other_clients_take_their_share_first(window: float | None) -> None:
    """[5]"""
    profile = Profile(requests_per_minute=600, window_seconds=window, cross_requests_per_minute=300)
    provider = Provider(replace(profile, requests_burst=10), 1)
    admitted_times(provider, [number / 50 for number in range(6000)])  # 120 s at five times the limit
    stats = provider.stats
    assert stats.admitted + stats.cross_admitted == pytest.approx(1200, rel=0.05)  # some still wait at the end
    assert stats.cross_admitted == pytest.approx(600, rel=0.1)


@pytest.mark.parametrize("window", [None, 10.0])
def test_other_clients_that_want_more_than_all_give_up_and_leave_no_endless_debt(window: float | None) -> None:
    profile = Profile(requests_per_minute=60, window_seconds=window, cross_requests_per_minute=600)
    provider = Provider(replace(profile, requests_burst=10, changes=(Change(100.0, 100.0),)))
    assert refused(provider, 99.0).scope == "requests"
    assert provider.stats.cross_given_up > 700
    admitted(provider, 102.0)


def test_the_concurrency_limit_counts_who_is_there() -> None:
    provider = Provider(replace(profiles.INSTANT, concurrency=2))
    first = admitted(provider, 0.0)
    admitted(provider, 0.0)
    refusal = refused(provider, 0.0)
    assert (refusal.status, refusal.scope) == (503, "concurrency")
    assert refusal.body["error"]["code"] == "server_is_overloaded"  # type: ignore[index]  # JSON
    provider.leave(first, 1.0)
    admitted(provider, 1.0)
    assert provider.stats.in_flight == 2
    with pytest.raises(KeyError):
        provider.leave(first, 1.0)


def test_times_grow_in_proportion_once_the_knee_is_passed() -> None:
    provider = Provider(replace(PLAIN, requests_per_minute=None, knee=4, first_token_seconds=0.2))
    firsts = [admitted(provider, 0.0).first_token for _ in range(8)]
    assert firsts == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.25, 0.3, 0.35, 0.4])
    assert admitted(provider, 0.0).tokens_per_second == pytest.approx(80 * 4 / 9)


def test_pace_follows_its_distributions() -> None:
    provider = Provider(Profile(first_token_seconds=0.4, first_token_sigma=0.5, output_tokens=200, output_sigma=0.6), 5)
    calls = [admitted(provider, 0.0, Size(4)) for _ in range(4001)]
    assert sorted(call.first_token for call in calls)[2000] == pytest.approx(0.4, rel=0.05)
    assert sum(call.output_tokens for call in calls) / 4001 == pytest.approx(200, rel=0.05)
    capped = admitted(provider, 0.0, Size(4, max_tokens=3))
    assert (capped.output_tokens, capped.capped) == (3, True)
    assert Provider(replace(PLAIN, prompt_tokens_per_second=100)).arrive(0.0, SMALL).first_token == 1.4  # type: ignore[union-attr]  # the first is admitted


def test_speed_divides_every_time() -> None:
    slow, fast = admitted(Provider(PLAIN), 0.0), admitted(Provider(replace(PLAIN, speed=10)), 0.0)
    assert slow.seconds == pytest.approx(10 * fast.seconds)


def test_faults_come_at_their_rates() -> None:
    profile = replace(profiles.INSTANT, error_rate=0.1, reset_rate=0.1, stall_rate=0.1, cut_rate=0.1)
    provider = Provider(replace(profile, abort_rate=0.1, error_event_rate=0.1), 2)
    for _ in range(5000):
        decision = provider.arrive(0.0, SMALL)
        if isinstance(decision, Admitted):
            assert 1 <= decision.fault_after < decision.output_tokens
            provider.leave(decision, 0.0)
        else:
            assert (decision.status, decision.scope) == (500, "error")
    assert set(provider.stats.faults) == {fault.value for fault in Fault}
    for count in (*provider.stats.faults.values(), provider.stats.refused["error"]):
        assert count == pytest.approx(500, rel=0.2)


def test_an_outage_has_a_beginning_and_an_end() -> None:
    provider = Provider(replace(PLAIN, outage=(10.0, 20.0), error_status=502), started=100.0)
    admitted(provider, 109.9)
    assert (refused(provider, 110.0).status, refused(provider, 119.9).scope) == (502, "outage")
    admitted(provider, 120.0)
    assert provider.stats.refusals == 0


def test_money_and_ramp_refusals_are_switches() -> None:
    provider = Provider(PLAIN)
    provider.out_of_money = ALWAYS
    assert refused(provider, 0.0).body["error"]["code"] == "insufficient_quota"  # type: ignore[index]  # JSON
    provider.out_of_money, provider.slow_down = None, ALWAYS
    assert refused(provider, 0.0).body["error"]["code"] == "slow_down"  # type: ignore[index]  # JSON
    provider.slow_down = None
    admitted(provider, 0.0)


@pytest.mark.parametrize("text", ["0", "-1", "NaN", "1e400"])
def test_headers_lie_as_told_wherever_they_are_sent(text: str) -> None:
    names = ("x-ratelimit-remaining-requests", "retry-after", "anthropic-ratelimit-requests-limit")
    provider = Provider(replace(PLAIN, requests_burst=1, lies=tuple((name, text) for name in names)))
    told = admitted(provider, 0.0).headers
    assert told["x-ratelimit-remaining-requests"] == text
    assert "retry-after" not in told
    assert "anthropic-ratelimit-requests-limit" not in told
    assert refused(provider, 0.0).headers["retry-after"] == text


def test_a_stuck_header_never_falls() -> None:
    provider = Provider(replace(PLAIN, remaining_stuck=True))
    for _ in range(10):
        headers = admitted(provider, 0.0).headers
        assert headers["x-ratelimit-remaining-requests"] == headers["x-ratelimit-limit-requests"] == "50"
        assert headers["x-ratelimit-reset-requests"] == "0s"


def test_a_silent_provider_says_at_most_when_to_come_back() -> None:
    silent = replace(PLAIN, requests_burst=1, style=Style.NONE)
    provider, mute = Provider(silent), Provider(replace(silent, retry_after=False))
    assert admitted(provider, 0.0).headers == admitted(mute, 0.0).headers == {}
    assert refused(provider, 0.0).headers == {"retry-after": "1"}
    assert refused(mute, 0.0).headers == {}


def test_dates_are_those_of_the_wall_clock() -> None:
    noon = datetime(2026, 2, 3, 12, 0, 0, tzinfo=UTC).timestamp()
    provider = Provider(replace(PLAIN, style=Style.ANTHROPIC), started=50.0, epoch=noon - 50.0)
    headers = admitted(provider, 55.0).headers
    assert headers["anthropic-ratelimit-requests-reset"] == "2026-02-03T12:00:05Z"  # 0.12 s cut off: already past
    assert headers["retry-after"] == "1"  # on a success


@pytest.mark.parametrize(
    "wrong",
    [
        {"error_rate": 0.6, "cut_rate": 0.6},
        {"changes": (Change(2.0), Change(1.0))},
        {"window_seconds": 0.0},
        {"speed": 0.0},
        {"knee": 0},
        {"requests_per_minute": -1},
        {"tokens_per_minute": inf},
        {"requests_burst": 0},
        {"changes": (Change(1.0, -2.0),)},
    ],
)
def test_a_profile_that_makes_no_sense_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="must"):
        Profile(**wrong)  # type: ignore[arg-type]  # one field of any type


def test_the_longest_wait_told_is_the_time_to_fill() -> None:
    provider = Provider(Profile(requests_per_minute=1))
    admitted(provider, 0.0)
    refusal = refused(provider, 0.0)
    assert refusal.wait is not None
    assert ceil(refusal.wait) == 60 < inf
