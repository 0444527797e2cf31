"""The life of one request. Read this file first.

    admitted -> attempt -> (refused or failed -> pause -> attempt) -> passed on -> settled

The order of the `with` blocks is the order of the guarantees. The record is opened by whoever took the call in and
outlives everything; the place in the process outlives the attempts; an attempt outlives its last byte, and with it its
share of the target's limits. Whoever wants an answer, be it an HTTP client, a batch or a pipeline step, calls
`Relay.run` with a sink of its own.

1. A place ends with the last byte, not with the headers.
2. Headers leave with the first byte. Before it a failure may be retried; after it never: it is told in band. One
   exception: a sink may let them go before, to say that it is alive; then what fails in the end is told in band, too.
3. Between two attempts nothing of a target is held; the place in the process is.
4. What the client gets at last is what the upstream sent, or an error of ours that says why there is nothing to send.
5. The outcome is written after the last byte; until then it is `cancelled`.
6. A body that was not kept is sent once: when a part of it is gone, nothing is tried again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Protocol

from proxy import conversation
from proxy.core import backoff, headers, outcome
from proxy.core.answer import BodyReader
from proxy.core.asked import Asked
from proxy.core.breaker import Breaker
from proxy.core.gate import Priority
from proxy.core.learner import Size
from proxy.core.outcome import Meaning, Outcome, Reason, Retry
from proxy.core.retry_budget import RetryBudget
from proxy.core.route import Tries
from proxy.core.sse import Reader, is_stream
from proxy.core.usage import Usage
from proxy.errors import (
    ClientGone,
    GatewayError,
    NotFound,
    QueueTimeout,
    StreamTruncated,
    UpstreamBroke,
    UpstreamError,
    UpstreamGarbage,
    UpstreamShut,
    UpstreamTimeout,
    UpstreamUnreachable,
)
from proxy.limits import Admission, Limits
from proxy.plan import Route, Target
from proxy.telemetry import Attempt, Content, Record, Telemetry
from proxy.upstreams import AttemptFailed, Body, Line, Reply, Transport, Upstream

ERROR_BODY_LIMIT = 1 << 20  # bytes of a refusal that are read and passed on
UNUSED = Usage()  # what an attempt took that was never sent
AFTER_END_SECONDS = 0.1  # for an upstream to end its answer after [DONE]; else its connection is closed
STOPPING = "stopping"  # the message of a cancellation by which the gateway, and not the client, ends a call
BLOCKED_SECONDS = 0.001  # a write that took longer was waiting for the client; a shorter one is our own work


class Sink(Protocol):
    """Where an answer goes. `start` is called at most once, before any `write`; then `finish`, or `fail`."""

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        """Raises `ClientGone`, as all of these do, when nobody reads any more."""

    async def write(self, chunk: bytes) -> None:
        """Returns when there is room for more: a slow reader stops the reading of the upstream."""

    async def finish(self) -> None:
        """The answer is whole."""

    async def fail(self, error: GatewayError) -> None:
        """The answer that was started broke off; its reader must not take it for whole."""


class Wanted(Protocol):
    """What a call wants: a JSON body that is held in memory, one that streams through, or a WebSocket."""

    @property
    def model(self) -> str:
        """As the client wrote it; "" where none is named."""

    @property
    def stream(self) -> bool: ...

    @property
    def max_tokens(self) -> int | None: ...

    @property
    def wants_usage(self) -> bool: ...

    @property
    def input_tokens(self) -> float: ...

    @property
    def is_spent(self) -> bool:
        """Whether it cannot be sent any more: a part of it was sent that nobody kept."""

    def rewritten(self, model: str, *, ask_usage: bool) -> Body:
        """The body as an upstream gets it that knows the model by this name."""


class Memory(Protocol):
    """Where the steps of a call are kept that is to be finished by whoever comes after us."""

    def recall(self, step: str) -> bytes | None:
        """What `keep` was given for this step, of an earlier try."""

    async def keep(self, step: str, gave: bytes) -> None:
        """Returns once it is safe."""


@dataclass(slots=True, frozen=True)
class Policy:
    """How failures are tried again; the words of the configuration's `retry`."""

    attempts: int = 3
    base_seconds: float = 0.5
    cap_seconds: float = 20.0


