"""A client's connection: what comes in is HTTP, comes at a bearable pace and has an end; else it is answered and ended.

1. What cannot be understood as a request gets an answer in JSON and a record, like every other request, and is the last
   of its connection: what follows it is not read.
2. A head that has begun is whole within `read_seconds`, and bounded; a connection on which nothing has begun is closed
   without a word after `idle_seconds`.
3. A body that is waited for brings `bytes_per_second` over every `read_seconds`, except while we do not read it.
4. What frames a chunked body is no more than its chunks need.
5. One timer at most for a connection, and none for a request that comes in one piece.
6. Clients have no more connections than leave descriptors for those to upstreams; one more is told so and closed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import msgspec
from aiohttp import web
from aiohttp.http import HttpProcessingError
from aiohttp.http_exceptions import LineTooLong
from aiohttp.log import server_logger
from aiohttp.streams import EMPTY_PAYLOAD, StreamReader
from aiohttp.web_protocol import _ErrInfo

from proxy.api import refusals
from proxy.errors import GatewayError, HeadersTooLarge, Malformed, TooManyConnections, TooSlow

log = logging.getLogger("penstock.connections")

FRAMING_BYTES = 16 << 10  # of a chunked body, besides what chunks of one byte need: extensions and trailers
FRAMING_PER_BYTE = 16
# What a reader that stopped costs: bytes the system holds back for it (up to 4 MiB else), and milliseconds for which it
# goes on trying to send what is left when the connection has been closed (for ever else). Both are Linux's.
SOCKET_OPTIONS = {
    getattr(socket, name): value
    for name, value in (("TCP_NOTSENT_LOWAT", 1 << 16), ("TCP_USER_TIMEOUT", 120_000))
    if hasattr(socket, name)
}
_TOO_MANY = msgspec.json.encode(TooManyConnections("there are too many connections; ask again soon").as_dict())
TURNED_AWAY = (  # no request has come that could be answered, or counted
    b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\nretry-after: 1\r\nx-should-retry: true\r\n"
    b"content-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (len(_TOO_MANY), _TOO_MANY)
)
TOLD_SECONDS = 60.0  # between two lines in the log that say so
ENDING = b"\0"  # a byte that no head may hold: given to the parser, it ends one


class Handler(Protocol):
    def __call__(self, request: web.BaseRequest, wrong: GatewayError | None = None) -> Awaitable[web.StreamResponse]:
        """Answer a request, or with what is wrong with it."""
        ...


@dataclass(slots=True, frozen=True)
class Patience:
    """How long a client may take.

    Attributes:
        idle_seconds: between two requests, and before the first.
        read_seconds: for a head; and the stretch over which the pace of a body is looked at.
        bytes_per_second: of a body; 0 for no bound.
    """

    idle_seconds: float = 75.0
    read_seconds: float = 10.0
    bytes_per_second: int = 1000


class _Discreet(logging.Filter):
    """For the log of aiohttp's server: a malformed request is told of without what it holds, which may be a key. That
    one came is no error of ours."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(error := record.exc_info[1], HttpProcessingError | GatewayError):
            record.levelno, record.levelname = logging.INFO, logging.getLevelName(logging.INFO)
            record.msg, record.args, record.exc_info = f"{record.msg}: {type(error).__name__}", record.args, None
        return True


server_logger.addFilter(_Discreet())


