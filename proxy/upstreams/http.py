"""The transport over aiohttp's client.

What must not be left at aiohttp's defaults: its total timeout of 300 s ends long streams; its cookie jar would send one
caller's cookies for another; a followed redirect would carry key and prompt to another host; a proxy from the
environment would see them; decompressing would change the bytes.
"""

from __future__ import annotations

import asyncio
import functools
import io
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from operator import attrgetter
from time import monotonic
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http import HttpProcessingError
from aiohttp.tracing import Trace
from yarl import URL

from proxy.config import tls
from proxy.core.outcome import Reason
from proxy.upstreams import AttemptFailed, Body, ConnectionNotes, Connections, Line, Streamed, Upgrade, Upstream
from proxy.upstreams.failures import reason_of
from proxy.upstreams.websocket import Opening
from proxy.watch import Late, Watch

if TYPE_CHECKING:
    from aiohttp.client_reqrep import ConnectionKey

_CONNECTING = attrgetter(
    "name",
    "base_url",
    "connect_seconds",
    "connections",
    "idle_connections",
    "keep_alive_seconds",
    "proxy",
    "ca_file",
    "client_cert_file",
    "client_key_file",
    "certificates",
)
IN_ONE = 1 << 20  # bytes of a body that are sent at once
HELD_BACK = 1 << 16  # bytes of an answer that nobody takes, after which its connection is read no further


class HttpTransport:
    """Connections to all upstreams, each with a pool of its own. Used inside one running loop; `close` when done.

    Args:
        notes: told what becomes of connections.
    """

    def __init__(self, notes: ConnectionNotes) -> None:
        self._notes = notes
        self._sessions: dict[tuple[object, ...], aiohttp.ClientSession] = {}

    def send(
        self, upstream: Upstream, method: str, path: str, headers: Mapping[str, str], body: Body
    ) -> Exchange | Opening:
        # By value and not by plan: a reload keeps the connections of what it does not change.
        key = _CONNECTING(upstream)
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = _session(upstream, self._notes)
        if isinstance(body, Upgrade):
            connector = session.connector
            assert connector is not None
            url = URL(upstream.base_url + body.path, encoded=True)
            return Opening(connector, upstream, url, {**headers, **upstream.headers}, body)
        url = URL(upstream.base_url + path, encoded=True)
        told = {**headers, **upstream.headers}
        if isinstance(body, Streamed) and body.length is not None:
            told["Content-Length"] = str(body.length)
        return Exchange(session, upstream, method, url, told, body, self._notes)

    def levels(self) -> list[Connections]:
        """How the connections to each upstream stand that was asked."""
        found: dict[str, Connections] = {}
        for session in self._sessions.values():
            if isinstance(connector := session.connector, _Connector):
                name, before = connector.upstream, found.get(connector.upstream)
                found[name] = connector.level if before is None else _together(before, connector.level)
        return list(found.values())

    async def close(self) -> None:
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()


class _Line(ResponseHandler):
    """A connection. Whatever ends it is told to whoever reads the answer: aiohttp's leaves a reader waiting when bytes
    are not HTTP, and takes a reset for the end of an answer that lasts until its connection closes."""

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        super().set_exception(exc, *cause)
        self._tell_reader(exc)

    def connection_lost(self, exc: BaseException | None) -> None:
        if exc is not None:
            self._tell_reader(exc)
        super().connection_lost(exc)

    def _tell_reader(self, exc: BaseException) -> None:
        answer = self._payload
        if answer is not None and not answer.is_eof() and answer.exception() is None:
            answer.set_exception(exc)


