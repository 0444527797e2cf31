"""Which traces are kept, and the headers `traceparent` and `tracestate` in and out.

Source: W3C Trace Context, https://www.w3.org/TR/trace-context/. Baggage is neither read nor passed on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)
_SAMPLED = 1  # flag
_STATE_MAX = 512  # characters of a `tracestate` that is passed on; the recommendation's own bound
_RANDOM_BITS = 64  # of a trace id, the lower ones; some make the upper ones of the time


@dataclass(frozen=True, slots=True)
class Tracing:
    """Which traces are kept, and where they go.

    `endpoint` is the collector's base URL (`/v1/traces` is added) or the whole one; where it is empty, the standard
    OTEL_EXPORTER_OTLP_TRACES_ENDPOINT and OTEL_EXPORTER_OTLP_ENDPOINT are asked; without any there are no spans.
    """

    endpoint: str = ""
    ratio: float = 0.01  # of all calls, in [0, 1]; decided by the trace id, so every service decides alike
    slow_seconds: float = 30.0  # a call at least this slow is kept
    service_name: str = "penstock"  # where OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say none
    redact: tuple[str, ...] = ()  # regular expressions: what they find is masked in the content of calls


@dataclass(frozen=True, slots=True)
class Parent:
    trace_id: int
    span_id: int
    sampled: bool


def parse(header: str | None) -> Parent | None:
    """The asker's span, or None where the header is absent or not exactly what the recommendation allows.

    A version above 00 may say more after the flags; version ff and ids of zero are invalid.
    """
    if header is None or (match := _FORM.fullmatch(header)) is None:
        return None
    version, trace_id, span_id, flags, more = match.groups()
    if version == "ff" or (version == "00" and more is not None):
        return None
    parent = Parent(int(trace_id, 16), int(span_id, 16), bool(int(flags, 16) & _SAMPLED))
    return parent if parent.trace_id and parent.span_id else None


def state(header: str | None) -> str:
    """The asker's `tracestate` as it may be passed on; "" where it is too long or not plain text."""
    if header is None or len(header) > _STATE_MAX or not (header.isascii() and header.isprintable()):
        return ""
    return header.strip()


def header(trace_id: int, span_id: int, *, sampled: bool) -> str:
    return f"00-{trace_id:032x}-{span_id:016x}-{int(sampled):02x}"


def threshold(ratio: float) -> int:
    """For `is_below`: this share of all trace ids is below it."""
    return round(ratio * (1 << _RANDOM_BITS))


def is_below(trace_id: int, threshold: int) -> bool:
    """As OpenTelemetry's TraceIdRatioBased sampler decides: whoever uses the same ratio keeps the same traces."""
    return trace_id & ((1 << _RANDOM_BITS) - 1) < threshold
