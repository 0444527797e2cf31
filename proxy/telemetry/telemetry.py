"""The desk at which every call is accounted for.

    begin -> [ request: [ attempt ]* ] -> numbers, spans and a line of the log, once, from the finished record

1. A call is in flight while its record is open. Nothing counts up and down, so nothing can drift.
2. `request` hands the record on exactly once, however its block is left; exceptions pass through.
3. Nothing is counted before the end, and nothing per chunk.
4. A trace is kept if the call went wrong for a reason that is not its asker's, was tried again, was slow, is in the
   ratio, or belongs to a trace that the asker keeps. Its spans and exemplars are made then, from the record.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

from proxy.telemetry import catalogue, trace
from proxy.telemetry.exposition import Exposition
from proxy.telemetry.log import AccessLog
from proxy.telemetry.record import Attempt, Record
from proxy.telemetry.recorder import Key, Labels, Recorder
from proxy.telemetry.trace import Tracing

if TYPE_CHECKING:
    from proxy.telemetry.spans import Spans

_TRACE_BITS = 128
_SPAN_BITS = 64


@dataclass(frozen=True, slots=True)
class GateLevel:
    """A gate as it stands at the moment of the scrape."""

    name: str  # process, pool/<name>, upstream/<name>, model/<name>
    limit: float  # places; may be infinite
    in_use: int
    waiting: Mapping[str, int]  # by priority
    queue_limit: int | None = None  # None: it has no queue of its own


class Telemetry:
    """Made once, by the app; lives on the event loop's thread, `exposition` and `flush` excepted.

    Args:
        labels: the configured names, which bound the labels.
        now: the monotonic clock, in seconds; the one that all times of a record are of.
        wall: seconds since the epoch.
        draw_bits: a random integer of so many bits, for ids.
        tracing: which traces are kept, and where they go.
        log_fd: the file descriptor that the access log is written to, or None for no log.
        version, revision: what `build_info` says; the version of the installed package if empty.
    """

    def __init__(
        self,
        labels: Labels,
        *,
        now: Callable[[], float],
        wall: Callable[[], float],
        draw_bits: Callable[[int], int],
        tracing: Tracing | None = None,
        log_fd: int | None = None,
        version: str = "",
        revision: str = "",
    ) -> None:
        self._now = now
        self._wall = wall
        self._draw_bits = draw_bits
        self._tracing = tracing or Tracing()
        self._sampled_below = trace.threshold(self._tracing.ratio)
        self._open: dict[int, Record] = {}  # by identity
        self._levels: Callable[[], Iterable[GateLevel]] = tuple
        self._is_draining = False
        self._reload_ok = True
        self._reload_time = wall()
        self._build = (version or _version(), revision or "unknown", platform.python_version())
        self._recorder = Recorder(labels)
        self._exposition = Exposition(self._recorder, self._gauges)
        self._log = None if log_fd is None else AccessLog(log_fd, self._recorder.dropped)
        self._spans = self._make_spans()

    def _make_spans(self) -> Spans | None:
        named = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
        wanted = self._tracing.endpoint or any(map(_said, named))
        disabled = _said("OTEL_SDK_DISABLED") == "true" or _said("OTEL_TRACES_EXPORTER") == "none"
        if not wanted or disabled:
            return None
        from proxy.telemetry.spans import Spans  # half a second of imports, for those who trace

        return Spans(self._tracing, self._build[0], self._draw_span_id, self._recorder.dropped)

    def relabel(self, labels: Labels) -> None:
        """Take a new configuration's names; the numbers of names that stay go on, those of the others vanish."""
        self._recorder.relabel(labels)

    def levels(self, source: Callable[[], Iterable[GateLevel]]) -> None:
        """Where the gates' levels are read at each scrape; `source` is called in the scraping thread."""
        self._levels = source

    def reloaded(self, ok: bool) -> None:
        """A reload of the configuration was tried, and worked or did not."""
        self._recorder.reloaded(ok)
        self._reload_ok = ok
        if ok:
            self._reload_time = self._wall()

    def draining(self, on: bool) -> None:
        self._is_draining = on

    def begin(self, operation: str, method: str, route: str, *, request_id: str, traceparent: str | None) -> Record:
        """A record for a call that has just arrived; to be entered with `request` at once.

        `traceparent` is the asker's header; one that is not valid begins a new trace.
        """
        record = Record(
            request_id=request_id,
            operation=operation,
            method=method,
            route=route,
            arrived=self._now(),
            began=self._wall(),
        )
        parent = trace.parse(traceparent)
        if parent is None:
            record.trace_id = self._draw_bits(_TRACE_BITS) or 1  # zero is not an id
        else:
            record.trace_id = parent.trace_id
            record.parent_span_id = parent.span_id
            record.trace_sampled = parent.sampled
        record.span_id = self._draw_span_id()
        return record

    def request(self, record: Record) -> OpenRequest:
        """`with telemetry.request(record):` is a call's whole life; at its end the record is closed and counted."""
        return OpenRequest(self, record)

    def attempt(self, record: Record, upstream: str, model: str, host: str = "", port: int = 0) -> OpenAttempt:
        """`with telemetry.attempt(...) as attempt:` is one try at one upstream.

        Args:
            upstream: its configured name.
            model: the model's name as sent to it.
            host, port: of its address, for the span.
        """
        attempt = Attempt(upstream, model, self._now(), host=host, port=port, span_id=self._draw_span_id())
        return OpenAttempt(self._now, record, attempt)

    def traceparent(self, record: Record, attempt: Attempt) -> str:
        """The header to send upstream with this attempt. Sampled says what is known at this point: a trace that is
        kept because of how the call ends is announced as unsampled."""
        return trace.header(record.trace_id, attempt.span_id, sampled=self._is_sampled(record))

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type, for this `Accept` header. Blocks; called in a thread of its own."""
        return self._exposition.render(accept)

    def flush(self, deadline_seconds: float) -> bool:
        """Write out what is waiting to be written: log lines and spans. Blocks; called in a thread at the stop.

        Returns:
            whether everything was written before the deadline.
        """
        until = monotonic() + deadline_seconds
        logged = self._log is None or self._log.flush(deadline_seconds)
        sent = self._spans is None or self._spans.flush(max(0.0, until - monotonic()))
        return logged and sent

    def close(self, deadline_seconds: float) -> bool:
        """As `flush`, and then end the threads that write; what comes later is counted as dropped."""
        flushed = self.flush(deadline_seconds)
        if self._log is not None:
            self._log.close()
        if self._spans is not None:
            self._spans.close()
        return flushed

    def _enter(self, record: Record) -> None:
        self._open[id(record)] = record

    def _leave(self, record: Record) -> None:
        if self._open.pop(id(record), None) is None:
            return
        record.ended = self._now()
        self._recorder.finish(record)
        if self._spans is not None and self._is_kept(record):
            self._recorder.exemplify(record)
            self._spans.take(record)
        if self._log is not None:
            self._log.take(record)

    def _is_kept(self, record: Record) -> bool:
        return (
            record.error_source in ("gateway", "upstream")
            or len(record.attempts) > 1
            or record.seconds >= self._tracing.slow_seconds
            or self._is_sampled(record)
        )

    def _is_sampled(self, record: Record) -> bool:
        return record.trace_sampled or trace.is_below(record.trace_id, self._sampled_below)

    def _draw_span_id(self) -> int:
        return self._draw_bits(_SPAN_BITS) or 1

    def _gauges(self) -> dict[str, list[tuple[Key, float]]]:
        """Every gauge of the catalogue, read from what is there now; in the scraping thread."""
        calls = list(self._open.copy().values())
        by_operation = dict.fromkeys(catalogue.OPERATIONS, 0)
        for call in calls:
            by_operation[call.operation if call.operation in by_operation else catalogue.OTHER] += 1
        known = self._recorder.names[catalogue.GATES.field]
        gates = [gate for gate in self._levels() if gate.name in known]
        return {
            "requests_in_flight": [((operation,), count) for operation, count in by_operation.items()],
            "streams_in_flight": [((), sum(call.stream and call.first_byte is not None for call in calls))],
            "gate_limit": [((gate.name,), gate.limit) for gate in gates],
            "gate_in_use": [((gate.name,), gate.in_use) for gate in gates],
            "gate_queue_depth": [
                ((gate.name, priority), gate.waiting.get(priority, 0))
                for gate in gates
                for priority in catalogue.PRIORITIES
            ],
            "gate_queue_limit": [((gate.name,), gate.queue_limit) for gate in gates if gate.queue_limit is not None],
            "build_info": [(self._build, 1)],
            "config_last_reload_successful": [((), self._reload_ok)],
            "config_last_reload_success_timestamp_seconds": [((), self._reload_time)],
            "draining": [((), self._is_draining)],
        }


class OpenRequest:
    """The block of one call. A class, because a generator's context manager costs three times as much."""

    __slots__ = ("_record", "_telemetry")

    def __init__(self, telemetry: Telemetry, record: Record) -> None:
        self._telemetry = telemetry
        self._record = record

    def __enter__(self) -> Record:
        self._telemetry._enter(self._record)
        return self._record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._telemetry._leave(self._record)


