"""The desk at which every call is accounted for.

    begin -> [ request: [ attempt ]* ] -> numbers, spans and a line of the log, once, from the finished record

1. A call is in flight while its record is open. Nothing counts up and down, so nothing can drift.
2. `request` hands the record on exactly once, however its block is left; exceptions pass through.
3. Nothing is counted before the end, and nothing per chunk.
4. A trace is kept if the call went wrong for a reason that is not its asker's, was tried again, was slow, is in the
   ratio, or belongs to a trace that the asker keeps. Its spans and exemplars are made then, from the record.
5. Ended calls are accounted for some at a time, within a tenth of a second, and before every scrape: one by one each
   would find the processor's caches cold, at twice the cost.
"""

from __future__ import annotations

import logging
import math
import os
import platform
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import metadata
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING

from proxy.core import cost
from proxy.core.cost import Price
from proxy.core.outcome import Outcome, Retry
from proxy.telemetry import catalogue, log, trace
from proxy.telemetry.audit import Audit
from proxy.telemetry.children import Key
from proxy.telemetry.connections import Connections
from proxy.telemetry.exposition import Exposition
from proxy.telemetry.levels import BatchLevel, GateLevel, Headroom, Levels, headroom, holds
from proxy.telemetry.live import Live
from proxy.telemetry.record import Attempt, LimitChange, Record
from proxy.telemetry.recorder import Labels, Recorder
from proxy.telemetry.trace import Tracing
from proxy.telemetry.writer import Writer

if TYPE_CHECKING:
    from proxy.telemetry.spans import Spans

system = logging.getLogger("penstock.limits")

_TRACE_BITS = 128
_SPAN_BITS = 64
_SPAN_MASK = (1 << _SPAN_BITS) - 1
SETTLE_AT = 64  # calls; half a millisecond of work
_CLOSED = catalogue.CIRCUITS[0]
_AGE_BOUNDS = (10.0, 60.0, 300.0)  # seconds; of catalogue.AGES

Values = list[tuple[Key, float]]


