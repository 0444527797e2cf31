"""Where requests come in: routing, the caller, the deadline; and where every error becomes an answer.

One plain function handles a request: no router, no chain of middlewares. Whatever arrives gets a record, an id and an
answer in the client's dialect; what nobody foresaw is logged once, here, and shown as nothing but its id.
"""

from __future__ import annotations

import asyncio
import logging
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from aiohttp import web
from aiohttp.http import HttpVersion11
from multidict import CIMultiDictProxy

from proxy.api import dialects, refusals
from proxy.api.answering import HttpAnswer, Streams
from proxy.api.bodies import SMALL, Bodies
from proxy.api.connections import Connection
from proxy.api.dialects import Dialect
from proxy.core.gate import Priority
from proxy.core.headers import TO_UPSTREAM, subprotocols, without_hops
from proxy.core.outcome import Outcome
from proxy.errors import (
    BodyTooLarge,
    ClientGone,
    ClientStalled,
    Draining,
    ExpectationFailed,
    GatewayError,
    Internal,
    InvalidRequest,
    MethodNotAllowed,
    Unauthorized,
    UnknownPath,
    UpstreamError,
)
from proxy.plan import Plan
from proxy.relay import BLOCKED_SECONDS, STOPPING, Policy
from proxy.telemetry import Record, Telemetry, story

log = logging.getLogger("penstock.edge")

_REQUEST_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")
_PRIORITIES = {"interactive": Priority.INTERACTIVE, "default": Priority.DEFAULT, "batch": Priority.BATCH}
READ_MARGIN_SECONDS = 1.0  # an SDK's own read timeout must not come before our answer