class _Connector(aiohttp.TCPConnector):
    """The connections to one upstream: tells what becomes of them, bounds how long one may take to stand (name, TCP and
    TLS together), and keeps few of those that nobody uses.

    A subclass of what the library lets one subclass, because its `TraceConfig` costs each call 22 us, and this 2.

    Attributes:
        upstream: whose they are. What else it keeps has names with two underscores: those with one are the library's.
    """

    def __init__(self, upstream: Upstream, notes: ConnectionNotes, **settings: Any) -> None:
        super().__init__(limit=upstream.connections, keepalive_timeout=upstream.keep_alive_seconds, **settings)
        self._factory = functools.partial(_Line, loop=asyncio.get_running_loop())  # type: ignore[assignment]  # it is a ResponseHandler
        self.upstream, self.__notes = upstream.name, notes
        self.__connect_seconds = upstream.connect_seconds
        self.__most_idle = upstream.idle_connections
        self.__standing: WeakSet[ResponseHandler] = WeakSet()  # the library's name for a connection
        self.__connecting = self.__active = self.__acquired = self.__opened = 0

    @property
    def level(self) -> Connections:
        idle = max(0, sum(line.connected for line in self.__standing) - self.__active)
        return Connections(self.upstream, self.__active, idle, self.limit, self.__opened, self.__acquired)

    async def connect(
        self, req: aiohttp.ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> Connection:
        if 0 < self.limit <= self.__active + self.__connecting:
            began = monotonic()
            connection = await super().connect(req, traces, timeout)
            self.__notes.waited(self.upstream, monotonic() - began)
        else:
            connection = await super().connect(req, traces, timeout)
        if (exchange := _asking.get(None)) is not None:  # else it is for a WebSocket
            exchange.has_connection()
        self.__active += 1
        self.__acquired += 1
        connection.add_callback(self.__given_back)
        return connection

    def __given_back(self) -> None:
        self.__active -= 1

    async def _get(self, key: ConnectionKey, traces: list[Trace]) -> Connection | None:
        exchange = _asking.get(None)
        if exchange is None:
            return await super()._get(key, traces)
        if exchange.is_repeated:
            return None  # a connection that is surely new
        if (idle := self._conns.get(key)) is not None:
            idle.rotate(1)  # the one last used: it is the likeliest to stand, and the others come of age
        connection = await super()._get(key, traces)
        exchange.is_reused = connection is not None
        return connection

    def _release(self, key: ConnectionKey, protocol: ResponseHandler, *, should_close: bool = False) -> None:
        super()._release(key, protocol, should_close=should_close)
        idle = self._conns.get(key)
        while idle and len(idle) > self.__most_idle:
            idle.popleft()[0].close()

    async def _create_connection(
        self, req: aiohttp.ClientRequest, traces: list[Trace], timeout: aiohttp.ClientTimeout
    ) -> ResponseHandler:
        began = monotonic()
        self.__connecting += 1
        try:
            async with asyncio.timeout(self.__connect_seconds):
                line = await super()._create_connection(req, traces, timeout)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            self.__notes.failed(self.upstream, _obstacle(error))
            raise
        finally:
            self.__connecting -= 1
        self.__notes.connected(self.upstream, monotonic() - began)
        self.__opened += 1
        self.__standing.add(line)
        return line


def _together(one: Connections, other: Connections) -> Connections:
    """Of two sessions for one upstream, before a reload and after it; the bound is the later one's."""
    return Connections(
        one.upstream,
        one.active + other.active,
        one.idle + other.idle,
        other.limit,
        one.opened + other.opened,
        one.acquired + other.acquired,
    )


def _obstacle(error: BaseException) -> str:
    """What kept a connection from standing, as metrics say it."""
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return "dns"
    if isinstance(error, aiohttp.ClientSSLError):
        return "tls"
    return "timeout" if isinstance(error, TimeoutError) else "tcp"


def _session(upstream: Upstream, notes: ConnectionNotes) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=_Connector(
            upstream,
            notes,
            ttl_dns_cache=60,
            ssl=tls.for_upstream(upstream.ca_file, upstream.client_cert_file, upstream.client_key_file) or True,
        ),
        read_bufsize=HELD_BACK,
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
    )


