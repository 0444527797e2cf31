"""The spans of a call, as a collector receives them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from proxy.core.outcome import Outcome, Reason, of_failure
from proxy.telemetry import Tracing

ROOT, OPERATION = "POST /v1/chat/completions", "chat gpt-4o-mini"
UNSET, ERROR = Status.STATUS_CODE_UNSET, Status.STATUS_CODE_ERROR


def _seconds(span):
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_a_plain_call(traced, collector, attributes_of):
    record = traced.plain()
    assert traced.telemetry.flush(5.0)
    assert collector.tree() == [(0, ROOT), (1, OPERATION), (2, "POST")]
    root, operation, attempt = collector.one(ROOT), collector.one(OPERATION), collector.one("POST")
    assert {span.trace_id for span in collector.spans} == {record.trace_id.to_bytes(16, "big")}
    assert root.span_id == record.span_id.to_bytes(8, "big")
    assert attempt.span_id not in (root.span_id, operation.span_id)
    assert root.parent_span_id == b""
    assert (root.kind, operation.kind, attempt.kind) == (
        Span.SPAN_KIND_SERVER,
        Span.SPAN_KIND_CLIENT,
        Span.SPAN_KIND_CLIENT,
    )
    assert {span.status.code for span in collector.spans} == {UNSET}
    assert root.start_time_unix_nano == int(record.began * 1e9)
    assert _seconds(root) == pytest.approx(1.003)
    assert _seconds(attempt) == pytest.approx(1.0)
    assert attributes_of(root) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "url.path": "/v1/chat/completions",
        "http.response.status_code": 200,
        "penstock.key": "team-a",
        "penstock.request_id": "req-1",
        "penstock.outcome": "ok",
    }
    told = attributes_of(operation)
    assert told.pop("penstock.overhead_seconds") == pytest.approx(0.003)
    assert told == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o-mini",
        "gen_ai.request.stream": False,
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.output_tokens": 11,
        "gen_ai.usage.cache_read.input_tokens": 40,
        "gen_ai.usage.cache_write.input_tokens": 5,
        "gen_ai.usage.reasoning.output_tokens": 3,
        "penstock.attempts": 1,
    }
    assert attributes_of(attempt) == {
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "server.address": "openai.test",
        "server.port": 443,
        "gen_ai.request.model": "gpt-4o-mini",
        "penstock.upstream": "openai",
        "penstock.upstream_request_id": "up-1",
    }


def test_a_stream(traced, collector, attributes_of):
    record = traced.streamed(traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
    assert traced.telemetry.flush(5.0)
    assert collector.tree() == [(0, ROOT), (1, OPERATION), (2, "gate.wait"), (2, "POST"), (2, "stream")]
    assert collector.one(ROOT).parent_span_id == bytes.fromhex("b7ad6b7169203331")
    assert {span.trace_id.hex() for span in collector.spans} == {"0af7651916cd43dd8448eb211c80319c"}
    wait, operation, stream = collector.one("gate.wait"), collector.one(OPERATION), collector.one("stream")
    assert _seconds(wait) == pytest.approx(0.3)
    assert attributes_of(wait) == {
        "penstock.gate.name": "model/gpt-4o-mini",
        "penstock.gate.priority": "default",
        "penstock.gate.result": "admitted",
    }
    told = attributes_of(operation)
    assert told["gen_ai.response.time_to_first_chunk"] == pytest.approx(1.3)
    assert told["gen_ai.response.id"] == "chatcmpl-1"
    assert told["gen_ai.response.model"] == "gpt-4o-mini-2024"
    assert told["gen_ai.response.finish_reasons"] == ["stop"]
    (event,) = operation.events
    assert event.name == "gen_ai.first_chunk"
    assert event.time_unix_nano == stream.start_time_unix_nano
    assert _seconds(stream) == pytest.approx(2.0)
    assert attributes_of(stream) == {
        "penstock.stream.chunks": 12,
        "penstock.stream.bytes": record.bytes_out,
        "penstock.stream.max_gap_seconds": pytest.approx(0.4),
        "penstock.stream.pings": 0,
        "penstock.stream.end_reason": "done",
    }


def test_a_retried_call(traced, collector, attributes_of):
    traced.retried()
    assert traced.telemetry.flush(5.0)
    assert collector.tree() == [(0, ROOT), (1, OPERATION), (2, "POST"), (2, "retry.backoff"), (2, "POST")]
    first, second = collector.named("POST")
    assert first.status.code == ERROR
    refused = attributes_of(first)
    assert refused["http.response.status_code"] == 429
    assert refused["error.type"] == "429"
    assert refused["penstock.retry_after_seconds"] == 2.0
    assert "http.request.resend_count" not in refused
    assert second.status.code == UNSET
    assert attributes_of(second)["http.request.resend_count"] == 1
    assert [link.span_id for link in second.links] == [first.span_id]
    assert not first.links
    backoff = collector.one("retry.backoff")
    assert attributes_of(backoff) == {
        "penstock.backoff.seconds": pytest.approx(2.0),
        "penstock.backoff.source": "retry_after",
        "penstock.backoff.reason": "requests",
    }
    for recovered in (collector.one(ROOT), collector.one(OPERATION)):
        assert recovered.status.code == UNSET
        assert "error.type" not in attributes_of(recovered)


def test_a_client_that_left(traced, collector, attributes_of):
    traced.left()
    assert traced.telemetry.flush(5.0)
    assert collector.tree() == [(0, ROOT), (1, OPERATION), (2, "POST"), (2, "stream")]
    assert {span.status.code for span in collector.spans} == {UNSET}
    assert attributes_of(collector.one(ROOT))["error.type"] == "client_disconnected"
    assert attributes_of(collector.one(ROOT))["http.response.status_code"] == 200
    assert "error.type" not in attributes_of(collector.one(OPERATION))
    assert [event.name for event in collector.one(OPERATION).events] == ["gen_ai.first_chunk", "client.disconnected"]


def test_a_refused_call(traced, collector, attributes_of):
    traced.refused()
    assert traced.telemetry.flush(5.0)
    assert collector.tree() == [(0, ROOT), (1, OPERATION), (2, "gate.wait")]
    assert collector.one(ROOT).status.code == UNSET
    assert attributes_of(collector.one(ROOT))["error.type"] == "queue_full"
    assert collector.one(OPERATION).status.code == ERROR
    assert attributes_of(collector.one("gate.wait"))["penstock.gate.result"] == "rejected_full"
    assert _seconds(collector.one("gate.wait")) == 0


def test_a_call_that_was_nonsense_is_a_root_alone(traced, collector, attributes_of):
    traced.invalid()
    assert traced.telemetry.flush(5.0)
    assert collector.tree() == [(0, ROOT)]
    assert collector.one(ROOT).status.code == UNSET
    assert attributes_of(collector.one(ROOT))["http.response.status_code"] == 400


def test_a_call_that_failed_for_good_is_an_error_all_the_way_up(traced, collector, attributes_of):
    record = traced.begin()
    with traced.telemetry.request(record):
        with traced.telemetry.attempt(record, "openai", "gpt-4o-mini", "h", 1) as attempt:
            attempt.meaning = of_failure(Reason.CONNECT, begun=False)
        record.status, record.outcome = 502, Outcome.FAILED
        record.error_type, record.error_source = "connect", "upstream"
    assert traced.telemetry.flush(5.0)
    assert {span.status.code for span in collector.spans} == {ERROR}
    assert {attributes_of(span)["error.type"] for span in collector.spans} == {"connect"}


def test_a_truncated_stream_is_an_error_under_status_200(traced, collector, clock):
    record = traced.begin(stream=True)
    with traced.telemetry.request(record):
        with traced.telemetry.attempt(record, "openai", "gpt-4o-mini", "h", 1) as attempt:
            attempt.status = record.status = 200
            record.first_byte = clock()
            attempt.meaning = of_failure(Reason.RESET, begun=True)
        record.outcome, record.end_reason = Outcome.TRUNCATED, "reset"
    assert traced.telemetry.flush(5.0)
    assert collector.one(ROOT).status.code == ERROR


def test_half_a_surrogate_pair_in_a_name_costs_no_span(traced, collector):
    traced.plain(model="\ud83d\x1b[2J")
    assert traced.telemetry.flush(5.0)
    assert len(collector.spans) == 3


def test_spans_tell_which_service_they_are_of(make, gateway_of, collector, monkeypatch):
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    telemetry = make(tracing=Tracing(collector.url, ratio=1.0, service_name="edge"), version="1.2.3")
    gateway_of(telemetry).plain()
    assert telemetry.flush(5.0)
    (resource,) = collector.requests[0].resource_spans
    told = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
    assert told["service.name"] == "edge"
    assert told["service.version"] == "1.2.3"
    assert told["deployment.environment.name"] == "test"
    assert resource.scope_spans[0].scope.name == "penstock"


def test_the_standard_variables_are_honoured(make, gateway_of, collector, monkeypatch):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=blue")
    monkeypatch.setenv("OTEL_SERVICE_NAME", "by-variable")
    telemetry = make(tracing=Tracing(ratio=1.0))
    gateway_of(telemetry).plain()
    assert telemetry.flush(5.0)
    assert collector.headers[0]["path"] == "/v1/traces"
    assert collector.headers[0]["x-tenant"] == "blue"
    (resource,) = collector.requests[0].resource_spans
    assert "by-variable" in {pair.value.string_value for pair in resource.resource.attributes}


def test_the_sdk_can_be_switched_off_by_its_variable(make, gateway_of, collector, monkeypatch):
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    telemetry = make(tracing=Tracing(collector.url, ratio=1.0))
    gateway_of(telemetry).plain()
    assert telemetry.flush(5.0)
    assert collector.requests == []


def test_the_exporter_can_be_switched_off_by_its_variable(make, gateway_of, collector, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    telemetry = make(tracing=Tracing(collector.url, ratio=1.0))
    gateway_of(telemetry).plain()
    assert telemetry.flush(5.0)
    assert collector.requests == []


def test_a_whole_path_is_taken_as_it_is(make, gateway_of, collector):
    telemetry = make(tracing=Tracing(collector.url + "/otlp/traces", ratio=1.0))
    gateway_of(telemetry).plain()
    assert telemetry.flush(5.0)
    assert collector.headers[0]["path"] == "/otlp/traces"


def test_a_collector_that_refuses_costs_spans_and_no_call(traced, collector, scrape):
    collector.status = 400
    traced.plain()
    assert traced.telemetry.flush(5.0)
    told = scrape(traced.telemetry)
    assert told("telemetry_dropped_total", signal="span", reason="export_failed") == 3
    assert told.total("requests_total") == 1


def test_a_full_queue_drops_whole_trees_and_counts_them(make, gateway_of, scrape, monkeypatch):
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "10")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "10")
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts, and never answers
        telemetry = make(tracing=Tracing(f"http://127.0.0.1:{silent.getsockname()[1]}", ratio=1.0))
        gateway = gateway_of(telemetry)
        for _ in range(50):
            gateway.plain()
        assert not telemetry.flush(0.01)
        told = scrape(telemetry)
        assert told("telemetry_dropped_total", signal="span", reason="queue_full") == 47 * 3
        assert told.total("requests_total") == 50


def test_after_the_end_spans_are_dropped_and_counted(traced, scrape):
    assert traced.telemetry.close(5.0)
    traced.plain()
    assert scrape(traced.telemetry)("telemetry_dropped_total", signal="span", reason="shutdown") == 3


def test_without_a_collector_the_sdk_is_not_even_imported():
    program = (
        "import sys, time, random; from proxy.telemetry import Labels, Telemetry\n"
        "Telemetry(Labels(), now=time.monotonic, wall=time.time, draw_bits=random.getrandbits)\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