@dataclass(slots=True)
class Visit:
    """One request on its way through the edge: what every endpoint needs to know of it."""

    request: web.BaseRequest
    plan: Plan
    record: Record
    answer: HttpAnswer
    path: str  # what follows /v1, with its query
    now: Callable[[], float]
    stopping: asyncio.Event  # set when the gateway begins to stop
    bodies: Bodies
    held: int = 0  # bytes of the body that are in memory, or about to be

    async def parts(self) -> AsyncIterator[bytes]:
        """The body as it comes in; who does not ask for the next part stops the client.

        Raises:
            BodyTooLarge: it is longer than the configuration allows for what streams through.
            Malformed, TooSlow: it broke off, or did not come in time.
            ClientGone: the client left.
        """
        limit, record = self.plan.settings.server.max_upload_bytes, self.record
        if (self.request.content_length or 0) > limit:
            raise self._too_large(limit, "max_upload_bytes")
        if not self.request.content.is_eof():
            await self.ask_for_body()
        while True:
            began = self.now()
            try:
                part = await self.request.content.readany()
            except ConnectionError as error:
                raise ClientGone from error
            if (waited := self.now() - began) > BLOCKED_SECONDS:
                record.client_seconds += waited
            if not part:
                break
            record.bytes_in += len(part)
            if record.bytes_in > limit:
                raise self._too_large(limit, "max_upload_bytes")
            yield part
        if record.routed is None:
            record.body_read = self.now()

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            BodyTooLarge: it is longer than the configuration allows; no more of it was read than that.
            BodiesFull: there was no room for it.
            Malformed, TooSlow: it broke off, or did not come in time.
        """
        limit, length = self.plan.settings.server.max_body_bytes, self.request.content_length
        if length is not None:
            if length > limit:
                raise self._too_large(limit, "max_body_bytes")
            if length > SMALL:
                await self.hold(length)
            else:
                self._count(length)
        if not self.request.content.is_eof():
            await self.ask_for_body()
        parts: list[bytes] = []
        size = 0
        began = self.now()
        while part := await self.request.content.readany():
            size += len(part)
            if size > limit:
                raise self._too_large(limit, "max_body_bytes")
            if length is None:
                self.bodies.grow(len(part), self.held, self._budget)
                self.held = size
            parts.append(part)
        record = self.record
        record.bytes_in, record.body_read = size, self.now()
        if (waited := record.body_read - began) > BLOCKED_SECONDS:
            record.client_seconds += waited
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def hold(self, size: int) -> None:
        """So much of the body will be in memory until the call has ended.

        Raises:
            BodiesFull: there was no room for it before the deadline.
        """
        if size <= SMALL:
            self._count(size)
            return
        began = self.now()
        await self.bodies.take(size, self._budget, self.deadline - began)
        self.held += size
        self.record.queue_seconds += self.now() - began

    def _count(self, size: int) -> None:
        self.bodies.held += size
        self.held += size

    @property
    def _budget(self) -> int:
        server = self.plan.settings.server
        return max(server.bodies_bytes, server.max_body_bytes)

    async def ask_for_body(self) -> None:
        """Tell a client that waits to be told so (`Expect: 100-continue`) to send the body, whose pace is watched from
        now on.

        Raises:
            ExpectationFailed: the client expects something else.
        """
        request = self.request
        expected = request.headers.get("expect")
        if expected is not None and request.version == HttpVersion11:
            if expected.lower() != "100-continue":
                raise ExpectationFailed("nothing can be expected here but 100-continue; take the header out")
            try:
                await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            except ConnectionError as error:
                raise ClientGone from error
            request.writer.output_size = 0  # nothing of the answer has been sent
        _connection(request).watch(request.content)

    @staticmethod
    def _too_large(limit: int, setting: str) -> BodyTooLarge:
        return BodyTooLarge(f"the body is larger than {limit} bytes; send less, or raise server.{setting}")

    @property
    def priority(self) -> Priority:
        said = self.request.headers.get("x-penstock-priority", "default")
        priority = _PRIORITIES.get(said.lower())
        if priority is None:
            raise InvalidRequest("x-penstock-priority must be interactive, default or batch", param="priority")
        self.record.priority = priority.name.lower()
        return priority

    @property
    def deadline(self) -> float:
        """The least of what the configuration, the client's header and the SDK's own timeout allow."""
        headers = self.request.headers
        seconds = self.plan.settings.gate.max_wait_seconds
        if (asked := headers.get("x-request-timeout")) is not None:
            wanted = _seconds(asked)
            if wanted is None:
                raise InvalidRequest("x-request-timeout must be a number of seconds above 0", param="timeout")
            seconds = min(seconds, wanted)
        if (patience := _seconds(headers.get("x-stainless-read-timeout", ""))) is not None:
            seconds = min(seconds, max(0.0, patience - READ_MARGIN_SECONDS))
        return self.record.arrived + seconds

    @property
    def policy(self) -> Policy:
        """How often to retry: once at most, where the client itself is at a retry already."""
        retry = self.plan.settings.retry
        again = self.request.headers.get("x-stainless-retry-count", "0") != "0"
        attempts = min(2, retry.attempts) if again else retry.attempts
        return Policy(attempts, retry.base_seconds, retry.cap_seconds)

    def forwarded(self, allowed: Set[str] = TO_UPSTREAM) -> dict[str, str]:
        """The headers that may go upstream."""
        headers = self.request.headers
        told = {name: ", ".join(headers.getall(name)) for name in allowed if name in headers}
        for name, value in told.items():
            if not value.isprintable():
                raise InvalidRequest(f"the header {name} holds a byte that is no character; take it out")
        return without_hops(told, headers.get("connection", ""))

    @property
    def credential(self) -> dict[str, str]:
        """The client's own, for upstreams that pass it through; a caller's key is the gateway's and never leaves it."""
        if self.plan.needs_key:
            return {}
        headers = self.request.headers
        sent = {name: headers[name] for name in ("authorization", "x-api-key") if name in headers}
        if not sent and (key := _key_among_protocols(headers)):
            return {"authorization": f"Bearer {key}"}
        return sent


Handler = Callable[[Visit], Awaitable[None]]


@dataclass(slots=True, frozen=True)
class Endpoint:
    """What is done at one path.

    Attributes:
        operation: its word in metrics.
        route: the path as a constant, for labels and spans.
        handlers: by HTTP method.
    """

    operation: str
    route: str
    handlers: Mapping[str, Handler]


NOWHERE = Endpoint("other", "other", {})
_IN_PATHS = "/:@!$&'()*+,;=~"  # what a path may hold as it is, besides letters, digits, `_`, `.` and `-`


class _Table:
    """The endpoints of one dialect."""

    def __init__(self, endpoints: Mapping[str, Endpoint]) -> None:
        self._exact = {path: endpoint for path, endpoint in endpoints.items() if not path.endswith("/")}
        below = sorted((path for path in endpoints if path.endswith("/")), key=len, reverse=True)
        self._below = {path: endpoints[path] for path in below}

    def find(self, path: str) -> Endpoint:
        endpoint = self._exact.get(path)
        if endpoint is None:
            endpoint = next((below for start, below in self._below.items() if path.startswith(start)), NOWHERE)
        return endpoint