class Server(web.Server):
    """aiohttp's, with connections of ours.

    Args:
        most: connections at once.
    """

    def __init__(self, handler: Handler, patience: Patience, most: int) -> None:
        super().__init__(handler, handler_cancellation=True)  # else a handler runs on after its client has left
        self._handler, self._patience, self._most = handler, patience, most
        self._open = 0
        self._told_at = -TOLD_SECONDS

    def __call__(self) -> Connection:
        return Connection(self, self._handler, self._patience)

    def came(self, transport: asyncio.Transport) -> None:
        """A client has connected; where there are too many, it is turned away."""
        self._open += 1
        if self._open > self._most:
            transport.write(TURNED_AWAY)
            transport.close()
            self._tell()

    def left(self) -> None:
        self._open -= 1

    def _tell(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._told_at >= TOLD_SECONDS:
            self._told_at = now
            log.warning(
                "clients are turned away: they have %d connections, which is server.max_connections", self._most
            )


class Connection(web.RequestHandler):
    """
    A subclass of what the library lets one subclass; what it keeps of its own has names with two underscores.
    """

    def __init__(self, server: Server, handler: Handler, patience: Patience) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]
            keepalive_timeout=patience.idle_seconds,
            auto_decompress=False,
            max_line_size=refusals.LINE_BYTES,
            max_field_size=refusals.LINE_BYTES,
            max_headers=refusals.HEADERS,
        )
        self.__server, self.__handler, self.__patience = server, handler, patience
        self.__wrong: GatewayError | None = None
        self.__timer: asyncio.TimerHandle | None = None
        self.__in_head = False
        self.__body: StreamReader = EMPTY_PAYLOAD  # of the last request that has begun
        self.__framed = 0  # bytes of it as they came, its head among them; 0 where it is not chunked
        self.__seen = 0  # bytes of it at the last look at its pace
        self.__paused = False  # since then
        self.__head_bytes = 0  # that came since the last head began
        self.longest_head = 0  # bytes; no head was longer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        line = transport.get_extra_info("socket")
        for option, value in SOCKET_OPTIONS.items():
            line.setsockopt(socket.IPPROTO_TCP, option, value)
        self.__server.came(cast(asyncio.Transport, transport))

    def data_received(self, data: bytes) -> None:
        if self._payload_parser is not None or self._upgraded:  # frames of a WebSocket
            super().data_received(data)
            return
        if data and self.__body.is_eof():
            if not self.__in_head:
                self.__in_head, self.__head_bytes = True, 0
                self.__rest()
            self.__head_bytes += len(data)
        requests = self._request_count
        super().data_received(data)
        if self._request_count != requests:
            self.__begun(self._request_count - requests)
        elif self.__in_head:
            self.__wait_for_head()
        elif self.__framed:
            self.__framed += len(data)
            self.__look_at_framing()

    def __begun(self, requests: int) -> None:
        """Requests have begun, or what came is none: then aiohttp has put an error in the place of one."""
        self.__in_head = False
        self.__rest()
        self.longest_head = max(self.longest_head, self.__head_bytes)
        message, body = self._messages[-1]
        if not isinstance(message, _ErrInfo):
            self.__body = body
            self.__framed = self.__head_bytes if message.chunked and requests == 1 else 0
            self.__look_at_framing()
        elif not self.__body.is_eof():  # of no request, but of the body that was being read
            self._messages.pop()
            self.__break(Malformed("the body broke off: it is not chunked as it should be"))

    def __look_at_framing(self) -> None:
        bound = refusals.HEAD_BYTES + FRAMING_BYTES + FRAMING_PER_BYTE * self.__body.total_bytes
        if self.__framed > bound:
            self.__framed = 0
            self.__break(Malformed("the chunks of the body have too many extensions; send none"))

    def __break(self, error: GatewayError) -> None:
        """Whoever reads the body gets this error; what comes after it is not read."""
        self.__body.set_exception(error)
        self.__body.feed_eof()
        self.__rest()
        self.close()

    # ── pace ──

    def __wait_for_head(self) -> None:
        if self.__head_bytes > refusals.HEAD_BYTES:
            self.__end_head(HeadersTooLarge(f"a head of more than {refusals.HEAD_BYTES} bytes; send a shorter one"))
        elif self.__timer is None:
            seconds = self.__patience.read_seconds
            late = TooSlow(f"the head of the request was not whole within {seconds:g} s; send it at once")
            self.__timer = self._loop.call_later(seconds, self.__end_head, late)

    def __end_head(self, error: GatewayError) -> None:
        self.__wrong, self.__timer = error, None
        self.data_received(ENDING)

    def watch(self, body: StreamReader) -> None:
        """From now on `body` is waited for; whoever reads it gets `TooSlow` if it does not come."""
        if self.__timer is None and self.__patience.bytes_per_second and not body.is_eof():
            self.__seen, self.__paused = body.total_bytes, self._reading_paused
            self.__timer = self._loop.call_later(self.__patience.read_seconds, self.__look_at_pace, body)

    def __look_at_pace(self, body: StreamReader) -> None:
        self.__timer = None
        came, wanted = body.total_bytes - self.__seen, self.__patience.bytes_per_second * self.__patience.read_seconds
        if came >= wanted or self.__paused or body.is_eof():
            self.watch(body)
        else:
            self.__break(
                TooSlow(
                    f"the body came slower than {self.__patience.bytes_per_second} bytes a second, over "
                    f"{self.__patience.read_seconds:g} s; send it faster, or less"
                )
            )

    def __rest(self) -> None:
        if self.__timer is not None:
            self.__timer.cancel()
            self.__timer = None

    def pause_reading(self) -> None:
        self.__paused = True
        super().pause_reading()

    def connection_lost(self, exc: BaseException | None) -> None:
        self.__rest()
        self.__server.left()
        super().connection_lost(exc)

    # ── what is no request ──

    def _make_error_handler(self, err_info: Any) -> Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]:
        error = self.__wrong or _malformed(err_info.exc)

        async def handler(request: web.BaseRequest) -> web.StreamResponse:
            return await self.__handler(request, error)

        return handler


def _malformed(error: BaseException) -> GatewayError:
    if isinstance(error, LineTooLong):
        return HeadersTooLarge(f"the target or a header is longer than {refusals.LINE_BYTES} bytes; send a shorter one")
    if isinstance(error, HttpProcessingError) and error.message.startswith("Too many headers"):
        return HeadersTooLarge(f"there are more than {refusals.HEADERS} headers; send fewer")
    return Malformed("this is not HTTP that can be understood")