class Exchange:
    """One request and its answer; see `proxy.upstreams.Transport.send`.

    Attributes:
        is_reused: whether the connection it was sent on had served before.
        is_repeated: whether it is sent for the second time, because that one was closed by then.
    """

    __slots__ = (
        "_body",
        "_broken",
        "_headers",
        "_method",
        "_notes",
        "_response",
        "_session",
        "_upstream",
        "_url",
        "_watch",
        "headers",
        "is_repeated",
        "is_reused",
        "status",
    )

    def __init__(
        self,
        session: aiohttp.ClientSession,
        upstream: Upstream,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        body: bytes | Streamed,
        notes: ConnectionNotes,
    ) -> None:
        self._session, self._upstream, self._notes = session, upstream, notes
        self._method, self._url, self._headers, self._body = method, url, headers, body
        self._watch: Watch[Reason] = Watch()
        self._response: aiohttp.ClientResponse | None = None
        self._broken: Exception | None = None  # what the body's own source raised
        self.is_reused = self.is_repeated = False
        self.status = 0
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Exchange:
        await self._watch.__aenter__()
        try:
            # Connecting has a bound of its own, in the connector; until then this is one for waiting for a free
            # connection, and begins anew when there is one.
            self._watch.expect(Reason.FIRST_BYTE, self._upstream.connect_seconds + self._upstream.first_byte_seconds)
            response = await self._ask()
            self._watch.rest()
        except BaseException as error:
            await self._leave(error)
            raise
        self._response = response
        self.status = response.status
        self.headers = self._upstream.heard(response.headers, self._url)
        return self

    def has_connection(self) -> None:
        """There is a connection: from now on the answer is waited for."""
        self._watch.expect(Reason.FIRST_BYTE, self._upstream.first_byte_seconds)

    async def _ask(self) -> aiohttp.ClientResponse:
        """Send the request. On a kept connection that turns out to be closed nobody has read it: once more, on a new
        one, and no failure."""
        _asking.set(self)
        try:
            return await self._send()
        except aiohttp.ClientConnectionError as error:
            if not self.is_reused or _has_begun(error) or isinstance(self._body, Streamed):
                raise
        self._notes.stale(self._upstream.name)
        self.is_repeated = True
        return await self._send()

    async def _send(self) -> aiohttp.ClientResponse:
        return await self._session.request(
            self._method,
            self._url,
            data=self._payload(),
            headers=self._headers,
            allow_redirects=False,
            proxy=self._upstream.proxy,
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        response = self._response
        assert response is not None
        if not response.content.at_eof() or response.content.exception() is not None:
            response.close()
        await self._leave(error)

    async def _leave(self, error: BaseException | None) -> None:
        """End the watch and translate what aiohttp raised. What the body's source raised goes on as it was."""
        try:
            await self._watch.__aexit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except Late as late:
            raise AttemptFailed(late.what) from error
        if self._broken is not None and isinstance(error, Exception):
            raise self._broken
        if isinstance(error, aiohttp.ClientError | TimeoutError | OSError):
            raise AttemptFailed(reason_of(error), type(error).__name__) from error

    def _payload(self) -> bytes | io.BytesIO | AsyncIterator[bytes] | None:
        """A large body is sent in pieces: in one, it would keep the loop from all else, and aiohttp warns of it."""
        body = self._body
        if isinstance(body, Streamed):
            return self._sending(body.parts)
        return io.BytesIO(body) if len(body) > IN_ONE else body or None

    async def _sending(self, parts: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        """The body's parts. While its source is waited for, the upstream is not late."""
        try:
            while True:
                self._expect_nothing()
                part = await anext(parts, b"")
                self._expect_answer()
                if not part:
                    return
                yield part
        except Exception as error:
            self._broken = error
            raise

    def _expect_nothing(self) -> None:
        if self._response is None:
            self._watch.rest()

    def _expect_answer(self) -> None:
        if self._response is None:
            self._watch.expect(Reason.FIRST_BYTE, self._upstream.first_byte_seconds)

    async def read(self) -> bytes:
        assert self._response is not None
        self._watch.expect(Reason.IDLE, self._upstream.idle_seconds)
        try:
            return await self._response.content.readany()
        except _BROKEN as error:
            raise AttemptFailed(reason_of(error), type(error).__name__) from error
        finally:
            self._watch.rest()

    async def drain(self, seconds: float) -> None:
        assert self._response is not None
        rest = self._response.content
        if rest.at_eof():
            return
        with suppress(*_BROKEN):
            async with asyncio.timeout(seconds):
                while await rest.readany():
                    pass

    def line(self) -> Line:
        raise AssertionError("nobody asked for a WebSocket")

    async def body(self, limit: int) -> bytes:
        whole = bytearray()
        while len(whole) < limit and (chunk := await self.read()):
            whole += chunk
        return bytes(whole[:limit])


_asking: ContextVar[Exchange] = ContextVar("asking")  # whose connection is being looked for: aiohttp hands nothing on
_BROKEN = (aiohttp.ClientError, HttpProcessingError, TimeoutError, OSError)


def _has_begun(error: aiohttp.ClientConnectionError) -> bool:
    """Whether some of an answer's head had come; then aiohttp says so in the place of a message."""
    return isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str)