class Telemetry:
    """Made once, by the app; lives on the event loop's thread, `exposition` and `flush` excepted.

    Args:
        labels: the configured names, which bound the labels.
        now: the monotonic clock, in seconds; the one that all times of a record are of.
        wall: seconds since the epoch.
        draw_bits: a random integer of so many bits, for ids.
        prices: by configured model.
        tracing: which traces are kept, and where they go.
        log_fd, audit_fd: the file descriptors that the access log and the audit log are written to; None: no such log.
        slow_log_seconds: a call that still runs is logged each time so much more has passed; 0: never.
        version, revision: what `build_info` says; the version of the installed package if empty.
    """

    def __init__(
        self,
        labels: Labels,
        *,
        now: Callable[[], float],
        wall: Callable[[], float],
        draw_bits: Callable[[int], int],
        prices: Mapping[str, Price] | None = None,
        tracing: Tracing | None = None,
        log_fd: int | None = None,
        audit_fd: int | None = None,
        slow_log_seconds: float = 0.0,
        version: str = "",
        revision: str = "",
    ) -> None:
        self._now = now
        self._wall = wall
        self._draw_bits = draw_bits
        self._tracing = tracing or Tracing()
        self._sampled_below = trace.threshold(self._tracing.ratio)
        self._open: dict[int, Record] = {}  # by identity
        self._ended: list[Record] = []  # not accounted for yet
        self._levels: Callable[[], Levels] = Levels
        self._prices = prices or {}
        self._circuits: dict[str, str] = {}  # those that are not closed, by upstream
        self._slow_log_seconds = slow_log_seconds
        self._is_draining = False
        self._reload_ok = True
        self._reload_time = wall()
        self._build = (version or _version(), revision or "unknown", platform.python_version())
        self._recorder = Recorder(labels)
        self._exposition = Exposition(self._recorder, self._live)
        dropped = self._recorder.dropped
        self._log = None if log_fd is None else Writer(log_fd, partial(dropped, "log"))
        self._audit_log = None if audit_fd is None else Writer(audit_fd, partial(dropped, "audit"))
        self._spans = self._make_spans()
        self.audit = Audit(self._audit_log, wall)
        self.connections = Connections(self._recorder)
        self._live_figures = Live(now, wall, self._open.values)

    def _make_spans(self) -> Spans | None:
        named = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
        wanted = self._tracing.endpoint or any(map(_said, named))
        disabled = _said("OTEL_SDK_DISABLED") == "true" or _said("OTEL_TRACES_EXPORTER") == "none"
        if not wanted or disabled:
            return None
        from proxy.telemetry.spans import Spans  # half a second of imports, for those who trace

        return Spans(self._tracing, self._build[0], self._draw_span_id, self._recorder.dropped)

    @property
    def version(self) -> str:
        return self._build[0]

    @property
    def live(self) -> Live:
        """The figures of this moment; on the event loop's thread."""
        self._account_for_all()
        return self._live_figures

    def relabel(self, labels: Labels, prices: Mapping[str, Price] | None = None) -> None:
        """Take a new configuration's names and prices; the numbers of names that stay go on, those of the others
        vanish."""
        self._account_for_all()  # by the prices and names that those calls had
        self._recorder.relabel(labels)
        self._prices = prices or {}
        self._circuits = {name: state for name, state in self._circuits.items() if name in labels.upstreams}

    def levels(self, source: Callable[[], Levels]) -> None:
        """Where levels are read at each scrape; `source` is called in the scraping thread."""
        self._levels = source

    def limit_changed(self, gate: str, direction: str, cause: str) -> None:
        """The limit in force at a gate moved.

        Args:
            direction: up or down.
            cause: a word of `catalogue.LIMIT_CAUSES`.
        """
        self._recorder.counters["gate_limit_changes"][gate, direction, cause].value += 1

    def resized(self, gate: str, before: float, after: float) -> None:
        """A reload gave a gate so many places."""
        self._tell(LimitChange(self._now(), gate, "concurrency", before, after, "manual"))

    def _tell(self, change: LimitChange) -> None:
        """A limit moved: a number and a line; the span has it as an event."""
        direction = "up" if change.before is None or change.after >= change.before else "down"
        self.limit_changed(change.gate, direction, change.cause)
        before = "unknown" if change.before is None else f"{change.before:.4g}"
        unit = "at once" if change.limit == "concurrency" else "a minute"
        system.info("%s: %s %s -> %.4g %s (%s)", change.gate, change.limit, before, change.after, unit, change.cause)

    def circuit(self, provider: str, state: str) -> None:
        """The circuit of an upstream is now in `state`, a word of `catalogue.CIRCUITS`; counted where that is new."""
        if self._circuits.get(provider, _CLOSED) != state:
            self._circuits[provider] = state
            self._recorder.counters["circuit_transitions"][provider, state].value += 1

    def beat(self, late_seconds: float) -> None:
        """The event loop turns: a sleeper of its was woken so much too late. Called some times a second."""
        self._account_for_all()
        self._recorder.lagged(max(0.0, late_seconds))
        if self._log is not None and self._slow_log_seconds > 0.0:
            self._tell_slow(self._log, self._slow_log_seconds)

    def _tell_slow(self, writer: Writer, every: float) -> None:
        now = self._now()
        for record in self._open.values():  # in the order of their arrival
            lines = int((now - record.arrived) // every)
            if not lines:
                return
            if lines > record.slow_lines:
                record.slow_lines = lines
                writer.take(log.slow_line_of(record, now))

    def reloaded(self, ok: bool) -> None:
        """A reload of the configuration was tried, and worked or did not."""
        self._recorder.reloaded(ok)
        self._reload_ok = ok
        if ok:
            self._reload_time = self._wall()

    def batch_item(self, end: str) -> None:
        """A run of a batch's item is over; `end` is a word of `catalogue.ITEM_ENDS`."""
        self._recorder.counters["batch_items"][end,].value += 1

    def batch_finished(self, status: str, seconds: float) -> None:
        """A batch has ended, in this state, so long after it was made."""
        self._recorder.counters["batch_jobs_finished"][status,].value += 1
        self._recorder.histograms["batch_job_duration_seconds"][()].observe(seconds)

    def batch_webhook(self, result: str) -> None:
        """That a batch has ended was told, or could not be; `result` is a word of `catalogue.TOLD`."""
        self._recorder.counters["batch_webhooks"][result,].value += 1

    def draining(self, on: bool) -> None:
        self._is_draining = on

    def begin(
        self,
        operation: str,
        method: str,
        route: str,
        *,
        request_id: str,
        traceparent: str | None,
        tracestate: str | None = None,
    ) -> Record:
        """A record for a call that has just arrived; to be entered with `request` at once.

        `traceparent` and `tracestate` are the asker's headers; where the first is not valid, a new trace begins.
        """
        record = Record(request_id, operation, method, route, self._now(), self._wall())
        parent = None if traceparent is None else trace.parse(traceparent)
        if parent is None:
            ids = self._draw_bits(_TRACE_BITS + _SPAN_BITS)
            record.trace_id = ids >> _SPAN_BITS or 1  # zero is not an id
            record.span_id = ids & _SPAN_MASK or 1
        else:
            record.trace_id = parent.trace_id
            record.parent_span_id = parent.span_id
            record.trace_sampled = parent.sampled
            record.trace_state = trace.state(tracestate)
            record.span_id = self._draw_span_id()
        return record

    def within(self, whole: Record, step: str) -> Record:
        """A record for a call that is made for a step of a pipeline; to be entered with `request` at once.

        Args:
            whole: the pipeline's own call; its trace, id, caller and priority are the step's.
            step: pipeline/step, as in the configuration.
        """
        assert whole.run is not None
        record = Record(whole.request_id, "chat", "POST", "/v1/chat/completions", self._now(), self._wall())
        record.step, record.caller, record.priority, record.decided = step, whole.caller, whole.priority, whole.decided
        record.trace_id, record.parent_span_id, record.span_id = whole.trace_id, whole.span_id, self._draw_span_id()
        record.trace_sampled, record.trace_state = whole.trace_sampled, whole.trace_state
        whole.run.calls.append(record)
        return record

    def priced(self, record: Record) -> int | None:
        """What its usage cost, in micro-dollars; None without usage or without a price."""
        price = self._prices.get(record.model)
        return None if price is None or record.usage is None else cost.of(record.usage, price)

    def request(self, record: Record) -> OpenRequest:
        """`with telemetry.request(record):` is a call's whole life; at its end the record is closed and counted."""
        return OpenRequest(self, record)

    def attempt(
        self, record: Record, upstream: str, model: str, host: str = "", port: int = 0, url: str = ""
    ) -> OpenAttempt:
        """`with telemetry.attempt(...) as attempt:` is one try at one upstream.

        Args:
            upstream: its configured name.
            model: the model's name as sent to it.
            host, port, url: its address, for the span; a query in it is not told.
        """
        attempt = Attempt(upstream, model, self._now())
        attempt.host, attempt.port, attempt.url = host, port, url
        return OpenAttempt(self._now, record, attempt)

    def trace_headers(self, record: Record, attempt: Attempt) -> dict[str, str]:
        """What to send upstream with this attempt. Sampled says what is known at this point: a trace that is kept
        because of how the call ends is announced as unsampled."""
        attempt.span_id = attempt.span_id or self._draw_span_id()
        headers = {"traceparent": trace.header(record.trace_id, attempt.span_id, sampled=self._is_sampled(record))}
        if record.trace_state:
            headers["tracestate"] = record.trace_state
        return headers

    def traceparent(self, record: Record) -> str:
        """The call's own place in its trace, for what is done for it later."""
        return trace.header(record.trace_id, record.span_id, sampled=self._is_sampled(record))

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type, for this `Accept` header, as they were when last settled. Blocks; called
        in a thread of its own."""
        return self._exposition.render(accept)

    def flush(self, deadline_seconds: float) -> bool:
        """Write out what is waiting to be written: log lines and spans. Blocks; called in a thread at the stop.

        Returns:
            whether everything was written before the deadline.
        """
        self._account_for_all()
        until = monotonic() + deadline_seconds
        written = [writer.flush(max(0.0, until - monotonic())) for writer in self._writers]
        sent = self._spans is None or self._spans.flush(max(0.0, until - monotonic()))
        return all(written) and sent

    def close(self, deadline_seconds: float) -> bool:
        """As `flush`, and then end the threads that write; what comes later is counted as dropped."""
        flushed = self.flush(deadline_seconds)
        for writer in self._writers:
            writer.close()
        if self._spans is not None:
            self._spans.close()
        return flushed

    @property
    def _writers(self) -> list[Writer]:
        return [writer for writer in (self._log, self._audit_log) if writer is not None]

    def _leave(self, record: Record) -> None:
        if self._open.pop(id(record), None) is None:
            return
        record.ended = self._now()
        self._ended.append(record)
        if len(self._ended) >= SETTLE_AT:
            self._account_for_all()

    def settle(self) -> None:
        """Account for the calls that have ended (rule 5), so that all numbers can be read. On the event loop's thread,
        or while that is at rest."""
        self._account_for_all()
        self._recorder.fold()

    def _account_for_all(self) -> None:
        if not self._ended:
            return
        ended, self._ended = self._ended, []
        began = self._now()
        self._price(ended)
        self._recorder.finish(ended)
        self._live_figures.take(ended)
        if self._spans is not None:
            self._keep(self._spans, ended)
        for record in ended:
            if record.run is not None:
                record.run.calls.clear()
            for change in record.limit_changes:
                self._tell(change)
            if record.error_type and _is_denied(record):
                self.audit.denied(record)
        if self._log is not None:
            self._log.take(*map(log.line_of, ended))
        self._recorder.staged("log", (self._now() - began) / len(ended), len(ended))

    def _price(self, ended: list[Record]) -> None:
        for record in ended:
            if record.usage is not None and (price := self._prices.get(record.model)) is not None:
                record.cost = cost.of(record.usage, price)

    def _keep(self, spans: Spans, ended: list[Record]) -> None:
        """Make spans and exemplars of those whose trace is kept; those of a step go with its whole's."""
        for record in ended:
            calls = [record] if record.run is None else [record, *record.run.calls]
            if not record.step and any(map(self._is_kept, calls)):
                self._recorder.exemplify(record)
                spans.take(record)

    def _is_kept(self, record: Record) -> bool:
        return (
            record.error_source in ("gateway", "upstream")
            or len(record.attempts) > 1
            or record.ended - record.arrived >= self._tracing.slow_seconds
            or self._is_sampled(record)
        )

    def _is_sampled(self, record: Record) -> bool:
        """Whoever was not let in has no say in what is kept."""
        return (record.trace_sampled and not _is_denied(record)) or trace.is_below(record.trace_id, self._sampled_below)

    def _draw_span_id(self) -> int:
        return self._draw_bits(_SPAN_BITS) or 1

    def _live(self) -> dict[str, Values]:
        """Every level of the catalogue, read from what is there now; in the scraping thread."""
        levels = self._levels()
        return {
            **self._of_calls(list(self._open.copy().values())),
            **self._of_gates(levels.gates),
            **self._of_upstreams(levels),
            **_of_batches(levels.batches),
            "build_info": [(self._build, 1)],
            "config_last_reload_successful": [((), self._reload_ok)],
            "config_last_reload_success_timestamp_seconds": [((), self._reload_time)],
            "draining": [((), self._is_draining)],
        }

    def _of_calls(self, calls: list[Record]) -> dict[str, Values]:
        now = self._now()
        by_operation = dict.fromkeys(catalogue.OPERATIONS, 0)
        by_age = dict.fromkeys(catalogue.AGES, 0)
        attempts, sleepers = self._per_upstream(), self._per_upstream()
        for call in calls:
            if not call.step:
                by_operation[call.operation if call.operation in by_operation else catalogue.OTHER] += 1
                by_age[catalogue.AGES[bisect_right(_AGE_BOUNDS, now - call.arrived)]] += 1
            if not call.attempts:
                continue
            last = call.attempts[-1]
            if last.ended is None:
                _count(attempts, last.upstream)
            elif call.first_byte is None and last.meaning.retry is not Retry.NEVER:
                _count(sleepers, last.upstream)
        return {
            "requests_in_flight": _labelled(by_operation),
            "requests_in_flight_age": _labelled(by_age),
            "streams_in_flight": [((), sum(map(_streams, calls)))],
            "upstream_in_flight": _labelled(attempts),
            "backoff_sleepers": _labelled(sleepers),
        }

    def _of_gates(self, levels: Iterable[GateLevel]) -> dict[str, Values]:
        known = self._recorder.names[catalogue.GATES.field]
        gates = [gate for gate in levels if gate.name in known]
        return {
            "gate_limit": [((gate.name,), gate.limit) for gate in gates],
            "gate_limit_bound": [
                ((gate.name, bound), value)
                for gate in gates
                for bound, value in zip(("min", "max"), gate.bounds or (gate.limit, gate.limit), strict=True)
            ],
            "gate_in_use": [((gate.name,), gate.in_use) for gate in gates],
            "gate_queue_depth": [
                ((gate.name, priority), gate.waiting.get(priority, 0))
                for gate in gates
                for priority in catalogue.PRIORITIES
            ],
            "gate_permit_seconds": [((gate.name,), gate.held_seconds) for gate in gates],
            "gate_queue_seconds": [((gate.name,), gate.queued_seconds) for gate in gates],
            "gate_saturated_seconds": [((gate.name,), gate.full_seconds) for gate in gates],
            "gate_queue_limit": [((gate.name,), gate.queue_limit) for gate in gates if gate.queue_limit is not None],
        }

    def _of_upstreams(self, levels: Levels) -> dict[str, Values]:
        upstreams = self._recorder.names[catalogue.UPSTREAMS.field]
        models = self._recorder.names[catalogue.MODELS.field]
        connections = [level for level in levels.connections if level.upstream in upstreams]
        accounts = [account for account in levels.accounts if account.upstream in upstreams and account.model in models]
        found = list(headroom(accounts))
        now = self._wall()
        held = holds(accounts)
        to_wall = now - self._now()
        taught = dict.fromkeys((room.upstream, room.model) for room in found)
        return {
            "upstream_connections": [
                ((level.upstream, state), count)
                for level in connections
                for state, count in (("active", level.active), ("idle", level.idle))
            ],
            "upstream_connection_acquires": [
                ((level.upstream, how), count)
                for level in connections
                for how, count in (("new", level.opened), ("reused", max(0, level.acquired - level.opened)))
            ],
            "upstream_connections_limit": [((level.upstream,), level.limit or math.inf) for level in connections],
            "cooldown_until_timestamp_seconds": [
                ((name,), now + held[name] if name in held else 0.0) for name in upstreams
            ],
            "circuit_state": [
                ((name, state), self._circuits.get(name, _CLOSED) == state)
                for name in upstreams
                for state in catalogue.CIRCUITS
            ],
            "ratelimit_limit": [(_room_key(room), room.limit) for room in found],
            "ratelimit_remaining": [(_room_key(room), room.remaining) for room in found],
            "ratelimit_reset_timestamp_seconds": [
                (_room_key(room), now + room.full_seconds) for room in found if room.full_seconds is not None
            ],
            "ratelimit_observed_timestamp_seconds": [
                ((upstream, upstream, model), answered + to_wall)
                for upstream, model in taught
                if (answered := self._recorder.answered.get((upstream, model))) is not None
            ],
        }

    def _per_upstream(self) -> dict[str, int]:
        return dict.fromkeys(self._recorder.names[catalogue.UPSTREAMS.field], 0)


class OpenRequest:
    """The block of one call. A class, because a generator's context manager costs three times as much."""

    __slots__ = ("_record", "_telemetry")

    def __init__(self, telemetry: Telemetry, record: Record) -> None:
        self._telemetry = telemetry
        self._record = record

    def __enter__(self) -> Record:
        record = self._record
        self._telemetry._open[id(record)] = record
        return record

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
    paused = "queue;dur=0.0, backoff;dur=0.0"
    if record.queue_seconds or record.backoff_seconds:
        paused = f"queue;dur={record.queue_seconds * 1e3:.1f}, backoff;dur={record.backoff_seconds * 1e3:.1f}"
    return (
        f"{paused}, upstream;dur={record.upstream_seconds * 1e3:.1f}, ttft;dur={first * 1e3:.1f}, "
        f"overhead;dur={max(0.0, spent - waited) * 1e3:.1f}"
    )


def _of_batches(level: BatchLevel) -> dict[str, Values]:
    return {
        "batch_jobs": [((state,), level.jobs.get(state, 0)) for state in catalogue.JOBS],
        "batch_items_pending": [((), level.pending)],
        "batch_oldest_item_timestamp_seconds": [] if level.oldest is None else [((), level.oldest)],
    }


def _streams(record: Record) -> bool:
    return record.stream and record.first_byte is not None and not record.step


def _is_denied(record: Record) -> bool:
    return record.error_type == "auth" and record.error_source == "client" and record.outcome is Outcome.REJECTED


def _count(counts: dict[str, int], name: str) -> None:
    if name in counts:
        counts[name] += 1


def _labelled(counts: Mapping[str, int]) -> Values:
    return [((name,), count) for name, count in counts.items()]


def _room_key(room: Headroom) -> Key:
    return room.upstream, room.upstream, room.model, room.kind


def _said(variable: str) -> str:
    return os.environ.get(variable, "").strip().lower()


def _version() -> str:
    try:
        return metadata.version("penstock")
    except metadata.PackageNotFoundError:  # run from a tree that is not installed
        return "unknown"
