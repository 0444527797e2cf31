"""The answer to one HTTP request: the relay's sink, and the gateway's own errors in the client's dialect."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import msgspec
from aiohttp import web
from aiohttp.http import HttpVersion11

from proxy.api.dialects import Dialect
from proxy.core.sse import is_stream
from proxy.errors import ClientGone, GatewayError, MethodNotAllowed
from proxy.telemetry import Record, server_timing

SERVER = "penstock"


class _Passing(web.StreamResponse):
    """Headers and the first bytes leave in one write: one system call less for every call."""

    _send_headers_immediately = False


class Failing(Protocol):
    """What can be told of an error after it has begun."""

    async def fail(self, error: GatewayError) -> None: ...


class HttpAnswer:
    """Writes an answer to the client that asked; see `proxy.relay.Sink`.

    Attributes:
        dialect: the client's.
        response: None until an answer has begun.
        line: the client's WebSocket, where the answer has become one.
    """

    __slots__ = ("_now", "_record", "_request", "dialect", "is_stream", "line", "response")

    def __init__(self, request: web.BaseRequest, dialect: Dialect, record: Record, now: Callable[[], float]) -> None:
        self._request, self.dialect, self._record, self._now = request, dialect, record, now
        self.is_stream = False
        self.response: web.StreamResponse | None = None
        self.line: Failing | None = None

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        self.is_stream = is_stream(headers)
        self.response = _Passing(status=status, headers=self.headers(headers))
        if self._request.version != HttpVersion11 and "content-length" not in headers:
            self.response.force_close()  # without chunks, only the connection's end tells the answer's
        try:
            await self.response.prepare(self._request)
        except ConnectionError as error:
            raise ClientGone from error

    async def write(self, chunk: bytes) -> None:
        assert self.response is not None
        try:
            await self.response.write(chunk)
        except ConnectionError as error:
            raise ClientGone from error

    async def finish(self) -> None:
        assert self.response is not None
        try:
            await self.response.write_eof()
        except ConnectionError as error:
            raise ClientGone from error

    async def fail(self, error: GatewayError) -> None:
        """A stream gets an error event, as the SDKs understand it; any other body ends with its connection, so that it
        comes up short of its length or its last chunk."""
        if self.line is not None:
            await self.line.fail(error)
        elif self.is_stream:
            await self.write(b"event: error\ndata: " + self._encoded(error, type="error") + b"\n\n")
            await self.finish()
        elif (transport := self._request.transport) is not None:
            transport.close()

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
        self.response = web.Response(status=status, body=body, headers=self.headers(headers))
        if closes:
            self.response.force_close()
        try:
            await self.response.prepare(self._request)
            await self.response.write_eof()
        except ConnectionError as gone:
            raise ClientGone from gone
        self._record.last_byte = self._now()

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
