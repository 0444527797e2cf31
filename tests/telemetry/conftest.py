"""A gateway in miniature: it lives calls through the telemetry's own interface, on a clock that stands until told."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from proxy.core.outcome import OK, Meaning, Outcome, Reason, Retry
from proxy.core.usage import Usage
from proxy.telemetry import Labels, Record, Telemetry, Tracing

LABELS = Labels(
    models=("gpt-4o-mini", "fast"),
    upstreams=("openai", "local"),
    callers=("team-a",),
    gates=("process", "upstream/openai", "model/gpt-4o-mini"),
)
THROTTLED = Meaning(Outcome.THROTTLED, Reason.REQUESTS, Retry.PACED)
EPOCH = 1_700_000_000.0


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time

    def wall(self) -> float:
        return EPOCH + self.time

    def wait(self, seconds: float) -> float:
        """Let time pass, and tell how much did."""
        self.time += seconds
        return seconds


@dataclass
class Gateway:
    """Every method is one call, from its arrival to its end; the record is what it left."""

    telemetry: Telemetry
    clock: Clock
    model: str = "gpt-4o-mini"
    upstream: str = "openai"
    second: str = "local"  # where it goes after a refusal

    @property
    def gate(self) -> str:
        return f"model/{self.model}"

    def begin(
        self,
        *,
        model: str = "",
        stream: bool = False,
        traceparent: str | None = None,
        tracestate: str | None = None,
    ) -> Record:
        record = self.telemetry.begin(
            "chat",
            "POST",
            "/v1/chat/completions",
            request_id="req-1",
            traceparent=traceparent,
            tracestate=tracestate,
        )
        record.model = record.asked_model = model or self.model
        record.stream = stream
        record.caller = "team-a"
        record.bytes_in = 500
        return record

    def plain(self, *, model: str = "", seconds: float = 1.0, traceparent: str | None = None) -> Record:
        record = self.begin(model=model, traceparent=traceparent)
        with self.telemetry.request(record):
            record.admission("immediate", "process")
            self.clock.wait(0.002)
            self._try(record, OK, 200, seconds)
            self._answered(record)
            self.clock.wait(0.001)
            record.last_byte = self.clock()
        return record

    def streamed(self, *, traceparent: str | None = None) -> Record:
        """Queued for 0.3 s, first token 1 s after that, then 10 tokens in 2 s."""
        record = self.begin(stream=True, traceparent=traceparent)
        with self.telemetry.request(record):
            started = self.clock()
            self.clock.wait(0.3)
            record.waited("queue", started, self.clock(), gate=self.gate, result="admitted")
            record.admission("queued", self.gate)
            with self.telemetry.attempt(record, self.upstream, self.model, "api.openai.test", 443) as attempt:
                record.upstream_seconds += self.clock.wait(1.0)
                attempt.status, attempt.first_byte = 200, self.clock()
                self._answered(record)
                record.first_token = self.clock()
                record.upstream_seconds += self.clock.wait(2.0)
                record.chunks, record.max_gap_seconds = 12, 0.4
                attempt.meaning = OK
            record.end_reason, record.finish_reason = "done", "stop"
            record.response_id, record.response_model = "chatcmpl-1", "gpt-4o-mini-2024"
            record.last_byte = self.clock()
        return record

    def retried(self) -> Record:
        """Throttled by openai, 2 s of backoff, then answered by local."""
        record = self.begin()
        with self.telemetry.request(record):
            record.admission("immediate", "process")
            self._try(record, THROTTLED, 429, 0.1, retry_after=2.0)
            paused = self.clock()
            self.clock.wait(2.0)
            record.waited("backoff", paused, self.clock(), source="retry_after", reason="requests")
            self._try(record, OK, 200, 1.0, upstream=self.second)
            self._answered(record)
            record.last_byte = self.clock()
        return record

    def left(self) -> Record:
        """The client leaves in the middle of a stream."""
        record = self.begin(stream=True)
        with suppress(asyncio.CancelledError), self.telemetry.request(record):
            record.admission("immediate", "process")
            with self.telemetry.attempt(record, self.upstream, self.model, "api.openai.test", 443) as attempt:
                record.upstream_seconds += self.clock.wait(1.0)
                attempt.status, attempt.first_byte = 200, self.clock()
                record.upstream = self.upstream
                record.first_byte = record.first_token = self.clock()
                record.status, record.error_type, record.error_source = 200, "client_disconnect", "client"
                record.upstream_seconds += self.clock.wait(0.5)
                record.chunks, record.bytes_out = 3, 90
                raise asyncio.CancelledError
        return record

    def refused(self) -> Record:
        """The gateway's own queue is full."""
        record = self.begin()
        with self.telemetry.request(record):
            record.admission("rejected_full", self.gate)
            record.status, record.outcome = 429, Outcome.REJECTED
            record.error_type, record.error_source = "queue_full", "gateway"
            record.first_byte = record.last_byte = self.clock()
        return record

    def invalid(self) -> Record:
        """The client asked for nonsense."""
        record = self.begin(model="other")
        with self.telemetry.request(record):
            record.status, record.outcome = 400, Outcome.REJECTED
            record.error_type, record.error_source = "invalid_request", "client"
        return record

    def _try(
        self,
        record: Record,
        meaning: Meaning,
        status: int,
        seconds: float,
        *,
        upstream: str = "",
        retry_after: float | None = None,
    ) -> None:
        upstream = upstream or self.upstream
        with self.telemetry.attempt(record, upstream, self.model, f"{upstream}.test", 443) as attempt:
            record.upstream = upstream
            record.upstream_seconds += self.clock.wait(seconds)
            attempt.status, attempt.first_byte, attempt.retry_after = status, self.clock(), retry_after
            attempt.request_id = f"up-{len(record.attempts)}"
            attempt.meaning = meaning

    def _answered(self, record: Record) -> None:
        record.status, record.outcome = 200, Outcome.OK
        record.upstream = record.attempts[-1].upstream
        record.first_byte = self.clock()
        record.bytes_out = 900
        record.usage = Usage(input=100, output=11, cached=40, cache_write=5, reasoning=3)


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Settled(Telemetry):
    """Settled before each scrape, as the app does it."""

    def exposition(self, accept: str) -> tuple[bytes, str]:
        self.settle()
        return super().exposition(accept)


