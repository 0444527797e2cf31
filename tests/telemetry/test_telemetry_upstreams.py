"""What is told of upstreams: attempts under way, retries, cool-downs, circuits, connections, headroom."""

from __future__ import annotations

import math

import pytest

from proxy.config import Settings
from proxy.core.headers import Kind
from proxy.core.learner import Limit, Snapshot, Source
from proxy.core.outcome import Meaning, Outcome, Reason, Retry
from proxy.telemetry import AccountLevel, ConnectionLevel, GateLevel, Labels, Levels
from tests.telemetry.house import house, settings, upstream

PAIR = {"provider": "openai", "model": "gpt-4o-mini"}
FULL = Meaning(Outcome.OVERLOADED, Reason.FULL, Retry.BACKOFF)
THROTTLED = Meaning(Outcome.THROTTLED, Reason.TOKENS, Retry.PACED)


def _known(*limits, hold=0.0):
    return Snapshot(
        limits, hold_seconds=hold, cold_calls=None, unanswered=0, tokens_per_second_max=None, reserved=0.0, used=0.0
    )


def _limit(kind, *, per_minute, level, burst=None, source=Source.HEADERS, name=""):
    return Limit(name or kind.value, kind, source, per_minute, burst, level, 0.0, None, 0)


def test_attempts_and_sleepers_are_read_from_the_calls_themselves(gateway, telemetry, scrape, clock):
    record = gateway.begin()
    with telemetry.request(record):
        assert scrape(telemetry)("upstream_in_flight", provider="openai") == 0
        with telemetry.attempt(record, "openai", "gpt-4o-mini") as attempt:
            told = scrape(telemetry)
            assert told("upstream_in_flight", provider="openai") == 1
            assert told("upstream_in_flight", provider="local") == 0
            assert told("backoff_sleepers", provider="openai") == 0
            attempt.meaning = FULL
        told = scrape(telemetry)
        assert told("upstream_in_flight", provider="openai") == 0
        assert told("backoff_sleepers", provider="openai") == 1
        with telemetry.attempt(record, "local", "gpt-4o-mini"):
            told = scrape(telemetry)
            assert told("upstream_in_flight", provider="local") == 1
            assert told("backoff_sleepers", provider="openai") == 0
            record.first_byte = clock()
    told = scrape(telemetry)
    assert told.total("upstream_in_flight") == told.total("backoff_sleepers") == 0


def test_requests_in_flight_are_told_by_their_age(gateway, telemetry, scrape, clock):
    with telemetry.request(gateway.begin()):
        clock.wait(290)
        with telemetry.request(gateway.begin()):
            clock.wait(10)
            with telemetry.request(gateway.begin()):
                told = scrape(telemetry)
                ages = {age: told("requests_in_flight_age", age=age) for age in ("0-10s", "10-60s", "60-300s", "300s+")}
                assert ages == {"0-10s": 1, "10-60s": 1, "60-300s": 0, "300s+": 1}
    assert scrape(telemetry).total("requests_in_flight_age") == 0


def test_another_provider_than_the_one_before_is_a_fallback(gateway, telemetry, scrape):
    gateway.retried()
    told = scrape(telemetry)
    assert told("fallbacks_total", from_provider="openai", to_provider="local", reason="requests") == 1
    assert told.total("fallbacks_total") == 1
    assert told.total("upstream_retries_exhausted_total") == 0


def _failing(gateway, telemetry, *, outcome, attempts=2, meaning=FULL):
    record = gateway.begin()
    with telemetry.request(record):
        for _ in range(attempts):
            with telemetry.attempt(record, "openai", "gpt-4o-mini") as attempt:
                attempt.status, attempt.meaning = 503, meaning
        record.upstream = "openai"
        record.status, record.outcome = 503, outcome
        record.error_type, record.error_source = "overloaded", "upstream"


def test_a_request_that_ends_in_a_failure_worth_another_attempt_has_exhausted_its_retries(gateway, telemetry, scrape):
    _failing(gateway, telemetry, outcome=Outcome.OVERLOADED)
    told = scrape(telemetry)
    assert told("upstream_retries_exhausted_total", **PAIR, reason="full") == 1
    assert told("upstream_retries_total", **PAIR, reason="full") == 1
    assert told.total("fallbacks_total") == 0


@pytest.mark.parametrize(
    ("outcome", "meaning"),
    [
        (Outcome.CANCELLED, FULL),  # the client did not wait for it
        (Outcome.REJECTED, Meaning(Outcome.REJECTED, Reason.CALLER, Retry.NEVER)),
    ],
)
def test_retries_that_were_not_wanted_are_not_exhausted(gateway, telemetry, scrape, outcome, meaning):
    _failing(gateway, telemetry, outcome=outcome, meaning=meaning, attempts=1)
    assert scrape(telemetry).total("upstream_retries_exhausted_total") == 0


