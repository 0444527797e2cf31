"""All that is known about one call; whoever learns something writes it here, and telemetry reads it once, at the end.

Times are seconds on the gateway's monotonic clock, except `began`, which is the wall clock at `arrived`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from proxy.core.gate import Level
from proxy.core.outcome import CANCELLED, Meaning, Outcome
from proxy.core.usage import Usage
from proxy.errors import GatewayError, UpstreamError
from proxy.telemetry.content import Content


@dataclass(slots=True)
class Attempt:
    """One try at one upstream."""

    upstream: str  # configured name
    model: str  # the model's name as sent to that upstream
    started: float
    meaning: Meaning = CANCELLED  # what holds if the block is left by cancellation
    status: int | None = None  # None: no answer came
    retry_after: float | None = None  # seconds, as the upstream asked
    cooled: bool = False  # with its refusal the upstream began to be left alone
    host: str = ""  # server.address and server.port of the span
    port: int = 0
    url: str = ""
    sent: float | None = None  # when the request was made and given to the transport
    first_byte: float | None = None  # when its headers had arrived
    ended: float | None = None
    request_id: str = ""  # the upstream's own id of this answer
    span_id: int = 0  # drawn when it is passed on, else with the spans


@dataclass(slots=True)
class Pause:
    """One stretch of waiting that was not an attempt: for places and rates, or for a backoff to pass."""

    kind: str  # "queue" or "backoff"
    started: float
    ended: float
    gate: str = ""  # the limit that was waited for
    result: str = ""  # admitted, timeout, cancelled
    source: str = ""  # of a backoff: retry_after or computed
    reason: str = ""  # of a backoff: the refused attempt's reason
    limit: float | None = None  # of a queue: the gate as it stood when the wait began
    in_use: int | None = None
    queue_depth: int | None = None


@dataclass(slots=True, frozen=True)
class LimitChange:
    """What this call made known: a limit is another one than was believed."""

    at: float
    gate: str
    limit: str  # requests, tokens, ..., concurrency
    before: float | None  # per minute, or places; None: it was not known
    after: float
    cause: str  # header, upstream_429, upstream_5xx, latency, manual


@dataclass(slots=True)
class StepTaken:
    """What became of one step of a pipeline, all its calls together."""

    step: str  # pipeline/step, as in the configuration
    result: str  # a word of catalogue.STEP_RESULTS
    started: float
    ended: float
    calls: int = 0  # made for it; a step that is mapped makes one for each item

    @property
    def name(self) -> str:
        return self.step.partition("/")[2]


@dataclass(slots=True)
class Run:
    """One run of a pipeline."""

    steps: list[StepTaken] = field(default_factory=list)  # in the order in which they ended
    calls: list[Record] = field(default_factory=list)  # made for the steps, in the order of their beginning


@dataclass(slots=True)
class Record:
    """One call, from its first byte to its last.

    A step of a pipeline is a call of its own, made for another, its whole. It has a span and what it cost, and is no
    client's request. The usage and the cost of its whole are sums, counted with the steps already.
    """

    request_id: str
    operation: str  # chat, completions, embeddings, messages, models, ...; a word of the catalogue's OPERATIONS
    method: str
    route: str  # the path as a constant of the routing table; "other" where none matched
    arrived: float
    began: float

    model: str = "other"  # the model as the configuration names it
    asked_model: str = ""  # as the client wrote it; for spans and logs, never a label
    caller: str = ""  # alias of the key, "" when anonymous
    priority: str = "default"
    stream: bool = False
    max_tokens: int | None = None

    status: int = 499  # as the client saw it; 499: it left before an answer
    outcome: Outcome = Outcome.CANCELLED
    error_type: str = ""  # word of the catalogue; "" when all went well
    error_source: str = ""  # client, gateway or upstream

    upstream: str = ""  # the one whose answer was passed on, or the last that was tried
    attempts: list[Attempt] = field(default_factory=list)
    pauses: list[Pause] = field(default_factory=list)
    limit_changes: list[LimitChange] = field(default_factory=list)
    queue_seconds: float = 0.0
    backoff_seconds: float = 0.0
    upstream_seconds: float = 0.0  # waiting for the upstream: to connect, for its headers, for its next bytes
    client_seconds: float = 0.0  # waiting for a client slow to read
    admitted: str = ""  # immediate, queued, rejected_full, rejected_timeout, cancelled, shutdown; "": never asked
    gate: str = ""  # the limit that was waited for, or that refused

    first_byte: float | None = None  # when the first byte of the answer left
    first_token: float | None = None  # when the first content left, streams only
    last_byte: float | None = None
    max_gap_seconds: float = 0.0  # the longest silence between two chunks
    max_gap_at: float = 0.0  # when it began
    chunks: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    usage: Usage | None = None
    usage_unread: bool = False  # the answer may have told it, in a way that could not be read
    estimate: Usage | None = None  # of what broke off, by what had streamed: for the limits alone, never counted
    drained: str = ""  # whole or late: the answer was read on after its client had left
    pings: int = 0  # comments that were sent into its silence
    cost: int | None = None  # micro-dollars; None: without usage or without a price
    content: Content | None = None  # what was asked and answered, where the configuration wants it in the spans
    finish_reason: str = ""
    response_id: str = ""
    response_model: str = ""
    end_reason: str = ""  # of a stream: done, or why it broke

    ended: float = 0.0
    slow_lines: int = 0  # times it was logged while it ran
    trace_id: int = 0  # drawn at the start, so that it can be passed on
    span_id: int = 0
    parent_span_id: int = 0  # 0: the trace begins here
    trace_sampled: bool = False  # the asker's trace is sampled: keep ours
    linked: str = ""  # traceparent of the request that this call was made for, where it is not a part of it
    trace_state: str = ""  # what the asker's tracer says beside (`tracestate`); passed on, never read

    body_read: float | None = None  # when the request's body was there
    routed: float | None = None  # when it was known what is asked for and where it may go
    auth_seconds: float = 0.0
    decided: Callable[[], None] | None = None  # called when the gate has let the call in or refused it
    relay_seconds: float | None = None  # spent passing the answer on, waits taken out

    step: str = ""  # pipeline/step, where this is the call of a step
    run: Run | None = None  # where this is the call of a pipeline

    def waited(
        self,
        kind: str,
        started: float,
        ended: float,
        *,
        gate: str = "",
        result: str = "",
        source: str = "",
        reason: str = "",
        stood: Level | None = None,
    ) -> None:
        """A stretch of waiting is over."""
        pause = Pause(kind, started, ended, gate, result, source, reason)
        if stood is not None:
            pause.limit, pause.in_use, pause.queue_depth = stood.concurrency, stood.in_use, sum(stood.waiting.values())
        self.pauses.append(pause)
        if kind == "backoff":
            self.backoff_seconds += ended - started
        else:
            self.queue_seconds += ended - started

    def limit_changed(self, at: float, gate: str, limit: str, before: float | None, after: float, cause: str) -> None:
        """This call's answer moved a limit."""
        self.limit_changes.append(LimitChange(at, gate, limit, before, after, cause))

    def admission(self, result: str, gate: str) -> None:
        """The door decided."""
        self.admitted, self.gate = result, gate
        if self.decided is not None:
            self.decided()

    @property
    def is_sent(self) -> bool:
        """Whether something of it, or of one of its steps, is at an upstream now."""
        calls = [self] if self.run is None else self.run.calls
        return any(call.attempts and call.attempts[-1].ended is None for call in calls)

    def refused(self, error: GatewayError) -> None:
        """An error is the answer. Of one that is an upstream's doing, the relay has said what became of it."""
        self.status = error.status
        if not isinstance(error, UpstreamError):
            self.outcome = Outcome.REJECTED
            self.error_type, self.error_source = error.word, error.source

    @property
    def seconds(self) -> float:
        """Arrival to last byte."""
        return self.ended - self.arrived

    @property
    def phase(self) -> str:
        """What the call is doing, or was doing when it ended: queued, waiting (for an answer) or streaming."""
        if self.first_byte is not None:
            return "streaming"
        return "waiting" if self.attempts or self.run is not None else "queued"

    @property
    def overhead_seconds(self) -> float:
        """What the gateway itself spent: the total less the union of all waits. They never overlap within one call."""
        waited = self.queue_seconds + self.backoff_seconds + self.upstream_seconds + self.client_seconds
        own = self.ended - self.arrived - waited
        return own if own > 0.0 else 0.0
