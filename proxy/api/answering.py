"""The answer to one HTTP request: the relay's sink, and the gateway's own errors in the client's dialect."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol, cast

import msgspec
from aiohttp import web
from aiohttp.http import HttpVersion11, StreamWriter

from proxy.api.dialects import Dialect
from proxy.core.sse import is_stream
from proxy.errors import ClientGone, ClientStalled, GatewayError, MethodNotAllowed, UpstreamGarbage
from proxy.telemetry import Record, server_timing

SERVER = "penstock"
PING = b": ping\n\n"  # a comment: what else has no data (an empty `data:`, a lone `id:`) crashes OpenAI's SDKs
LOOKS = 4  # at a stream in the time that it may be silent
INSTEAD_LIMIT = 1 << 20  # bytes of an answer that cannot be passed on, which are looked at for an error to be told
_EVENT_ENDS = (b"\n\n", b"\n\r\n", b"\r\r")


class _Passing(web.StreamResponse):
    """Headers and the first bytes leave in one write: one system call less for every call."""

    _send_headers_immediately = False


class Failing(Protocol):
    """What can be told of an error after it has begun."""

    async def fail(self, error: GatewayError) -> None: ...


class Streams:
    """The streams that clients read or wait for.

    Args:
        ping_seconds: the longest that one of them is silent; 0: as long as it likes.
        stall_seconds: how long a client may take nothing of what is sent to it.
    """

    def __init__(self, ping_seconds: float, stall_seconds: float) -> None:
        self._ping_seconds, self.stall_seconds = ping_seconds, stall_seconds
        self.open: set[HttpAnswer] = set()

    async def keep_alive(self) -> None:
        """Send a comment into each that is silent. One task looks after all of them, so none costs a timer."""
        while self._ping_seconds:
            await asyncio.sleep(self._ping_seconds / LOOKS)
            for answer in tuple(self.open):
                if answer in self.open and answer.is_silent():  # it may have ended while another was pinged
                    with suppress(ClientGone):
                        await answer.ping()
                    await asyncio.sleep(0)  # a thousand of them must not hold up the rest


class HttpAnswer:
    """Writes an answer to the client that asked; see `proxy.relay.Sink`.

    A stream that waits for long begins before there is an answer: its headers leave with a first comment. What then
    comes instead of a stream is told as an error event.

    Attributes:
        dialect: the client's.
        response: None until an answer has begun.
        line: the client's WebSocket, where the answer has become one.
    """

    __slots__ = (
        "_instead",
        "_last",
        "_now",
        "_record",
        "_request",
        "_seen",
        "_silent_looks",
        "_streams",
        "_writer",
        "dialect",
        "is_stream",
        "line",
        "response",
    )

    def __init__(
        self,
        request: web.BaseRequest,
        dialect: Dialect,
        record: Record,
        now: Callable[[], float],
        streams: Streams,
    ) -> None:
        self._request, self.dialect, self._record, self._now, self._streams = request, dialect, record, now, streams
        self._writer = cast(StreamWriter, request.writer)
        self._instead: bytearray | None = None  # what came for a stream that had begun with a comment, and is none
        self._last = b""  # what was written last
        self._seen = self._silent_looks = 0
        self.is_stream = False
        self.response: web.StreamResponse | None = None
        self.line: Failing | None = None

    def expect_stream(self) -> None:
        """The client waits for a stream: from now on it is not left in silence."""
        self._streams.open.add(self)

    def close(self) -> None:
        """There will be no stream, or no more of it."""
        self._streams.open.discard(self)

    async def start(self, status: int, headers: Mapping[str, str], *, closes: bool = False) -> None:
        """`closes`: the connection ends with this answer, and says so."""
        streams = is_stream(headers)
        if self.response is not None:
            self._record.status = 200  # as the client saw it, with the first comment
            if status != 200 or not streams:
                self._instead = bytearray()
            return
        self.is_stream = streams
        if streams:
            self.expect_stream()
        else:
            self.close()
        self.response = _Passing(status=status, headers=self.headers(headers))
        without_end = self._request.version != HttpVersion11 and "content-length" not in headers
        if closes or without_end:  # without chunks, only the connection's end tells the answer's
            self.response.force_close()
        try:
            await self.response.prepare(self._request)
        except ConnectionError as error:
            raise ClientGone from error

    async def write(self, chunk: bytes) -> None:
        if self._instead is not None:
            self._instead += chunk[: INSTEAD_LIMIT - len(self._instead)]
            return
        self._last = chunk
        try:
            await self._writer.write(chunk, drain=False)
        except ConnectionError as error:
            raise ClientGone from error
        if self._request.protocol.writing_paused:
            await self._room()

    async def _room(self) -> None:
        """Return when the client has taken most of what was sent to it."""
        try:
            async with asyncio.timeout(self._streams.stall_seconds):
                await self._writer.drain()
        except TimeoutError:
            raise ClientStalled from None
        except ConnectionError as error:
            raise ClientGone from error

    async def finish(self) -> None:
        assert self.response is not None
        if self._instead is not None:
            event, self._instead = self._told_of(self._instead), None
            await self.write(event)
        self.close()
        try:
            await self.response.write_eof()
        except ConnectionError as error:
            raise ClientGone from error

    async def fail(self, error: GatewayError) -> None:
        """A stream gets an error event, as the SDKs understand it; any other body ends with its connection, so that it
        comes up short of its length or its last chunk."""
        self._instead = None
        if self.line is not None:
            await self.line.fail(error)
        elif self.is_stream:
            await self.write(_event(self._encoded(error, type="error")))
            await self.finish()
        elif (transport := self._request.transport) is not None:
            transport.close()

    def is_silent(self) -> bool:
        """Whether it is time for a comment, and one may stand here. Asked `LOOKS` times in the longest silence."""
        if self._seen != self._record.chunks:
            self._seen, self._silent_looks = self._record.chunks, 0
            return False
        self._silent_looks += 1
        if self._silent_looks < LOOKS - 1 or self._instead is not None or self._request.protocol.writing_paused:
            return False
        return not self._last or self._last.endswith(_EVENT_ENDS)

    async def ping(self) -> None:
        """Send a comment. Waits for nobody."""
        self._silent_looks = 0
        self._record.pings += 1
        if self.response is None:
            self._record.status = 200
            await self.start(200, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"})
        try:
            await self._writer.write(PING, drain=False)
        except ConnectionError as error:
            raise ClientGone from error

    async def refuse(self, error: GatewayError) -> None:
        """Answer with an error of the gateway's own; in band, if an answer has begun."""
        if self.response is not None:
            await self.fail(error)
            return
        self._record.status = error.status
        headers = {"content-type": "application/json"}
        if error.retry_after is not None:
            headers["retry-after"] = str(max(1, round(error.retry_after)))
            headers["retry-after-ms"] = str(round(error.retry_after * 1000))
        if error.should_retry is not None:
            headers["x-should-retry"] = "true" if error.should_retry else "false"
        if isinstance(error, MethodNotAllowed):
            headers["allow"] = error.allowed
        # A client that waited to be asked for its body may take this for the end of the request, or send it still.
        request = self._request
        closes = error.closes or ("expect" in request.headers and not request.content.is_eof())
        await self.give(error.status, self._encoded(error), headers, closes=closes)

    async def give(self, status: int, body: bytes, headers: Mapping[str, str], *, closes: bool = False) -> None:
        """Answer with a whole body; `closes`: and end the connection, whatever else came on it."""
        self._record.status, self._record.first_byte = status, self._now()
        self._record.bytes_out = len(body)
        await self.start(status, {**headers, "content-length": str(len(body))}, closes=closes)
        await self.write(body)
        await self.finish()
        self._record.last_byte = self._now()

    @property
    def is_gone(self) -> bool:
        """Whether nobody can be told anything any more."""
        transport = self._request.transport
        return transport is None or transport.is_closing()

    def abort(self) -> None:
        """Drop the connection, and what its client has not taken."""
        if (transport := self._request.transport) is not None:
            transport.abort()

    def headers(self, said: Mapping[str, str]) -> dict[str, str]:
        """Those of the answer: what is passed on, and our own."""
        return {
            self.dialect.id_header: self._record.request_id,
            **said,
            "server": SERVER,
            "x-request-id": self._record.request_id,
            "server-timing": server_timing(self._record, self._now()),
        }

    def _encoded(self, error: GatewayError, **more: object) -> bytes:
        return msgspec.json.encode(more | self.dialect.shape(error, self._record.request_id))

    def _told_of(self, answer: bytes | bytearray) -> bytes:
        """An answer that is no stream, as an event for those who were promised one: its error, if it is one."""
        with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            told = msgspec.json.decode(answer)
            if isinstance(told, dict) and told.get("error"):
                return _event(msgspec.json.format(bytes(answer), indent=-1))
        said = bytes(answer[:200]).decode(errors="replace")
        error = UpstreamGarbage(f"the upstream answered with something else than a stream: {said}")
        return _event(self._encoded(error, type="error"))


class Held:
    """The relay's sink for an answer that is to be changed as a whole: held until it is there, if `holds` says so; any
    other passes as it comes.

    Attributes:
        answer: where it goes.
    """

    def __init__(self, answer: HttpAnswer) -> None:
        self.answer = answer
        self._status, self._headers = 0, dict[str, str]()
        self._body: bytearray | None = None

    def holds(self, status: int, headers: Mapping[str, str]) -> bool:
        """Whether this answer is one of those."""
        raise NotImplementedError

    async def give(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        """Answer with what becomes of it."""
        raise NotImplementedError

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        if self.holds(status, headers):
            self._status, self._headers, self._body = status, dict(headers), bytearray()
        else:
            await self.answer.start(status, headers)

    async def write(self, chunk: bytes) -> None:
        if self._body is None:
            await self.answer.write(chunk)
        else:
            self._body += chunk

    async def finish(self) -> None:
        if self._body is None:
            await self.answer.finish()
        else:
            await self.give(self._status, self._headers, bytes(self._body))

    async def fail(self, error: GatewayError) -> None:
        await self.answer.refuse(error)


def _event(data: bytes) -> bytes:
    return b"event: error\ndata: " + data + b"\n\n"
