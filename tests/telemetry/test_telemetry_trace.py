"""Trace context in and out, and which traces are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.core.outcome import Outcome
from proxy.telemetry import Tracing, trace

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"00-{TRACE}-{SPAN}-02", False),
        (f"01-{TRACE}-{SPAN}-01", True),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like", True),
    ],
)
def test_a_valid_traceparent_is_taken(header, sampled):
    assert trace.parse(header) == trace.Parent(int(TRACE, 16), int(SPAN, 16), sampled)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "00",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-01-",
        f"cc-{TRACE}-{SPAN}-01.more",
        f"ff-{TRACE}-{SPAN}-01",
        f"0-{TRACE}-{SPAN}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN.upper()}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-0x",
        f" 00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
        f"00_{TRACE}_{SPAN}_01",
        f"00-{TRACE}-{SPAN}-\u0660\u0661",
    ],
)
def test_an_invalid_traceparent_begins_a_new_trace(gateway, header):
    assert trace.parse(header) is None
    record = gateway.begin(traceparent=header)
    assert record.trace_id != int(TRACE, 16)
    assert record.parent_span_id == 0
    assert not record.trace_sampled


@given(st.text())
def test_no_traceparent_crashes_the_reader(header):
    trace.parse(header)


@given(trace_id=st.integers(1, (1 << 128) - 1), span_id=st.integers(1, (1 << 64) - 1), sampled=st.booleans())
def test_what_is_sent_on_can_be_read_again(trace_id, span_id, sampled):
    assert trace.parse(trace.header(trace_id, span_id, sampled=sampled)) == trace.Parent(trace_id, span_id, sampled)


def test_the_upstream_is_told_the_asker_s_trace_and_the_attempt_as_parent(gateway, telemetry):
    record = gateway.begin(traceparent=f"00-{TRACE}-{SPAN}-01", tracestate=" vendor=1,other=2 ")
    with telemetry.attempt(record, "openai", "gpt-4o-mini", "h", 1) as attempt:
        assert telemetry.trace_headers(record, attempt) == {
            "traceparent": f"00-{TRACE}-{attempt.span_id:016x}-01",
            "tracestate": "vendor=1,other=2",
        }
    assert record.parent_span_id == int(SPAN, 16)
    assert attempt.span_id not in (0, record.span_id, record.parent_span_id)


@given(st.integers(1, (1 << 128) - 1))
def test_a_ratio_of_all_keeps_all_and_of_none_keeps_none(trace_id):
    assert trace.is_below(trace_id, trace.threshold(1.0))
    assert not trace.is_below(trace_id, trace.threshold(0.0))


def test_a_ratio_keeps_about_its_share(gateway):
    below = sum(trace.is_below(gateway.begin().trace_id, trace.threshold(0.1)) for _ in range(10_000))
    assert 850 < below < 1150  # five standard deviations


def test_kept_are_the_calls_that_need_explaining(make, gateway_of, collector):
    telemetry = make(tracing=Tracing(collector.url, ratio=0.0, slow_seconds=30.0))
    gateway = gateway_of(telemetry)
    dull = [gateway.plain(), gateway.streamed(), gateway.invalid(), gateway.left(), gateway.plain(seconds=29.9)]
    dull.append(gateway.plain(traceparent=f"00-{TRACE}-{SPAN}-00"))
    telling = [gateway.retried(), gateway.refused(), gateway.plain(seconds=30.0)]
    telling.append(gateway.plain(traceparent=f"00-{TRACE}-{SPAN}-01"))
    assert telemetry.flush(5.0)
    roots = {span.span_id for span in collector.spans}
    assert all(record.span_id.to_bytes(8, "big") in roots for record in telling)
    assert not any(record.span_id.to_bytes(8, "big") in roots for record in dull)


@pytest.mark.parametrize("state", [None, "", "a" * 513, "vendor=\x00", "vendor=\u00e9"])
def test_a_state_that_may_not_be_passed_on_is_left_out(gateway, telemetry, state):
    record = gateway.begin(traceparent=f"00-{TRACE}-{SPAN}-01", tracestate=state)
    with telemetry.attempt(record, "openai", "gpt-4o-mini") as attempt:
        assert telemetry.trace_headers(record, attempt).keys() == {"traceparent"}


def test_a_state_without_its_parent_means_nothing(gateway, telemetry):
    assert gateway.begin(traceparent="odd", tracestate="vendor=1").trace_state == ""


def test_whoever_is_not_let_in_has_no_say_in_what_is_kept(make, gateway_of, collector):
    telemetry = make(tracing=Tracing(collector.url, ratio=0.0))
    record = gateway_of(telemetry).begin(traceparent=f"00-{TRACE}-{SPAN}-01")
    with telemetry.request(record):
        record.status, record.outcome = 401, Outcome.REJECTED
        record.error_type, record.error_source = "auth", "client"
    assert telemetry.flush(5.0)
    assert collector.spans == []