class OpenAttempt:
    """The block of one attempt."""

    __slots__ = ("_attempt", "_now", "_record")

    def __init__(self, now: Callable[[], float], record: Record, attempt: Attempt) -> None:
        self._now = now
        self._record = record
        self._attempt = attempt

    def __enter__(self) -> Attempt:
        self._record.attempts.append(self._attempt)
        return self._attempt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._attempt.ended = self._now()


def server_timing(record: Record, now: float) -> str:
    """The `Server-Timing` header of a call that is still open, at the first byte of its answer; milliseconds."""
    spent = now - record.arrived
    waited = record.queue_seconds + record.backoff_seconds + record.upstream_seconds + record.client_seconds
    first = spent if record.first_token is None else record.first_token - record.arrived
    return (
        f"queue;dur={record.queue_seconds * 1e3:.1f}, backoff;dur={record.backoff_seconds * 1e3:.1f}, "
        f"upstream;dur={record.upstream_seconds * 1e3:.1f}, ttft;dur={first * 1e3:.1f}, "
        f"overhead;dur={max(0.0, spent - waited) * 1e3:.1f}"
    )


def _said(variable: str) -> str:
    return os.environ.get(variable, "").strip().lower()


def _version() -> str:
    try:
        return metadata.version("penstock")
    except metadata.PackageNotFoundError:  # run from a tree that is not installed
        return "unknown"