@dataclass(slots=True)
class Call:
    """What was asked for.

    Attributes:
        path: what followed `/v1`, beginning with a slash, with its query.
        headers: those that may go upstream.
        credential: the client's own, for an upstream that passes it through.
        deadline: on the monotonic clock; admitted, or tried once more, only before it.
        reports_usage: whether the endpoint knows `stream_options.include_usage`.
        accept: for a call that is to become a WebSocket: answers the client's upgrade, once the upstream has answered
            ours with this subprotocol.
        marks_end: whether its streams end with a mark, so that one without it is broken.
        seeks: the id of a thing that may be at any of the targets: where one has none, the next is asked; "": of none.
        memory: of a pipeline's steps, so that what is paid for is not paid again; None: it is not kept.
    """

    method: str
    path: str
    route: Route
    asked: Wanted
    headers: Mapping[str, str]
    credential: Mapping[str, str]
    priority: Priority
    caller: str
    deadline: float
    policy: Policy
    reports_usage: bool = False
    marks_end: bool = True
    seeks: str = ""
    accept: Callable[[str | None], Awaitable[Line]] | None = None
    memory: Memory | None = None

    @property
    def size(self) -> Size:
        return Size(input_tokens=self.asked.input_tokens, max_tokens=self.asked.max_tokens, model=self.asked.model)

    @property
    def hides_usage(self) -> bool:
        """The gateway asks for the usage of a stream whose client did not, and takes it out of the answer."""
        return self.reports_usage and self.asked.stream and not self.asked.wants_usage


@dataclass(slots=True)
class Setback:
    """An attempt after which nothing has left for the client: it may be tried again, or be the last word."""

    meaning: Meaning
    status: int = 0  # 0: there is no answer to pass on, only `error`
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    retry_after: float | None = None
    error: AttemptFailed | None = None


class Runs(Protocol):
    """What answers a call: the relay, or what stands before it and makes several calls of one."""

    def run(self, call: Call, sink: Sink, record: Record) -> Awaitable[None]:
        """As `Relay.run`."""

    @property
    def breakers(self) -> Mapping[str, Breaker]:
        """By upstream, of those that were ever asked."""


