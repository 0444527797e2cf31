"""A kept call as a tree of spans, made from its finished record and sent by OTLP over HTTP.

    POST /v1/chat/completions     SERVER    the whole request
    +- chat gpt-4o-mini           CLIENT    the logical operation, all attempts
       +- gate.wait               INTERNAL  each wait for places, or the refusal
       +- POST                    CLIENT    each attempt; a later one links to the one before
       +- retry.backoff           INTERNAL  each pause between attempts
       +- stream                  INTERNAL  first byte to last byte of a streamed answer

A pipeline's call has its steps below the root, each a tree of its own whose root is `step NAME`, INTERNAL.

1. Ids that were passed on, the root's and those of attempts at upstreams that take part, were drawn before; they stay.
2. The root stays unset on a 4xx, and on a client that left. A retry that worked leaves the operation unset and the
   attempt that failed in error.
3. A tree is sent whole or not at all: what the queue cannot hold is dropped here and counted, not in the SDK.
4. Sending happens in the processor's thread. A collector that is dead, slow or refusing costs spans, never a call.

Imported only where there is a collector: OpenTelemetry's SDK and exporter take long to import.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from threading import Thread
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags
from opentelemetry.util.types import AttributeValue

from proxy.core.cost import MICRO
from proxy.core.outcome import Outcome
from proxy.telemetry import catalogue, content, semconv, trace
from proxy.telemetry.log import text
from proxy.telemetry.record import Attempt, Pause, Record
from proxy.telemetry.recorder import is_answered
from proxy.telemetry.trace import Tracing

QUEUE_MAX = 2048  # spans; the specification's default of OTEL_BSP_MAX_QUEUE_SIZE
STALLED_SECONDS = 5.0  # a silence within a stream that is told of; a bound of stream_max_gap_seconds
_TRACES_PATH = "/v1/traces"
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)
_UNSET = Status(StatusCode.UNSET)
_ERROR = Status(StatusCode.ERROR)
_NO_ERROR = frozenset({Outcome.OK, Outcome.CANCELLED})

Attributes = dict[str, AttributeValue]
Dropped = Callable[[str, str, int], None]


class CountingExporter(SpanExporter):
    """Sends by another exporter, and counts what was taken and what was lost."""

    def __init__(self, exporter: SpanExporter, dropped: Dropped) -> None:
        self._exporter = exporter
        self._dropped = dropped
        self._closed = False
        self.taken = 0  # spans out of the processor's queue, ever

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.taken += len(spans)
        if self._closed:
            self._dropped("span", "shutdown", len(spans))
            return SpanExportResult.FAILURE
        result = self._exporter.export(spans)
        if result is not SpanExportResult.SUCCESS:
            self._dropped("span", "export_failed", len(spans))
        return result

    def shutdown(self) -> None:
        if not self._closed:
            self._closed = True
            self._exporter.shutdown()


class Spans:
    """Takes records of kept traces, and sends their spans.

    Args:
        tracing: where to, and under which name.
        version: of the gateway.
        draw_span_id: random, not 0, in 64 bits.
        dropped: called as dropped("span", reason, count), from either thread.
    """

    def __init__(self, tracing: Tracing, version: str, draw_span_id: Callable[[], int], dropped: Dropped) -> None:
        self._draw_span_id = draw_span_id
        self._dropped = dropped
        self._resource = _resource(tracing.service_name, version)
        self._scope = InstrumentationScope("penstock", version)
        self._masks = content.masks(tracing.redact)
        self._queue_max = _queue_max()
        self._given = 0  # spans into the processor's queue, ever
        self._closed = False
        self._exporter = CountingExporter(OTLPSpanExporter(endpoint=_traces_url(tracing.endpoint)), dropped)
        self._processor = BatchSpanProcessor(self._exporter, max_queue_size=self._queue_max)

    def take(self, record: Record) -> None:
        spans = self.tree(record)
        if self._closed:
            self._dropped("span", "shutdown", len(spans))
        elif self._given - self._exporter.taken + len(spans) > self._queue_max:
            self._dropped("span", "queue_full", len(spans))
        else:
            self._given += len(spans)
            for span in spans:
                self._processor.on_end(span)

    def flush(self, deadline_seconds: float) -> bool:
        """Send all that waits; False if the deadline came first. The SDK's own flush takes no deadline."""
        flushing = Thread(target=self._processor.force_flush, name="flush-spans", daemon=True)
        flushing.start()
        flushing.join(deadline_seconds)
        return not flushing.is_alive()

    def close(self) -> None:
        """Take no more, and give up what is not sent yet. Returns at once; a sending under way ends in its thread."""
        self._closed = True
        self._exporter.shutdown()
        Thread(target=self._processor.shutdown, name="close-spans", daemon=True).start()

    def tree(self, record: Record) -> list[ReadableSpan]:
        """The call's spans, the root first, and those of its steps."""
        calls = [record, *(record.run.calls if record.run is not None else ())]
        return [
            span
            for call in calls
            for span in _Tree(call, self._resource, self._scope, self._draw_span_id, self._masks).spans
        ]