MakeTelemetry = Callable[..., Telemetry]


@pytest.fixture
def make(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeTelemetry]:
    """Makes telemetry that is closed at the end; the environment's collector is no matter of the tests."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made: list[Telemetry] = []

    def make(labels: Labels = LABELS, **settings: Any) -> Telemetry:
        draw = random.Random(7).getrandbits
        telemetry = Settled(labels, now=clock, wall=clock.wall, draw_bits=draw, **settings)
        made.append(telemetry)
        return telemetry

    yield make
    for telemetry in made:
        telemetry.close(0.0)


@pytest.fixture
def telemetry(make: MakeTelemetry) -> Telemetry:
    return make()


@pytest.fixture
def gateway_of(clock: Clock) -> Callable[..., Gateway]:
    def gateway_of(telemetry: Telemetry, **names: str) -> Gateway:
        return Gateway(telemetry, clock, **names)

    return gateway_of


@pytest.fixture
def gateway(telemetry: Telemetry, clock: Clock) -> Gateway:
    return Gateway(telemetry, clock)


class Scrape(dict[tuple[str, frozenset[tuple[str, str]]], float]):
    """What a scrape told; a series that is not there counts 0."""

    def __call__(self, name: str, **labels: str) -> float:
        return self.get(("penstock_" + name, frozenset(labels.items())), 0.0)

    def total(self, name: str) -> float:
        return sum(value for (found, _), value in self.items() if found == "penstock_" + name)

    def has(self, name: str, **labels: str) -> bool:
        return ("penstock_" + name, frozenset(labels.items())) in self


@pytest.fixture
def scrape() -> Callable[[Telemetry], Scrape]:
    def scrape(telemetry: Telemetry) -> Scrape:
        body, _ = telemetry.exposition("")
        return Scrape(
            ((sample.name, frozenset(sample.labels.items())), sample.value)
            for family in text_string_to_metric_families(body.decode())
            for sample in family.samples
        )

    return scrape


Value = str | int | float | bool | list[str]


@dataclass
class Collector:
    """A small OTLP/HTTP receiver; `status` is what it answers with."""

    url: str
    requests: list[ExportTraceServiceRequest] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    status: int = 200

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def tree(self) -> list[tuple[int, str]]:
        """(depth, name) of each span, parents before their children, children in the order of their start."""
        spans = {span.span_id: span for span in self.spans}
        children: dict[bytes, list[Span]] = {}
        for span in self.spans:
            children.setdefault(span.parent_span_id if span.parent_span_id in spans else b"", []).append(span)

        def walk(parent: bytes, depth: int) -> Iterator[tuple[int, str]]:
            for span in sorted(children.get(parent, []), key=lambda span: (span.start_time_unix_nano, span.name)):
                yield depth, span.name
                yield from walk(span.span_id, depth + 1)

        return list(walk(b"", 0))

    def named(self, name: str) -> list[Span]:
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.start_time_unix_nano)

    def one(self, name: str) -> Span:
        (span,) = self.named(name)
        return span


def attributes(span: Span | Span.Event) -> dict[str, Value]:
    return {pair.key: _value(pair.value) for pair in span.attributes}


def _value(said: AnyValue) -> Value:
    kind = said.WhichOneof("value")
    if kind == "array_value":
        return [item.string_value for item in said.array_value.values]
    return getattr(said, kind)


@pytest.fixture
def attributes_of() -> Callable[[Span | Span.Event], dict[str, Value]]:
    return attributes


@pytest.fixture
def collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.headers.append({"path": self.path, **{name.lower(): value for name, value in self.headers.items()}})
            if found.status == 200:
                found.requests.append(ExportTraceServiceRequest.FromString(body))
            self.send_response(found.status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        found = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        server.shutdown()
        thread.join()


@pytest.fixture
def traced(make: MakeTelemetry, collector: Collector, clock: Clock) -> Gateway:
    """A gateway that keeps every trace."""
    return Gateway(make(tracing=Tracing(endpoint=collector.url, ratio=1.0)), clock)