class Edge:
    """The handler of aiohttp's server.

    Args:
        plan: the plan in force when a request arrives; it keeps that one.
        endpoints: by path, for each dialect; a path that ends in `/` stands for all below it, of several the longest.
        streams: how those that clients wait for are kept alive.
    """

    def __init__(
        self,
        plan: Callable[[], Plan],
        endpoints: Mapping[Dialect, Mapping[str, Endpoint]],
        telemetry: Telemetry,
        streams: Streams,
        now: Callable[[], float],
        draw_bits: Callable[[int], int] = random.getrandbits,
    ) -> None:
        self._plan, self._telemetry, self._now, self._draw_bits = plan, telemetry, now, draw_bits
        self._tables = {dialect: _Table(known) for dialect, known in endpoints.items()}
        self._plain = frozenset(path for known in endpoints.values() for path in known if not path.endswith("/"))
        self._in_flight: set[asyncio.Task[Any]] = set()
        self._bodies = Bodies()
        self._streams = streams
        self._idle = asyncio.Event()
        self._is_cutting = False
        self._stopping = asyncio.Event()

    @property
    def draining(self) -> bool:
        return self._stopping.is_set()

    async def drain(self, seconds: float) -> bool:
        """Take nothing new; return when all in flight have ended, or after `seconds`. Returns whether all ended."""
        self._stopping.set()
        return await self._empty(seconds)

    async def cut(self, seconds: float) -> None:
        """End what is in flight: whoever has no answer is refused, a stream gets an error event, any other body is cut
        short. Return when all have been told, or after `seconds`."""
        self._is_cutting = True
        for task in tuple(self._in_flight):
            task.cancel(STOPPING)
        await self._empty(seconds)

    async def _empty(self, seconds: float) -> bool:
        if self._in_flight:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._idle.wait()
        return not self._in_flight

    async def __call__(self, request: web.BaseRequest, wrong: GatewayError | None = None) -> web.StreamResponse:
        """Answer a request; with `wrong`, if that is set."""
        headers = request.headers
        dialect, endpoint, target, wrong = self._look_up(request, wrong)
        asked_id = headers.get("x-request-id", "")
        record = self._telemetry.begin(
            endpoint.operation,
            request.method,
            endpoint.route,
            request_id=asked_id if _REQUEST_ID.fullmatch(asked_id) else f"req_{self._draw_bits(128):032x}",
            traceparent=headers.get("traceparent"),
            tracestate=headers.get("tracestate"),
        )
        task = asyncio.current_task()
        assert task is not None
        self._in_flight.add(task)
        with self._telemetry.request(record):
            answer = HttpAnswer(request, dialect, record, self._now, self._streams)
            try:
                await self._serve(request, endpoint, target, wrong, record, answer)
            except ClientGone as gone:
                left(record, "client_stalled" if isinstance(gone, ClientStalled) else "client_disconnect")
                answer.abort()
            except asyncio.CancelledError:
                if not self._is_cutting:
                    left(record, "client_disconnect")
                    raise
                task.uncancel()
                if record.outcome is Outcome.CANCELLED:  # else its client has all of it
                    await _cut_off(record, answer)
            finally:
                answer.close()
                self._in_flight.discard(task)
                if self.draining and not self._in_flight:
                    self._idle.set()
        return answer.response or web.Response()

    async def _serve(
        self,
        request: web.BaseRequest,
        endpoint: Endpoint,
        target: str,
        wrong: GatewayError | None,
        record: Record,
        answer: HttpAnswer,
    ) -> None:
        try:
            if wrong is not None:
                raise wrong
            if self.draining:
                raise Draining("the gateway is stopping; ask again, another one will answer", retry_after=1.0)
            plan = self._plan()
            handler = _handler(endpoint, request, answer.dialect)
            began = self._now()
            record.caller = _caller(plan, request.headers)
            record.auth_seconds = self._now() - began
            path = target.removeprefix("/v1")
            visit = Visit(request, plan, record, answer, path, self._now, self._stopping, self._bodies)
            try:
                await handler(visit)
            finally:
                self._bodies.leave(visit.held)
        except GatewayError as error:
            refused(record, error)
            await answer.refuse(error)
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001  # the edge is where the unforeseen is counted and logged, once
            await answer.refuse(unforeseen(record, error))

    def _look_up(
        self, request: web.BaseRequest, wrong: GatewayError | None
    ) -> tuple[Dialect, Endpoint, str, GatewayError | None]:
        """The dialect a request is in, what is done at its target, and that target written in the one way it can be
        read; or what is wrong with it."""
        target = request.raw_path
        path, mark, query = target.partition("?")
        wrong = wrong or refusals.objection(request, _connection(request).longest_head)
        if wrong is None and path not in self._plain:
            try:
                path = refusals.path(path)
                target = quote(path, safe=_IN_PATHS) + mark + query
            except InvalidRequest as error:
                wrong = error
        dialect = dialects.spoken(path, request.headers)
        endpoint = NOWHERE if wrong is not None else self._tables[dialect].find(path)
        return dialect, endpoint, target, wrong


