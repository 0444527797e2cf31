"""The access log: one line of JSON for each finished call, and nothing that a caller or a provider wrote at length.

    record -> Line (the allow-list) -> bounded queue -> one thread -> file descriptor

1. What is not a field of `Line` is never logged: no header, no body, no key, no query.
2. Words that came from outside are cut, and their control and non-ASCII characters escaped.
3. The event loop never waits for the descriptor: what the queue cannot hold, or the descriptor does not take, is
   dropped and counted.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from datetime import UTC, datetime
from threading import Condition, Thread

import msgspec

from proxy.core.outcome import Outcome
from proxy.telemetry.record import Record

LINES_MAX = 10_000  # waiting; some 6 MB, and seconds of a busy gateway
TEXT_MAX = 128  # characters of a word from outside
_GATHER_SECONDS = 0.05  # lines are written together; waking the thread for each would cost more than the line

_WARNING = frozenset({Outcome.THROTTLED, Outcome.OVERLOADED, Outcome.FAILED, Outcome.TRUNCATED})


class Line(msgspec.Struct, omit_defaults=True):
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
    error_type: str = ""
    error_source: str = ""
    provider: str = ""
    key: str = ""  # the key's alias
    retry_reasons: tuple[str, ...] = ()
    ttft_ms: float | None = None
    tokens_in: int | None = None
    tokens_out: int | None = None
    tokens_cached: int | None = None
    tokens_reasoning: int | None = None
    finish_reason: str = ""
    upstream_request_id: str = ""


_encode = msgspec.json.Encoder().encode


def line_of(record: Record) -> bytes:
    """The call as one line, with its line feed; the time is that of the call's end."""
    line = Line(
        ts=datetime.fromtimestamp(record.began + record.seconds, UTC),
        level="warning" if record.outcome in _WARNING else "info",
        event="request",
        request_id=text(record.request_id),
        trace_id=f"{record.trace_id:032x}",
        span_id=f"{record.span_id:016x}",
        method=text(record.method),
        route=record.route,
        status=record.status,
        outcome=record.outcome._value_,
        model=record.model,
        stream=record.stream,
        attempts=len(record.attempts),
        queue_ms=_ms(record.queue_seconds),
        backoff_ms=_ms(record.backoff_seconds),
        upstream_ms=_ms(record.upstream_seconds),
        duration_ms=_ms(record.seconds),
        overhead_ms=_ms(record.overhead_seconds),
        bytes_in=record.bytes_in,
        bytes_out=record.bytes_out,
        error_type=record.error_type,
        error_source=record.error_source,
        provider=record.upstream,
        key=record.caller,
        finish_reason=text(record.finish_reason),
    )
    if record.attempts:
        line.upstream_request_id = text(record.attempts[-1].request_id)
        if len(record.attempts) > 1:
            line.retry_reasons = tuple(attempt.meaning.reason.value for attempt in record.attempts[:-1])
    if record.first_token is not None:
        line.ttft_ms = _ms(record.first_token - record.arrived)
    if (usage := record.usage) is not None:
        line.tokens_in = usage.input
        line.tokens_out = usage.output
        line.tokens_cached = usage.cached
        line.tokens_reasoning = usage.reasoning
    return _encode(line) + b"\n"


def text(said: str) -> str:
    """A word from outside, cut and harmless to a terminal and to any encoder."""
    said = said[:TEXT_MAX]
    return said if said.isascii() and said.isprintable() else ascii(said)[1:-1]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


class AccessLog:
    """Writes lines to a descriptor from a thread of its own.

    Args:
        fd: where to; it stays open.
        dropped: called as dropped("log", reason, count), from either thread.
        lines_max: how many may wait.
    """

    def __init__(self, fd: int, dropped: Callable[[str, str, int], None], *, lines_max: int = LINES_MAX) -> None:
        self._fd = fd
        self._dropped = dropped
        self._lines_max = lines_max
        self._changed = Condition()  # guards all below
        self._lines: list[bytes] = []
        self._writing = False
        self._hurried = False
        self._closed = False
        Thread(target=self._run, name="access-log", daemon=True).start()

    def take(self, record: Record) -> None:
        line = line_of(record)
        with self._changed:
            if self._closed:
                self._dropped("log", "shutdown", 1)
            elif len(self._lines) >= self._lines_max:
                self._dropped("log", "queue_full", 1)
            else:
                self._lines.append(line)
                if len(self._lines) == 1:
                    self._changed.notify_all()

    def flush(self, deadline_seconds: float) -> bool:
        """Wait until all lines are written; False if the deadline came first."""
        with self._changed:
            self._hurried = True
            self._changed.notify_all()
            done = self._changed.wait_for(lambda: not self._lines and not self._writing, deadline_seconds)
            self._hurried = False
            return done

    def close(self) -> None:
        """Take no more; what waits is still written. Returns at once: what blocks, blocks only the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while lines := self._gather():
            self._write(b"".join(lines))
            with self._changed:
                self._writing = False
                self._changed.notify_all()

    def _gather(self) -> list[bytes]:
        """The lines to write next; none at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._closed)
            self._changed.wait_for(lambda: self._hurried or self._closed, _GATHER_SECONDS)
            lines, self._lines = self._lines, []
            self._writing = bool(lines)
            return lines

    def _write(self, lines: bytes) -> None:
        rest = memoryview(lines)
        while rest:
            try:
                rest = rest[os.write(self._fd, rest) :]
            except BlockingIOError:  # somebody who shares the descriptor made it non-blocking
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()
            except OSError:  # nobody reads any longer, or the disk is full
                self._dropped("log", "write_failed", bytes(rest).count(b"\n"))
                return
