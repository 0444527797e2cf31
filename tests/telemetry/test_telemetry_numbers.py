"""What is counted for a call, exactly; and that nothing a request says makes a series."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from dataclasses import dataclass
from threading import Event, Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from proxy.core.gate import Gate, Priority, State
from proxy.core.learner import Size
from proxy.core.outcome import Outcome, Reason, of_failure
from proxy.core.pool import Pool
from proxy.telemetry import GateLevel, Labels, Levels, Pause, Record, Tracing, server_timing
from proxy.telemetry.catalogue import CODE_OF

OPENMETRICS = "application/openmetrics-text"
PAIR = {"provider": "openai", "model": "gpt-4o-mini"}


def test_a_plain_call_counts_once_everywhere(gateway, telemetry, scrape):
    gateway.plain()
    told = scrape(telemetry)
    call = {"operation": "chat", "model": "gpt-4o-mini", "stream": "false", "code": "200", "outcome": "ok"}
    assert told("requests_total", **call) == told.total("requests_total") == 1
    assert told.total("request_errors_total") == 0
    assert told.total("client_disconnects_total") == 0
    shape = {"model": "gpt-4o-mini", "stream": "false", "outcome": "ok"}
    assert told("request_duration_seconds_sum", **shape) == pytest.approx(1.003)
    assert told("request_duration_seconds_bucket", **shape, le="1.0") == 0
    assert told("request_duration_seconds_bucket", **shape, le="2.5") == 1
    assert told("request_duration_seconds_bucket", **shape, le="+Inf") == 1
    assert told("request_bytes_total", operation="chat", direction="in") == 500
    assert told("request_bytes_total", operation="chat", direction="out") == 900
    gate = {"gate": "process", "priority": "default"}
    assert told("gate_admissions_total", **gate, result="immediate") == told.total("gate_admissions_total") == 1
    assert told("gate_queue_wait_seconds_bucket", **gate, result="admitted", le="0.001") == 1
    assert told("upstream_attempts_total", **PAIR, result="ok") == told.total("upstream_attempts_total") == 1
    assert told("upstream_attempt_duration_seconds_sum", **PAIR, outcome="ok") == pytest.approx(1.0)
    assert told("request_attempts_bucket", model="gpt-4o-mini", le="1.0") == 1
    assert told("overhead_seconds_sum", stream="false") == pytest.approx(0.003)
    assert told("tokens_total", **PAIR, type="input") == 100
    assert told("tokens_total", **PAIR, type="output") == 11
    assert told("input_tokens_cached_total", **PAIR) == 40
    assert told("input_tokens_cache_write_total", **PAIR) == 5
    assert told("output_tokens_reasoning_total", **PAIR) == 3
    assert told.total("usage_missing_total") == 0
    assert told.total("time_to_first_token_seconds_count") == 0


def test_a_stream_tells_its_first_token_its_pace_and_its_longest_gap(gateway, telemetry, scrape):
    gateway.streamed()
    told = scrape(telemetry)
    assert told("time_to_first_token_seconds_sum", **PAIR) == pytest.approx(1.3)
    assert told("upstream_time_to_first_token_seconds_sum", **PAIR) == pytest.approx(1.0)
    assert told("time_per_output_token_seconds_sum", **PAIR) == pytest.approx(2.0 / 10)
    assert told("stream_max_gap_seconds_sum", **PAIR) == pytest.approx(0.4)
    waited = {"gate": "model/gpt-4o-mini", "priority": "default"}
    assert told("gate_admissions_total", **waited, result="queued") == 1
    assert told("gate_queue_wait_seconds_sum", **waited, result="admitted") == pytest.approx(0.3)
    assert told.total("gate_queue_wait_seconds_count") == 1
    assert told.total("stream_aborts_total") == 0


def test_a_retry_counts_two_attempts_one_request_and_the_pause_between(gateway, telemetry, scrape):
    gateway.retried()
    told = scrape(telemetry)
    assert told.total("requests_total") == 1
    assert told("upstream_attempts_total", **PAIR, result="429") == 1
    assert told("upstream_attempts_total", provider="local", model="gpt-4o-mini", result="ok") == 1
    assert told("upstream_retries_total", **PAIR, reason="requests") == told.total("upstream_retries_total") == 1
    assert told("rate_limited_total", source="upstream", **PAIR, scope="requests") == 1
    assert told.total("rate_limited_total") == 1
    assert told("backoff_seconds_sum", provider="openai", source="retry_after") == pytest.approx(2.0)
    assert told("request_attempts_bucket", model="gpt-4o-mini", le="1.0") == 0
    assert told("request_attempts_bucket", model="gpt-4o-mini", le="2.0") == 1
    assert told("tokens_total", provider="local", model="gpt-4o-mini", type="output") == 11


def test_a_client_that_left_is_no_error(gateway, telemetry, scrape):
    gateway.left()
    told = scrape(telemetry)
    call = {"operation": "chat", "model": "gpt-4o-mini", "stream": "true", "outcome": "cancelled"}
    assert told("requests_total", **call, code="200") == 1
    assert told("client_disconnects_total", operation="chat", phase="streaming") == 1
    assert told("stream_aborts_total", **PAIR, reason="client_disconnect") == 1
    assert told("upstream_attempts_total", **PAIR, result="cancelled") == 1
    assert told("usage_missing_total", **PAIR, reason="aborted") == 1
    assert told.total("request_errors_total") == 0
    assert told.total("label_overflow_total") == 0


@pytest.mark.parametrize(("attempted", "phase"), [(False, "queued"), (True, "waiting")])
def test_a_client_that_leaves_early_is_told_by_its_phase(gateway, telemetry, scrape, attempted, phase):
    record = gateway.begin()
    with suppress(asyncio.CancelledError), telemetry.request(record):
        if attempted:
            with telemetry.attempt(record, "openai", "gpt-4o-mini", "h", 1):
                raise asyncio.CancelledError
        raise asyncio.CancelledError
    told = scrape(telemetry)
    assert told("client_disconnects_total", operation="chat", phase=phase) == 1
    assert told.total("stream_aborts_total") == 0


def test_a_refusal_of_the_gate_is_a_429_of_ours(gateway, telemetry, scrape):
    gateway.refused()
    told = scrape(telemetry)
    refusal = {"source": "gateway", "provider": "none", "model": "gpt-4o-mini", "scope": "concurrency"}
    assert told("rate_limited_total", **refusal) == told.total("rate_limited_total") == 1
    assert told("gate_admissions_total", gate="model/gpt-4o-mini", priority="default", result="rejected_full") == 1
    error = {"operation": "chat", "model": "gpt-4o-mini", "source": "gateway", "error_type": "queue_full"}
    assert told("request_errors_total", **error) == told.total("request_errors_total") == 1
    assert told.total("upstream_attempts_total") == 0
    assert told.total("request_attempts_count") == 0


@pytest.mark.parametrize(
    ("reason", "result", "abort"),
    [
        (Reason.IDLE, "timeout", "idle_timeout"),
        (Reason.RESET, "reset", "upstream_reset"),
        (Reason.EOF, "eof", "upstream_eof"),
        (Reason.GARBAGE, "garbage", "malformed_sse"),
        (Reason.ERROR_EVENT, "error_event", "error_event"),
    ],
)
def test_a_stream_that_breaks_is_an_abort_under_status_200(gateway, telemetry, scrape, clock, reason, result, abort):
    record = gateway.begin(stream=True)
    with telemetry.request(record):
        with telemetry.attempt(record, "openai", "gpt-4o-mini", "h", 1) as attempt:
            attempt.status, record.status, record.upstream = 200, 200, "openai"
            record.first_byte = clock()
            attempt.meaning = of_failure(reason, begun=True)
        record.outcome, record.end_reason = attempt.meaning.outcome, reason.value
    told = scrape(telemetry)
    assert told("upstream_attempts_total", **PAIR, result=result) == 1
    assert told("stream_aborts_total", **PAIR, reason=abort) == told.total("stream_aborts_total") == 1
    assert told("usage_missing_total", **PAIR, reason="aborted") == 1


def test_an_upstream_error_passed_on_to_a_streaming_client_is_no_abort(gateway, telemetry, scrape, clock):
    record = gateway.begin(stream=True)
    with telemetry.request(record):
        gateway._try(record, of_failure(Reason.CONNECT, begun=False), 503, 0.1)
        record.status, record.outcome, record.first_byte = 503, Outcome.OVERLOADED, clock()
    assert scrape(telemetry).total("stream_aborts_total") == 0


@pytest.mark.parametrize(("unread", "reason"), [(False, "no_usage"), (True, "parse_error")])
def test_an_answer_without_usage_is_told_as_missing(gateway, telemetry, scrape, unread, reason):
    record = gateway.begin()
    with telemetry.request(record):
        gateway.plain()
        gateway._try(record, gateway.plain().attempts[0].meaning, 200, 1.0)
        record.outcome, record.usage_unread = Outcome.OK, unread
    assert scrape(telemetry)("usage_missing_total", **PAIR, reason=reason) == 1


@pytest.mark.parametrize(
    ("status", "code"),
    [(200, "200"), (204, "2xx_other"), (418, "4xx_other"), (499, "499"), (529, "529"), (599, "5xx_other")],
)
def test_a_status_outside_the_list_is_told_by_its_class(status, code):
    assert CODE_OF[status] == code


def test_a_call_is_in_flight_from_its_arrival_to_its_end(gateway, telemetry, scrape, clock):
    record = gateway.begin(stream=True)
    with telemetry.request(record):
        assert scrape(telemetry)("requests_in_flight", operation="chat") == 1
        assert scrape(telemetry)("streams_in_flight") == 0
        record.first_byte = clock()
        assert scrape(telemetry)("streams_in_flight") == 1
    assert scrape(telemetry)("requests_in_flight", operation="chat") == 0
    assert scrape(telemetry)("streams_in_flight") == 0


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, KeyboardInterrupt, SystemExit])
def test_an_exception_passes_through_and_the_call_is_counted_once(gateway, telemetry, scrape, error):
    record = gateway.begin()
    block = telemetry.request(record)
    with pytest.raises(error), block:
        raise error
    block.__exit__(None, None, None)
    told = scrape(telemetry)
    assert told("requests_in_flight", operation="chat") == 0
    assert told.total("requests_total") == 1


def test_ten_thousand_made_up_names_make_no_series(gateway, telemetry, scrape):
    gateway.plain(model="other")
    before = len(scrape(telemetry))
    for number in range(10_000):
        gateway.plain(model=f"made-up-{number}")
    told = scrape(telemetry)
    assert len(told) == before
    call = {"operation": "chat", "model": "other", "stream": "false", "code": "200", "outcome": "ok"}
    assert told("requests_total", **call) == 10_001
    assert told("label_overflow_total", label="model") >= 10_000


def test_no_word_in_a_record_makes_a_label_value(gateway, telemetry, scrape, clock):
    record = gateway.begin()
    with telemetry.request(record):
        record.outcome = Outcome.FAILED
        record.operation = record.priority = record.gate = record.admitted = "odd"
        record.error_type = record.error_source = record.end_reason = record.upstream = "odd"
        record.pauses.append(Pause("queue", clock(), clock(), gate="odd", result="odd"))
        record.pauses.append(Pause("backoff", clock(), clock(), source="odd"))
        with telemetry.attempt(record, "odd", "odd", "h", 1):
            pass
        assert scrape(telemetry)("requests_in_flight", operation="other") == 1
    body, _ = telemetry.exposition("")
    assert b'"odd"' not in body


def test_a_label_holds_no_more_than_its_cap(make, gateway_of, scrape):
    models = tuple(f"model-{number}" for number in range(250))
    telemetry = make(Labels(models=models, upstreams=("openai",), gates=("process",)))
    gateway = gateway_of(telemetry)
    for model in models:
        gateway.plain(model=model)
    told = scrape(telemetry)
    seen = {dict(labels)["model"] for name, labels in told if name == "penstock_requests_total"}
    assert len(seen) == 201
    assert "other" in seen
    assert told.total("requests_total") == 250


def test_a_reload_keeps_the_numbers_of_names_that_stay_and_drops_the_others(gateway, telemetry, scrape):
    gateway.plain(model="fast")
    gateway.plain()
    telemetry.relabel(Labels(models=("gpt-4o-mini", "new"), upstreams=("openai",), gates=("process", "model/new")))
    told = scrape(telemetry)
    call = {"operation": "chat", "stream": "false", "code": "200", "outcome": "ok"}
    assert told("requests_total", **call, model="gpt-4o-mini") == 1
    assert not told.has("requests_total", **call, model="fast")
    assert b'"fast"' not in telemetry.exposition("")[0]
    assert b'"upstream/openai"' not in telemetry.exposition("")[0]
    assert told.has("gate_admissions_total", gate="model/new", priority="default", result="queued")
    gateway.plain()
    assert scrape(telemetry)("requests_total", **call, model="gpt-4o-mini") == 2


def test_levels_are_read_at_the_scrape(telemetry, scrape):
    levels = [GateLevel("process", 1000.0, 3, {"batch": 7}, queue_limit=10_000)]
    telemetry.levels(lambda: Levels(gates=levels))
    told = scrape(telemetry)
    assert told("gate_limit", gate="process") == 1000
    assert told("gate_in_use", gate="process") == 3
    assert told("gate_queue_depth", gate="process", priority="batch") == 7
    assert told.has("gate_queue_depth", gate="process", priority="interactive")
    assert told("gate_queue_limit", gate="process") == 10_000
    levels[:] = [GateLevel("upstream/openai", float("inf"), 0, {}), GateLevel("never/configured", 1.0, 1, {})]
    told = scrape(telemetry)
    assert told("gate_limit", gate="upstream/openai") == float("inf")
    assert not told.has("gate_limit", gate="process")
    assert not told.has("gate_queue_limit", gate="upstream/openai")
    assert not told.has("gate_limit", gate="never/configured")


@dataclass(frozen=True, eq=False)
class Anywhere:
    """A target that takes from no pool of its own."""

    pools: tuple[Pool, ...] = ()
    account: Pool | None = None


def test_the_rate_of_what_a_gate_counted_is_the_mean_of_its_history(telemetry, scrape, clock):
    """Two places, of which one is held throughout, another for half of the time; a third call waits as long."""
    gate = Gate(Pool("process", "process", 2), queue_limit=10)
    to = (Anywhere(),)

    def levels():
        told = gate.levels([gate.process], clock())
        held = [
            GateLevel(
                each.label, 2.0, each.in_use, {}, None, None, each.held_seconds, each.queued_seconds, each.full_seconds
            )
            for each in told
        ]
        return Levels(gates=held)

    telemetry.levels(levels)
    before, began = scrape(telemetry), clock()
    stays = gate.ask(clock(), to, Size(), priority=Priority.DEFAULT)
    clock.wait(30.0)
    comes = gate.ask(clock(), to, Size(), priority=Priority.DEFAULT)
    waits = gate.ask(clock(), to, Size(), priority=Priority.DEFAULT)
    clock.wait(30.0)
    after = scrape(telemetry)
    assert [ticket.state for ticket in (stays, comes, waits)] == [State.HELD, State.HELD, State.WAITING]
    for family, mean in (("permit", 1.5), ("queue", 0.5), ("saturated", 0.5)):
        name = f"gate_{family}_seconds_total"
        grown = after(name, gate="process") - before(name, gate="process")
        assert grown / (clock() - began) == pytest.approx(mean), family


def test_reloads_draining_and_build_are_told(make, scrape, clock):
    telemetry = make(version="1.2.3", revision="abc")
    told = scrape(telemetry)
    began = clock.wall()
    assert told.total("build_info") == 1
    assert told("config_last_reload_successful") == 1
    assert told("config_last_reload_success_timestamp_seconds") == began
    clock.wait(60)
    telemetry.reloaded(False)
    telemetry.draining(True)
    told = scrape(telemetry)
    assert told("config_reloads_total", result="failure") == 1
    assert told("config_last_reload_successful") == 0
    assert told("config_last_reload_success_timestamp_seconds") == began
    assert told("draining") == 1
    telemetry.reloaded(True)
    told = scrape(telemetry)
    assert told("config_reloads_total", result="success") == 1
    assert told("config_last_reload_successful") == 1
    assert told("config_last_reload_success_timestamp_seconds") == began + 60
    assert b'revision="abc",version="1.2.3"' in telemetry.exposition("")[0]


SECONDS = st.floats(min_value=0, max_value=900)


@given(waits=st.tuples(SECONDS, SECONDS, SECONDS, SECONDS), own=SECONDS)
def test_overhead_is_the_total_less_the_union_of_the_waits(waits, own):
    record = Record("r", "chat", "POST", "/", arrived=5.0, began=0.0)
    record.queue_seconds, record.backoff_seconds, record.upstream_seconds, record.client_seconds = waits
    record.ended = 5.0 + sum(waits) + own
    assert record.overhead_seconds == pytest.approx(own, abs=1e-9)
    assert record.overhead_seconds >= 0


def test_server_timing_tells_where_the_time_went_until_now():
    record = Record("r", "chat", "POST", "/", arrived=5.0, began=0.0)
    record.queue_seconds, record.upstream_seconds = 0.0012, 0.3105
    assert server_timing(record, 5.3121) == (
        "queue;dur=1.2, backoff;dur=0.0, upstream;dur=310.5, ttft;dur=312.1, overhead;dur=0.4"
    )


@pytest.mark.parametrize(
    ("accept", "kind"),
    [
        ("", "text/plain; version=0.0.4; charset=utf-8"),
        ("*/*", "text/plain; version=0.0.4; charset=utf-8"),
        ("text/plain;version=1.0.0", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text;q=0,text/plain", "text/plain; version=0.0.4; charset=utf-8"),
        ("application/openmetrics-text", "application/openmetrics-text; version=1.0.0; charset=utf-8"),
        (
            "text/html, Application/OpenMetrics-Text; version=x",
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
        ),
    ],
)
def test_openmetrics_is_for_those_who_ask_for_it(telemetry, accept, kind):
    assert telemetry.exposition(accept)[1] == kind


def _exemplars(telemetry):
    body, _ = telemetry.exposition(OPENMETRICS)
    return [
        (sample.name, sample.exemplar)
        for family in parse_openmetrics(body.decode())
        for sample in family.samples
        if sample.exemplar is not None
    ]


def test_an_exemplar_names_the_trace_of_a_call_that_is_kept(make, gateway_of, collector, clock):
    telemetry = make(tracing=Tracing(endpoint=collector.url, ratio=0.0))
    gateway = gateway_of(telemetry)
    gateway.plain()
    assert _exemplars(telemetry) == []
    trace_id = "0af7651916cd43dd8448eb211c80319c"
    gateway.streamed(traceparent=f"00-{trace_id}-b7ad6b7169203331-01")
    told = dict(_exemplars(telemetry))
    duration = told["penstock_request_duration_seconds_bucket"]
    assert duration.labels == {"trace_id": trace_id}
    assert duration.value == pytest.approx(3.3)
    assert float(duration.timestamp) == pytest.approx(clock.wall(), abs=1e-3)
    assert told["penstock_time_to_first_token_seconds_bucket"].value == pytest.approx(1.3)
    assert trace_id.encode() not in telemetry.exposition("")[0]


def test_without_a_collector_no_trace_is_kept_and_no_exemplar_points_to_one(gateway, telemetry):
    gateway.retried()
    assert _exemplars(telemetry) == []


def test_scrapes_at_the_same_time_share_one_render(telemetry):
    entered, release, renders, bodies = Event(), Event(), [], []

    def slow_levels():
        renders.append(1)
        entered.set()
        release.wait()
        return Levels()

    telemetry.levels(slow_levels)
    scrapes = [Thread(target=lambda: bodies.append(telemetry.exposition(""))) for _ in range(4)]
    scrapes[0].start()
    entered.wait()
    for scrape in scrapes[1:]:
        scrape.start()
    while not all(_waits_for_a_result(scrape) for scrape in scrapes[1:]):
        pass
    release.set()
    for scrape in scrapes:
        scrape.join()
    assert len(renders) == 1
    assert len({id(body) for body, _ in bodies}) == 1


def _waits_for_a_result(thread):
    frame = sys._current_frames().get(thread.ident)
    while frame is not None:
        if frame.f_code.co_name == "result":
            return True
        frame = frame.f_back
    return False


def test_a_scrape_that_fails_does_not_fail_the_next_one(telemetry):
    def broken():
        raise RuntimeError("a gate is being swapped")

    telemetry.levels(broken)
    with pytest.raises(RuntimeError):
        telemetry.exposition("")
    telemetry.levels(Levels)
    assert telemetry.exposition("")[0]