class Relay:
    """
    Args:
        now: the monotonic clock, in seconds.
        wall: the wall clock, for dates in headers.
        draw: random numbers in [0, 1).
    """

    def __init__(
        self,
        limits: Limits,
        transport: Transport,
        telemetry: Telemetry,
        now: Callable[[], float],
        wall: Callable[[], float],
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._limits, self._transport, self._telemetry = limits, transport, telemetry
        self._now, self._wall, self._draw = now, wall, draw
        self._budgets: dict[str, RetryBudget] = {}
        self._breakers: dict[str, Breaker] = {}

    async def run(self, call: Call, sink: Sink, record: Record) -> None:
        """Answer `call` from the first of its targets that can, into `sink`.

        Raises:
            QueueFull, QueueTimeout, Draining: nothing was written.
            NotFound: none of the targets has what the call seeks; nothing was written.
            UpstreamError: no attempt brought an answer that could be passed on; nothing was written.
            ClientGone: the client cannot be written to.
        """
        record.routed = self._now()
        if call.route.captures and isinstance(call.asked, Asked):
            record.content = Content(call.route.captures, call.asked.body)
        async with self._limits.admit(
            call.route.targets,
            call.size,
            priority=call.priority,
            caller=call.caller,
            deadline=call.deadline,
            notes=record,
        ) as admission:
            tries = Tries(call.route.targets, call.policy.attempts)
            last: Setback | None = None
            while (setback := await self._attempt(call, admission, sink, record)) is not None:
                if last is None or _worth(setback) >= _worth(last):
                    last = setback
                if not await self._come_again(call, tries, setback, admission):
                    await self._give_up(call, last, sink, record)
                    return

    async def _attempt(self, call: Call, admission: Admission[Target], sink: Sink, record: Record) -> Setback | None:
        """Try the admission's target once. None: its answer has been passed on, whole or broken."""
        target = admission.target
        upstream = target.upstream
        model = target.model or call.asked.model
        breaker = self._breakers.setdefault(upstream.name, Breaker())
        if not breaker.admits(self._now(), self._draw()):
            record.upstream = record.upstream or upstream.name
            admission.settle(UNUSED)
            return Setback(outcome.SHUT, retry_after=breaker.shut_for(self._now()) or None)
        record.upstream = upstream.name
        url = upstream.base_url + call.path
        with self._telemetry.attempt(record, upstream.name, model, upstream.host, upstream.port, url) as attempt:
            try:
                body = call.asked.rewritten(model, ask_usage=call.hides_usage)
                extra = self._headers(call, target, record, attempt)
                sent = attempt.sent = self._now()
                uploaded = record.client_seconds
                async with self._transport.send(upstream, call.method, call.path, extra, body) as reply:
                    attempt.status, attempt.first_byte = reply.status, self._now()
                    attempt.request_id = reply.headers.get("x-request-id", reply.headers.get("request-id", ""))
                    record.upstream_seconds += attempt.first_byte - sent - (record.client_seconds - uploaded)
                    if reply.status >= 400:
                        return await self._refusal(call, reply, admission, attempt, record)
                    admission.answered(reply.headers)
                    if call.accept is not None:
                        attempt.meaning = await self._converse(call.accept, reply.line(), record)
                    else:
                        attempt.meaning = await self._pass_on(call, upstream, reply, sink, record)
                        if record.first_token is not None:
                            admission.sped(record.first_token - sent)
                    if attempt.meaning is outcome.OK:
                        self._budget(upstream.name).succeeded(self._now())
                    if call.accept is None:
                        await self._drain(reply, record)
                    return None
            except AttemptFailed as error:
                begun = record.first_byte is not None
                attempt.meaning = outcome.of_failure(error.reason, begun=begun)
                if attempt.first_byte is None:
                    admission.failed()
                if not begun:
                    return Setback(attempt.meaning, error=error)
                await self._break_off(attempt.meaning, sink, record)
                return None
            finally:
                if attempt.first_byte is None and attempt.sent is not None:
                    record.upstream_seconds += self._now() - attempt.sent - (record.client_seconds - uploaded)
                left = attempt.meaning is outcome.CANCELLED and record.first_byte is not None
                breaker.ended(outcome.OK if left else attempt.meaning, attempt.retry_after, self._now())
                admission.settle(record.estimate or record.usage)

    def _headers(self, call: Call, target: Target, record: Record, attempt: Attempt) -> Mapping[str, str]:
        upstream = target.upstream
        if not upstream.passthrough and not upstream.propagate_trace:
            return call.headers
        extra = dict(call.headers)
        if upstream.passthrough:
            extra.update(call.credential)
        if upstream.propagate_trace:
            extra.update(self._telemetry.trace_headers(record, attempt))
        return extra

    async def _refusal(
        self, call: Call, reply: Reply, admission: Admission[Target], attempt: Attempt, record: Record
    ) -> Setback:
        """Read an error answer and tell the limits what it means."""
        began = self._now()
        try:
            body = admission.target.upstream.scrubbed(await reply.body(ERROR_BODY_LIMIT))
        finally:
            record.upstream_seconds += self._now() - began
        code, kind, message = headers.error_of_body(body)
        meaning = outcome.of_answer(reply.status, code=code, kind=kind, message=message)
        if call.seeks and outcome.says_absent(reply.status, code):
            meaning = outcome.ABSENT
        retry_after = headers.retry_after(reply.headers, self._wall())
        if retry_after is None and meaning.retry is Retry.PACED:
            retry_after = headers.retry_after_of_body(body)
        attempt.meaning, attempt.retry_after = meaning, retry_after
        if meaning.outcome is Outcome.THROTTLED:
            was_held = self._is_held(admission.target)
            admission.refused(meaning, reply.headers, retry_after)
            attempt.cooled = not was_held and self._is_held(admission.target)
        elif meaning.outcome is Outcome.REJECTED:
            admission.answered(reply.headers)
        else:
            admission.failed(is_full=meaning.outcome is Outcome.OVERLOADED)
        return Setback(meaning, reply.status, reply.headers, body, retry_after)

    async def _come_again(
        self, call: Call, tries: Tries[Target], setback: Setback, admission: Admission[Target]
    ) -> bool:
        """Wait for the next attempt's turn. False: there will be none, or not before the deadline."""
        pause = self._pause(call, tries, setback, admission.target)
        if pause is None or self._now() + pause >= call.deadline:
            return False
        source = "computed" if setback.retry_after is None else "retry_after"
        try:
            await admission.again(tries.targets, after=pause, reason=setback.meaning.reason.value, source=source)
        except QueueTimeout:
            return False
        return True

    def _pause(self, call: Call, tries: Tries[Target], setback: Setback, target: Target) -> float | None:
        """Seconds until the next attempt; None: that was the last. How long a limit holds is the gate's to know."""
        retry = setback.meaning.retry
        if retry is Retry.NEVER or call.asked.is_spent:
            return None
        if retry is Retry.PACED:
            return 0.0 if tries.refused() else None
        if retry is Retry.ELSEWHERE:
            return 0.0 if tries.failed(target) and tries.is_fresh else None
        if not tries.failed(target) or not self._budget(target.upstream.name).spend(self._now()):
            return None
        if tries.is_fresh:
            return 0.0
        policy = call.policy
        return backoff.delay(
            tries.failures - 1,
            self._draw(),
            base=policy.base_seconds,
            cap=policy.cap_seconds,
            retry_after=setback.retry_after,
        )

    @property
    def breakers(self) -> Mapping[str, Breaker]:
        """By upstream, of those that were ever asked."""
        return self._breakers

    def _is_held(self, target: Target) -> bool:
        """Whether refusals keep everybody back from it."""
        rates = target.account.rates
        return rates is not None and rates.held(self._now()) > 0.0

    def _budget(self, upstream: str) -> RetryBudget:
        return self._budgets.setdefault(upstream, RetryBudget())

    async def _pass_on(self, call: Call, upstream: Upstream, reply: Reply, sink: Sink, record: Record) -> Meaning:
        """Pass the answer on, and read on the side what it tells.

        Raises:
            AttemptFailed: it broke off; `record.first_byte` says whether anything had left.
        """
        began, waited = self._now(), record.upstream_seconds + record.client_seconds
        reader = Reader(hide_usage=call.hides_usage) if is_stream(reply.headers) else BodyReader(reply.headers)
        try:
            await self._copy(call, reply, reader, sink, record)
        except (ClientGone, asyncio.CancelledError) as left:
            if upstream.drain_seconds and STOPPING not in left.args:
                await self._read_on(reply, reader, upstream.drain_seconds, record)
            raise
        finally:
            reader.close()
            record.usage, record.finish_reason = reader.usage, reader.finish_reason
            record.usage_unread = reader.usage_unread
            record.response_id, record.response_model = reader.response_id, reader.response_model
            if not reader.finish_reason and (events := reader.output_events(record.bytes_out)):
                record.estimate = _estimated(call.asked.input_tokens, record.usage, events)
        await self._write(reply, reader.rest(), sink, record)
        await self._told(sink.finish(), record)
        record.last_byte = self._now()
        waited = record.upstream_seconds + record.client_seconds - waited
        record.relay_seconds = max(0.0, record.last_byte - began - waited)
        meaning = outcome.of_failure(Reason.ERROR_EVENT, begun=True) if reader.error else outcome.OK
        self._close(record, meaning, end_reason="error_event" if reader.error else "done")
        return meaning

    async def _copy(self, call: Call, reply: Reply, reader: Reader | BodyReader, sink: Sink, record: Record) -> None:
        """Until the answer has ended. What breaks after its end has passed is whole."""
        try:
            while not reader.is_over and (chunk := await self._read(reply, record)):
                if whole := reader.feed(chunk):
                    await self._write(reply, whole, sink, record)
                if record.first_token is None and reader.first_token:
                    record.first_token = self._now()
            if not reader.close() and not reader.error and call.marks_end:
                raise AttemptFailed(Reason.EOF, "the stream ended without its closing mark")
        except AttemptFailed:
            reader.close()
            if not reader.is_finished and not reader.error:
                raise

    async def _drain(self, reply: Reply, record: Record) -> None:
        """The client has all of it; let the upstream end, so that its connection can serve again."""
        began = self._now()
        try:
            await reply.drain(AFTER_END_SECONDS)
        finally:
            record.upstream_seconds += self._now() - began

    async def _read_on(self, reply: Reply, reader: Reader | BodyReader, seconds: float, record: Record) -> None:
        """The client has left: read the rest for its usage, and give it to nobody."""
        record.drained = "late"
        with suppress(AttemptFailed, TimeoutError):
            async with asyncio.timeout(seconds):
                while not reader.is_over and (chunk := await self._read(reply, record)):
                    reader.feed(chunk)
                record.drained = "whole"

    async def _converse(
        self, accept: Callable[[str | None], Awaitable[Line]], upstream: Line, record: Record
    ) -> Meaning:
        """Let client and upstream talk over their WebSockets until one of them closes.

        Raises:
            AttemptFailed: the upstream was lost.
        """
        client = await accept(upstream.protocol)
        record.first_byte, record.status = self._now(), 101
        ending = await conversation.hold(client, upstream, record, self._now)
        record.last_byte = self._now()
        self._close(record, ending.meaning, end_reason="done")
        await ending.finish()
        return ending.meaning

    async def _read(self, reply: Reply, record: Record) -> bytes:
        began = self._now()
        try:
            return await reply.read()
        finally:
            silent = self._now() - began
            record.upstream_seconds += silent
            if record.chunks and silent > record.max_gap_seconds:
                record.max_gap_seconds, record.max_gap_at = silent, began

    async def _write(self, reply: Reply, data: bytes, sink: Sink, record: Record) -> None:
        began = self._now()
        try:
            if record.first_byte is None:
                record.first_byte, record.status = began, reply.status
                await sink.start(reply.status, _for_client(reply.status, reply.headers))
            if data:
                await sink.write(data)
                record.chunks += 1
                record.bytes_out += len(data)
                if record.content is not None:
                    record.content.answered(data)
        finally:
            self._waited_for_client(began, record)

    async def _told(self, telling: Awaitable[None], record: Record) -> None:
        began = self._now()
        try:
            await telling
        finally:
            self._waited_for_client(began, record)

    def _waited_for_client(self, began: float, record: Record) -> None:
        blocked = self._now() - began
        if blocked > BLOCKED_SECONDS:
            record.client_seconds += blocked

    async def _break_off(self, meaning: Meaning, sink: Sink, record: Record) -> None:
        """An answer that had begun will not end: say so where the client reads."""
        self._close(record, meaning, end_reason=meaning.reason.value)
        error = StreamTruncated(f"{record.upstream} broke off its answer ({meaning.reason.value}); it is not whole")
        await self._told(sink.fail(error), record)
        record.last_byte = self._now()

    async def _give_up(self, call: Call, setback: Setback, sink: Sink, record: Record) -> None:
        """The last word: the upstream's own answer, or an error of ours where it gave none."""
        self._close(record, setback.meaning)
        if setback.meaning is outcome.SHUT:
            raise UpstreamShut(
                f"upstream {record.upstream} is not asked for now, after refusals or failures; the operator's "
                "/admin/limits says why",
                retry_after=setback.retry_after,
            )
        if setback.meaning is outcome.ABSENT:
            raise NotFound.of(call.seeks)
        if setback.error is not None:
            error = _as_error(setback.error.reason, record.upstream)
            if call.asked.is_spent:
                error.should_retry = None
            raise error from setback.error
        record.status, record.first_byte = setback.status, self._now()
        told = _for_client(setback.status, setback.headers) | {"content-length": str(len(setback.body))}
        was_retried = setback.meaning.retry is not Retry.NEVER or setback.status == 429 or setback.status >= 500
        if was_retried and not call.asked.is_spent:
            told["x-should-retry"] = "false"  # it was retried here, or does not help: the client need not
        await self._told(sink.start(setback.status, told), record)
        await self._told(sink.write(setback.body), record)
        await self._told(sink.finish(), record)
        if record.content is not None:
            record.content.answered(setback.body)
        record.last_byte, record.bytes_out = self._now(), len(setback.body)

    @staticmethod
    def _close(record: Record, meaning: Meaning, *, end_reason: str = "") -> None:
        record.outcome, record.end_reason = meaning.outcome, end_reason
        record.error_type, record.error_source = meaning.reason.word, meaning.reason.source


def _worth(setback: Setback) -> int:
    """As a call's last word. That one was not asked again is none where it said something before; that one has not what
    is sought is none while another, which may have it, did not say so."""
    return {outcome.ABSENT: 0, outcome.SHUT: 1}.get(setback.meaning, 2)


def _estimated(input_tokens: float, told: Usage | None, events: int) -> Usage:
    """What an answer took that broke off: a token for each event, where the upstream did not say otherwise."""
    if told is None:
        return Usage(round(input_tokens), events)
    return replace(told, output=max(told.output, events))


def _for_client(status: int, said: Mapping[str, str]) -> dict[str, str]:
    told = headers.for_client(said)
    if status < 300:
        told.pop("retry-after", None)  # Anthropic sends it with every answer; only a refusal means it
    if "content-length" in said and not is_stream(said):
        told["content-length"] = said["content-length"]
    return told


def _as_error(reason: Reason, upstream: str) -> UpstreamError:
    if reason is Reason.CONNECT:
        return UpstreamUnreachable(f"no connection to upstream {upstream}; is it up, and its base_url right?")
    if reason in (Reason.FIRST_BYTE, Reason.IDLE):
        return UpstreamTimeout(f"upstream {upstream} did not answer in time")
    if reason is Reason.GARBAGE:
        return UpstreamGarbage(f"upstream {upstream} answered with something that is not HTTP")
    return UpstreamBroke(f"upstream {upstream} closed the connection before its answer")