class _Tree:
    """One call's spans while they are made."""

    def __init__(
        self,
        record: Record,
        resource: Resource,
        scope: InstrumentationScope,
        draw_span_id: Callable[[], int],
        masks: Sequence[re.Pattern[bytes]],
    ) -> None:
        self._record = record
        self._resource = resource
        self._scope = scope
        self._draw_span_id = draw_span_id
        self._masks = masks
        self._began_ns = int(record.began * 1e9)  # a float holds no nanoseconds since the epoch: only differences are
        parts: list[Pause | Attempt] = [*record.pauses, *record.attempts]
        self._in_order = sorted(parts, key=lambda part: part.started)
        self.spans: list[ReadableSpan] = []
        root = self._root()
        if record.attempts or record.pauses or record.admitted:
            self._operation(root)

    def _root(self) -> SpanContext:
        record = self._record
        left = record.outcome is Outcome.CANCELLED
        broke = record.outcome in (Outcome.FAILED, Outcome.TRUNCATED)
        attributes: Attributes = {
            semconv.HTTP_METHOD: text(record.method),
            semconv.HTTP_ROUTE: record.route,
            semconv.URL_PATH: record.route,
            semconv.HTTP_STATUS: record.status,
            semconv.REQUEST_ID: text(record.request_id),
            semconv.OUTCOME: record.outcome.value,
        }
        if record.caller:
            attributes[semconv.KEY] = record.caller
        if record.step:
            attributes |= dict(zip((semconv.PIPELINE, semconv.STEP), record.step.split("/"), strict=True))
        if record.run is not None and record.cost is not None:
            attributes[semconv.COST_USD] = record.cost / MICRO
        if error_type := semconv.CLIENT_LEFT if left else record.error_type:
            attributes[semconv.ERROR_TYPE] = error_type
        return self._add(
            f"step {record.step.partition('/')[2]}" if record.step else f"{text(record.method)} {record.route}",
            SpanKind.INTERNAL if record.step else SpanKind.SERVER,
            self._context(record.parent_span_id, remote=not record.step) if record.parent_span_id else None,
            record.arrived,
            record.ended,
            attributes,
            span_id=record.span_id,
            links=[_linked(parent)] if (parent := trace.parse(record.linked)) is not None else [],
            status=_ERROR if broke or (record.status >= 500 and not left) else _UNSET,
        )

    def _operation(self, root: SpanContext) -> None:
        record = self._record
        name = semconv.GEN_AI_OPERATIONS.get(record.operation, record.operation)
        model = text(record.asked_model) or (record.model if record.model != catalogue.OTHER else "")
        started = self._in_order[0].started if self._in_order else record.arrived
        operation = self._add(
            f"{name} {model}".rstrip(),
            SpanKind.CLIENT,
            root,
            started,
            record.ended,
            self._described(name, model),
            status=_UNSET if record.outcome in _NO_ERROR else _ERROR,
            events=self._events(),
        )
        self._parts(operation)
        if record.stream and record.first_byte is not None and is_answered(record):
            self._stream(operation, record.first_byte)

    def _described(self, name: str, model: str) -> Attributes:
        record = self._record
        attributes: Attributes = {
            semconv.GEN_AI_OPERATION: name,
            semconv.GEN_AI_REQUEST_STREAM: record.stream,
            semconv.ATTEMPTS: len(record.attempts),
            semconv.OVERHEAD_SECONDS: record.overhead_seconds,
        }
        if model:
            attributes[semconv.GEN_AI_REQUEST_MODEL] = model
        if record.upstream:
            attributes[semconv.GEN_AI_PROVIDER] = record.upstream
        if record.max_tokens is not None:
            attributes[semconv.GEN_AI_REQUEST_MAX_TOKENS] = record.max_tokens
        if record.response_id:
            attributes[semconv.GEN_AI_RESPONSE_ID] = text(record.response_id)
        if record.response_model:
            attributes[semconv.GEN_AI_RESPONSE_MODEL] = text(record.response_model)
        if record.finish_reason:
            attributes[semconv.GEN_AI_FINISH_REASONS] = [text(record.finish_reason)]
        if record.first_token is not None:
            attributes[semconv.GEN_AI_FIRST_CHUNK_SECONDS] = record.first_token - record.arrived
        if (usage := record.usage) is not None:
            attributes[semconv.GEN_AI_INPUT_TOKENS] = usage.input
            attributes[semconv.GEN_AI_OUTPUT_TOKENS] = usage.output
            attributes[semconv.GEN_AI_CACHE_READ_TOKENS] = usage.cached
            attributes[semconv.GEN_AI_CACHE_WRITE_TOKENS] = usage.cache_write
            attributes[semconv.GEN_AI_REASONING_TOKENS] = usage.reasoning
        if record.cost is not None:
            attributes[semconv.COST_USD] = record.cost / MICRO
        if record.error_type and record.outcome not in _NO_ERROR:
            attributes[semconv.ERROR_TYPE] = record.error_type
        if record.content is not None:
            told = zip((semconv.CONTENT_ASKED, semconv.CONTENT_ANSWERED), record.content.told(self._masks), strict=True)
            attributes.update({attribute: said for attribute, said in told if said})
        return attributes

    def _events(self) -> list[Event]:
        record = self._record
        events = []
        if record.first_token is not None:
            events.append(Event(semconv.EVENT_FIRST_CHUNK, timestamp=self._ns(record.first_token)))
        if record.max_gap_seconds >= STALLED_SECONDS:
            told: Attributes = {semconv.STALL_SECONDS: record.max_gap_seconds}
            events.append(Event(semconv.EVENT_STALLED, told, self._ns(record.max_gap_at)))
        for change in record.limit_changes:
            moved: Attributes = {
                semconv.GATE_NAME: change.gate,
                semconv.LIMIT_NAME: change.limit,
                semconv.LIMIT_AFTER: change.after,
                semconv.LIMIT_CAUSE: change.cause,
            }
            if change.before is not None:
                moved[semconv.LIMIT_BEFORE] = change.before
            events.append(Event(semconv.EVENT_LIMIT_CHANGED, moved, self._ns(change.at)))
        if record.outcome is Outcome.CANCELLED:
            events.append(Event(semconv.EVENT_CLIENT_LEFT, timestamp=self._ns(record.ended)))
        return events

    def _parts(self, operation: SpanContext) -> None:
        """Waits and attempts, in the order in which they began."""
        record = self._record
        before: SpanContext | None = None
        resends = 0
        for part in self._in_order:
            if isinstance(part, Attempt):
                before = self._attempt(operation, part, resends, before)
                resends += 1
            elif part.kind == "queue":
                self._wait(operation, part)
            else:
                self._backoff(operation, part)
        if record.admitted not in ("", "immediate") and not any(pause.kind == "queue" for pause in record.pauses):
            refused = Pause("queue", record.ended, record.ended, gate=record.gate, result=record.admitted)
            self._wait(operation, refused)

    def _wait(self, operation: SpanContext, pause: Pause) -> None:
        attributes: Attributes = {
            semconv.GATE_NAME: pause.gate,
            semconv.GATE_PRIORITY: self._record.priority,
            semconv.GATE_RESULT: pause.result,
        }
        if pause.limit is not None:
            attributes[semconv.GATE_LIMIT] = pause.limit
        if pause.in_use is not None:
            attributes[semconv.GATE_IN_USE] = pause.in_use
        if pause.queue_depth is not None:
            attributes[semconv.GATE_QUEUE_DEPTH] = pause.queue_depth
        self._add("gate.wait", SpanKind.INTERNAL, operation, pause.started, pause.ended, attributes)

    def _backoff(self, operation: SpanContext, pause: Pause) -> None:
        attributes: Attributes = {
            semconv.BACKOFF_SECONDS: pause.ended - pause.started,
            semconv.BACKOFF_SOURCE: pause.source,
            semconv.BACKOFF_REASON: pause.reason,
        }
        self._add("retry.backoff", SpanKind.INTERNAL, operation, pause.started, pause.ended, attributes)

    def _attempt(
        self, operation: SpanContext, attempt: Attempt, resends: int, before: SpanContext | None
    ) -> SpanContext:
        meaning = attempt.meaning
        failed = meaning.outcome not in _NO_ERROR
        attributes: Attributes = {
            semconv.HTTP_METHOD: text(self._record.method),
            semconv.SERVER_ADDRESS: attempt.host,
            semconv.SERVER_PORT: attempt.port,
            semconv.UPSTREAM: attempt.upstream,
            semconv.GEN_AI_REQUEST_MODEL: text(attempt.model),
        }
        if attempt.url:
            attributes[semconv.URL_FULL] = text(attempt.url.partition("?")[0])
        if attempt.status is not None:
            attributes[semconv.HTTP_STATUS] = attempt.status
        if failed:
            told = attempt.status is not None and attempt.status >= 400
            attributes[semconv.ERROR_TYPE] = str(attempt.status) if told else meaning.reason.value
        if resends:
            attributes[semconv.HTTP_RESEND_COUNT] = resends
        if attempt.retry_after is not None:
            attributes[semconv.RETRY_AFTER_SECONDS] = attempt.retry_after
        if attempt.request_id:
            attributes[semconv.UPSTREAM_REQUEST_ID] = text(attempt.request_id)
        return self._add(
            text(self._record.method),
            SpanKind.CLIENT,
            operation,
            attempt.started,
            self._record.ended if attempt.ended is None else attempt.ended,
            attributes,
            span_id=attempt.span_id,
            status=_ERROR if failed else _UNSET,
            links=[Link(before)] if before is not None else [],
        )

    def _stream(self, operation: SpanContext, first_byte: float) -> None:
        record = self._record
        attributes: Attributes = {
            semconv.STREAM_CHUNKS: record.chunks,
            semconv.STREAM_BYTES: record.bytes_out,
            semconv.STREAM_MAX_GAP_SECONDS: record.max_gap_seconds,
            semconv.STREAM_END_REASON: record.end_reason,
            semconv.STREAM_PINGS: record.pings,
        }
        ended = record.ended if record.last_byte is None else record.last_byte
        self._add("stream", SpanKind.INTERNAL, operation, first_byte, ended, attributes)

    def _add(
        self,
        name: str,
        kind: SpanKind,
        parent: SpanContext | None,
        started: float,
        ended: float,
        attributes: Attributes,
        *,
        span_id: int = 0,
        status: Status = _UNSET,
        events: Sequence[Event] = (),
        links: Sequence[Link] = (),
    ) -> SpanContext:
        context = self._context(span_id or self._draw_span_id())
        self.spans.append(
            ReadableSpan(
                name=name,
                context=context,
                parent=parent,
                resource=self._resource,
                attributes=attributes,
                events=events,
                links=links,
                kind=kind,
                status=status,
                start_time=self._ns(started),
                end_time=self._ns(ended),
                instrumentation_scope=self._scope,
            )
        )
        return context

    def _context(self, span_id: int, *, remote: bool = False) -> SpanContext:
        return SpanContext(self._record.trace_id, span_id, is_remote=remote, trace_flags=_SAMPLED)

    def _ns(self, time: float) -> int:
        return self._began_ns + int((time - self._record.arrived) * 1e9)


def _linked(submitter: trace.Parent) -> Link:
    """To the request that a call was made for, such as the one that submitted a batch."""
    return Link(SpanContext(submitter.trace_id, submitter.span_id, is_remote=True, trace_flags=_SAMPLED))


def _resource(name: str, version: str) -> Resource:
    """What OTEL_RESOURCE_ATTRIBUTES and OTEL_SERVICE_NAME say; `name` where they say none."""
    resource = Resource.create()
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": name}))
    return Resource({"service.version": version}).merge(resource)


def _queue_max() -> int:
    said = os.environ.get("OTEL_BSP_MAX_QUEUE_SIZE", "")
    return int(said) if said.isdecimal() and int(said) > 0 else QUEUE_MAX


def _traces_url(endpoint: str) -> str | None:
    """The whole URL to post to; None leaves it to the exporter, which asks the environment."""
    if not endpoint:
        return None
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + _TRACES_PATH
