"""The access log: one line of JSON for each finished call, and one a minute for each that still runs.

    record -> Line or SlowLine (the allow-list) -> Writer

1. What is not a field of these is never logged: no header, no body, no key, no query, no provider's own words.
2. Words that came from outside are cut, and their control and non-ASCII characters escaped.
"""

from __future__ import annotations

import traceback
from datetime import UTC, datetime

import msgspec

from proxy.core.cost import MICRO
from proxy.core.outcome import Outcome
from proxy.telemetry.record import Record

TEXT_MAX = 128  # characters of a word from outside

_WARNING = frozenset(each.value for each in (Outcome.THROTTLED, Outcome.OVERLOADED, Outcome.FAILED, Outcome.TRUNCATED))


class Line(msgspec.Struct, omit_defaults=True, gc=False):
    """The allow-list. Times are milliseconds."""

    ts: datetime
    level: str
    event: str
    request_id: str
    trace_id: str
    span_id: str
    method: str
    route: str
    status: int
    outcome: str
    model: str
    stream: bool
    attempts: int
    queue_ms: float
    backoff_ms: float
    upstream_ms: float
    duration_ms: float
    overhead_ms: float
    bytes_in: int
    bytes_out: int
    provider: str = ""
    key: str = ""  # the key's alias
    finish_reason: str = ""
    error_type: str = ""
    error_source: str = ""
    upstream_request_id: str = ""
    retry_reasons: tuple[str, ...] = ()
    ttft_ms: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    tokens_reasoning: int | None = None
    cost_usd: float | None = None
    step: str = ""  # pipeline/step, of a step's call; event is then step


class SlowLine(msgspec.Struct, omit_defaults=True):
    """What is told of a call that has not ended. Times are milliseconds, until now."""

    ts: datetime
    level: str
    event: str
    request_id: str
    trace_id: str
    span_id: str
    method: str
    route: str
    model: str
    stream: bool
    phase: str  # queued, waiting or streaming
    attempts: int
    queue_ms: float
    backoff_ms: float
    upstream_ms: float
    duration_ms: float
    bytes_in: int
    bytes_out: int
    provider: str = ""
    key: str = ""
    retry_reasons: tuple[str, ...] = ()
    ttft_ms: float | None = None


_encode = msgspec.json.Encoder().encode


def line_of(record: Record) -> bytes:
    """The call as one line, with its line feed; the time is that of the call's end."""
    seconds = record.ended - record.arrived
    outcome = record.outcome._value_
    line = Line(  # in the order of its fields: by name it takes twice as long
        datetime.fromtimestamp(record.began + seconds, UTC),
        "warning" if outcome in _WARNING else "info",
        "step" if record.step else "request",
        text(record.request_id),
        record.trace_id.to_bytes(16, "big").hex(),
        record.span_id.to_bytes(8, "big").hex(),
        text(record.method),
        record.route,
        record.status,
        outcome,
        record.model,
        record.stream,
        len(record.attempts),
        _ms(record.queue_seconds) if record.queue_seconds else 0.0,
        _ms(record.backoff_seconds) if record.backoff_seconds else 0.0,
        _ms(record.upstream_seconds),
        _ms(seconds),
        _ms(record.overhead_seconds),
        record.bytes_in,
        record.bytes_out,
        record.upstream,
        record.caller,
        text(record.finish_reason),
        record.error_type,
        record.error_source,
    )
    if record.attempts:
        if said := record.attempts[-1].request_id:
            line.upstream_request_id = text(said)
        if len(record.attempts) > 1:
            line.retry_reasons = tuple(attempt.meaning.reason.value for attempt in record.attempts[:-1])
    if record.first_token is not None:
        line.ttft_ms = _ms(record.first_token - record.arrived)
    if (usage := record.usage) is not None:
        line.tokens_in = usage.input
        line.tokens_out = usage.output
        line.tokens_cached = usage.cached
        line.tokens_reasoning = usage.reasoning
    if record.cost is not None:
        line.cost_usd = record.cost / MICRO
    if record.step:
        line.step = record.step
    return _encode(line) + b"\n"


def slow_line_of(record: Record, now: float) -> bytes:
    """The call as it stands at `now`, on the record's clock, as one line with its line feed."""
    seconds = now - record.arrived
    line = SlowLine(
        ts=datetime.fromtimestamp(record.began + seconds, UTC),
        level="warning",
        event="slow_request",
        request_id=text(record.request_id),
        trace_id=f"{record.trace_id:032x}",
        span_id=f"{record.span_id:016x}",
        method=text(record.method),
        route=record.route,
        model=record.model,
        stream=record.stream,
        phase=record.phase,
        attempts=len(record.attempts),
        queue_ms=_ms(record.queue_seconds),
        backoff_ms=_ms(record.backoff_seconds),
        upstream_ms=_ms(record.upstream_seconds),
        duration_ms=_ms(seconds),
        bytes_in=record.bytes_in,
        bytes_out=record.bytes_out,
        provider=record.upstream,
        key=record.caller,
        retry_reasons=tuple(attempt.meaning.reason.value for attempt in record.attempts[:-1]),
    )
    if record.first_token is not None:
        line.ttft_ms = _ms(record.first_token - record.arrived)
    return _encode(line) + b"\n"


def story(error: BaseException) -> str:
    """Of which kind an unforeseen error was, and where: never what it says, which may quote what it fell over."""
    told = [f"{type(error).__module__}.{type(error).__qualname__}\n", *traceback.format_tb(error.__traceback__)]
    return "".join(told).rstrip()


def text(said: str) -> str:
    """A word from outside, cut and harmless to a terminal and to any encoder."""
    if len(said) > TEXT_MAX:
        said = said[:TEXT_MAX]
    return said if said.isascii() and said.isprintable() else ascii(said)[1:-1]


def _ms(seconds: float) -> float:
    return (seconds * 1e6 + 0.5) // 1.0 / 1e3  # to the microsecond; `round` takes four times as long