def test_a_cooldown_is_counted_once_for_those_who_were_refused_together(gateway, telemetry, scrape):
    for cooled in (True, False, False):
        record = gateway.begin()
        with telemetry.request(record), telemetry.attempt(record, "openai", "gpt-4o-mini") as attempt:
            attempt.status, attempt.meaning, attempt.cooled = 429, THROTTLED, cooled
    told = scrape(telemetry)
    assert told("cooldowns_total", provider="openai", cause="tokens") == told.total("cooldowns_total") == 1
    assert told.total("rate_limited_total") == 3


def test_a_circuit_is_in_one_state_and_its_changes_are_counted(telemetry, scrape):
    def states(provider):
        return {state: told("circuit_state", provider=provider, state=state) for state in ("closed", "limited", "shut")}

    told = scrape(telemetry)
    assert states("openai") == states("local") == {"closed": 1, "limited": 0, "shut": 0}
    for state in ("closed", "limited", "limited", "shut", "closed", "shut"):
        telemetry.circuit("openai", state)
    told = scrape(telemetry)
    assert states("openai") == {"closed": 0, "limited": 0, "shut": 1}
    assert states("local") == {"closed": 1, "limited": 0, "shut": 0}
    changes = {state: told("circuit_transitions_total", provider="openai", to=state) for state in states("openai")}
    assert changes == {"closed": 1, "limited": 1, "shut": 2}
    telemetry.relabel(Labels(upstreams=("local",)))
    assert not scrape(telemetry).has("circuit_state", provider="openai", state="shut")
    telemetry.relabel(Labels(upstreams=("local", "openai")))
    assert scrape(telemetry)("circuit_state", provider="openai", state="closed") == 1


def test_moves_of_a_limit_are_counted_with_what_moved_it(telemetry, scrape):
    telemetry.limit_changed("upstream/openai", "down", "upstream_429")
    telemetry.limit_changed("upstream/openai", "up", "odd")
    told = scrape(telemetry)
    assert told("gate_limit_changes_total", gate="upstream/openai", direction="down", cause="upstream_429") == 1
    assert told("gate_limit_changes_total", gate="upstream/openai", direction="up", cause="other") == 1


def test_a_limit_is_told_with_its_bounds(telemetry, scrape):
    gates = [GateLevel("process", 1000.0, 0, {}), GateLevel("upstream/openai", 20.0, 0, {}, bounds=(4.0, 64.0))]
    telemetry.levels(lambda: Levels(gates=gates))
    told = scrape(telemetry)
    assert [told("gate_limit_bound", gate="process", bound=bound) for bound in ("min", "max")] == [1000, 1000]
    assert [told("gate_limit_bound", gate="upstream/openai", bound=bound) for bound in ("min", "max")] == [4, 64]


def test_connections_are_told_as_they_stand_and_as_they_came(telemetry, scrape):
    levels = [
        ConnectionLevel("openai", 3, 5, 100, opened=1, acquired=3),
        ConnectionLevel("local", 1, 0, 0, opened=1, acquired=1),
        ConnectionLevel("odd", 1, 1, 1, opened=1, acquired=1),
    ]
    telemetry.levels(lambda: Levels(connections=levels))
    notes = telemetry.connections
    notes.waited("openai", 0.2)
    notes.connected("openai", 0.03)
    notes.failed("local", "tcp")
    told = scrape(telemetry)
    assert told("upstream_connections", provider="openai", state="active") == 3
    assert told("upstream_connections", provider="openai", state="idle") == 5
    assert told("upstream_connections_limit", provider="openai") == 100
    assert told("upstream_connections_limit", provider="local") == math.inf
    assert not told.has("upstream_connections", provider="odd", state="idle")
    assert told("upstream_connection_acquires_total", provider="openai", how="new") == 1
    assert told("upstream_connection_acquires_total", provider="openai", how="reused") == 2
    assert told("upstream_connection_wait_seconds_sum", provider="openai") == pytest.approx(0.2)
    assert told("upstream_connect_seconds_sum", provider="openai") == pytest.approx(0.03)
    assert told("upstream_connect_errors_total", provider="local", reason="tcp") == 1
    assert told("upstream_connect_errors_total", provider="openai", reason="tls") == 0