def _connection(request: web.BaseRequest) -> Connection:
    connection = request.protocol
    assert isinstance(connection, Connection)
    return connection


def _handler(endpoint: Endpoint, request: web.BaseRequest, dialect: Dialect) -> Handler:
    handler = endpoint.handlers.get(request.method)
    if handler is not None:
        return handler
    if endpoint.handlers:
        allowed = ", ".join(endpoint.handlers)
        raise MethodNotAllowed(f"{request.method} is not possible here; use {allowed}", allowed=allowed)
    is_below = request.raw_path.startswith("/v1/") and not request.raw_path.startswith("/v1/v1/")
    hint = "" if is_below else f"; the endpoints begin with /v1, so {dialect.base}"
    raise UnknownPath(f"there is no such endpoint{hint}")


def _caller(plan: Plan, headers: CIMultiDictProxy[str]) -> str:
    """The caller's alias; "" where the gateway takes calls from anybody."""
    if not plan.needs_key:
        return ""
    said = headers.getall("authorization", ())
    if len(said) > 1:
        raise InvalidRequest("the header authorization came more than once; send one", code="duplicate_header")
    scheme, _, key = (said[0] if said else "").partition(" ")
    if scheme.lower() != "bearer" or not key:
        key = headers.get("x-api-key", "") or _key_among_protocols(headers)
    if not key:
        raise Unauthorized("no key was sent; send yours as `Authorization: Bearer KEY` or as x-api-key")
    alias = plan.caller(key.strip())
    if alias is None:
        raise Unauthorized("the key is not known here; ask whoever runs this gateway for one")
    return alias


def _key_among_protocols(headers: Mapping[str, str]) -> str:
    """A page in a browser can send its key nowhere else when it opens a WebSocket."""
    return subprotocols(headers.get("sec-websocket-protocol", ""))[1]


def refused(record: Record, error: GatewayError) -> None:
    """The call ends with an error of ours; of an attempt the relay has said what became of it."""
    if not isinstance(error, UpstreamError):
        record.outcome = Outcome.REJECTED
        record.error_type, record.error_source = error.word, error.source


def unforeseen(record: Record, error: Exception) -> Internal:
    """A mistake of ours, logged; what is said of it."""
    log.error("request %s failed: %s", record.request_id, story(error))
    record.outcome = Outcome.FAILED
    record.error_type, record.error_source = Internal.word, Internal.source
    return Internal(f"internal error; it is logged as {record.request_id}")


async def _cut_off(record: Record, answer: HttpAnswer) -> None:
    """The gateway stops before the call has ended."""
    try:
        await answer.refuse(cut_off(record, has_begun=answer.response is not None))
    except ClientGone:
        record.outcome = Outcome.CANCELLED
        left(record, "client_disconnect")


def cut_off(record: Record, *, has_begun: bool) -> Draining:
    """The gateway stops before the call has ended, after its answer has begun or before; what is said of it."""
    record.outcome = Outcome.TRUNCATED if has_begun else Outcome.REJECTED
    record.error_type, record.error_source = Draining.word, Draining.source
    record.end_reason = "shutdown" if has_begun else ""
    return Draining("the gateway has stopped; ask again, another one will answer", retry_after=1.0)


def left(record: Record, how: str) -> None:
    """The client went away, or might as well have. What broke before that keeps its own word."""
    if record.outcome is Outcome.CANCELLED:
        record.error_type, record.error_source = how, "client"
        if how == "client_stalled":
            record.end_reason = how
        if record.first_byte is None:
            record.status = 499


def _seconds(text: str) -> float | None:
    """A finite number above 0, or None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0.0 < value < 1e9 else None