def test_headroom_is_the_scarcest_limit_of_its_kind(telemetry, scrape, clock):
    room = {"provider": "openai", "credential": "openai", "model": "gpt-4o-mini"}
    limits = (
        _limit(Kind.REQUESTS, per_minute=600.0, level=30.0, burst=600.0),
        _limit(Kind.TOKENS, per_minute=60_000.0, level=60_000.0, burst=60_000.0, name="tokens-minute"),
        _limit(Kind.TOKENS, per_minute=1000.0, level=-5.0, burst=1_440_000.0, name="tokens-day"),
        _limit(Kind.INPUT_TOKENS, per_minute=50.0, level=1.0, source=Source.CONFIGURED),
    )
    telemetry.levels(lambda: Levels(accounts=[AccountLevel("openai", "gpt-4o-mini", _known(*limits))]))
    told = scrape(telemetry)
    assert told("ratelimit_limit", **room, kind="requests") == 600
    assert told("ratelimit_remaining", **room, kind="requests") == 30
    full = told("ratelimit_reset_timestamp_seconds", **room, kind="requests")
    assert full == pytest.approx(clock.wall() + 57.0)
    assert told("ratelimit_limit", **room, kind="tokens") == 1_440_000
    assert told("ratelimit_remaining", **room, kind="tokens") == 0
    assert told.has("ratelimit_remaining", **room, kind="tokens")
    assert not told.has("ratelimit_limit", **room, kind="input_tokens")


def test_headroom_is_as_fresh_as_the_last_answer(gateway, telemetry, scrape, clock):
    room = {"provider": "openai", "credential": "openai", "model": "gpt-4o-mini"}
    known = _known(_limit(Kind.REQUESTS, per_minute=600.0, level=30.0))
    telemetry.levels(lambda: Levels(accounts=[AccountLevel("openai", "gpt-4o-mini", known)]))
    assert not scrape(telemetry).has("ratelimit_observed_timestamp_seconds", **room)
    gateway.plain()
    answered = clock.wall()
    clock.wait(600)
    told = scrape(telemetry)
    assert told("ratelimit_observed_timestamp_seconds", **room) == pytest.approx(answered)
    assert not told.has("ratelimit_reset_timestamp_seconds", **room, kind="requests")  # its burst is not known


def test_the_longest_hold_of_a_provider_s_models_is_its_cooldown(telemetry, scrape, clock):
    accounts = [
        AccountLevel("openai", "gpt-4o-mini", _known(hold=3.0)),
        AccountLevel("openai", "fast", _known(hold=20.0)),
        AccountLevel("odd", "fast", _known(hold=9.0)),
    ]
    telemetry.levels(lambda: Levels(accounts=accounts))
    told = scrape(telemetry)
    assert told("cooldown_until_timestamp_seconds", provider="openai") == pytest.approx(clock.wall() + 20.0)
    assert told("cooldown_until_timestamp_seconds", provider="local") == 0
    assert told.has("cooldown_until_timestamp_seconds", provider="local")
    assert not told.has("cooldown_until_timestamp_seconds", provider="odd")


def test_how_late_the_event_loop_is(telemetry, scrape):
    for late in (0.0, 0.004, 0.3, -0.001):
        telemetry.beat(late)
    told = scrape(telemetry)
    assert told("event_loop_lag_seconds_count") == 4
    assert told("event_loop_lag_seconds_bucket", le="0.005") == 3
    assert told("event_loop_lag_seconds_sum") == pytest.approx(0.304)


def test_the_stages_of_a_call_are_its_own_time_without_the_waits(gateway, telemetry, scrape, clock):
    record = gateway.begin()
    record.auth_seconds = 0.001
    with telemetry.request(record):
        record.body_read = clock()
        clock.wait(0.002)
        record.routed = started = clock()
        clock.wait(5.0)
        record.waited("queue", started, clock(), gate="process", result="admitted")
        clock.wait(0.003)
        with telemetry.attempt(record, "openai", "gpt-4o-mini") as attempt:
            clock.wait(0.004)
            attempt.sent = clock()
            clock.wait(2.0)
            record.first_byte = clock()
            record.relay_seconds, record.last_byte = 0.005, clock()
            clock.wait(0.006)
    told = scrape(telemetry)
    sums = {stage: told("stage_duration_seconds_sum", stage=stage) for stage in ("auth", "parse", "route", "send")}
    sums |= {stage: told("stage_duration_seconds_sum", stage=stage) for stage in ("relay", "usage", "log")}
    assert sums == pytest.approx(
        {"auth": 0.001, "parse": 0.002, "route": 0.003, "send": 0.004, "relay": 0.005, "usage": 0.006, "log": 0.0},
        abs=1e-9,
    )
    assert {told("stage_duration_seconds_count", stage=stage) for stage in sums} == {1}


async def test_a_reload_that_moves_a_gate_is_a_change_by_hand(tmp_path):
    def said(places: int) -> Settings:
        return settings({"up": upstream("http://127.0.0.1:9/v1", limits={"concurrency": places, "learn": False})})

    async with house(said(8), tmp_path, load=lambda: said(next(sizes))) as gateway:
        sizes = iter((4, 4, 16))
        for _ in range(3):
            await gateway.gateway.reload()
        metrics = await gateway.metrics()
    moved = {"gate": "upstream/up", "cause": "manual"}
    assert metrics("gate_limit_changes_total", **moved, direction="down") == 1
    assert metrics("gate_limit_changes_total", **moved, direction="up") == 1
    assert metrics("gate_limit_changes_total", cause="manual") == 2
