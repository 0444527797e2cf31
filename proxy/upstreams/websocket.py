"""A WebSocket to an upstream, over aiohttp's client.

An upgrade that is refused is an answer like any other: its status, headers and body are there for whoever asks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType

import aiohttp
from aiohttp import WSMsgType
from yarl import URL

from proxy.core.outcome import Reason
from proxy.upstreams import AttemptFailed, Closing, Message, Upgrade, Upstream
from proxy.upstreams.failures import reason_of
from proxy.watch import Late, Watch

OPENING_SECONDS = 30.0  # for an upstream to answer an upgrade, once connected: nothing is computed for it
CLOSE_SECONDS = 2.0  # for the other side to close as well
MESSAGE_LIMIT = 16 << 20  # bytes of an upstream's message
REFUSAL_LIMIT = 1 << 20  # bytes of a refusal that are read


class _Refused(Exception):
    """The answer to an upgrade was another one."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status)
        self.status, self.body = status, body


class Opening:
    """One upgrade and what came of it; see `proxy.upstreams.Transport.send`. With status 101 it is a `Line`."""

    def __init__(
        self,
        connector: aiohttp.BaseConnector,
        upstream: Upstream,
        url: URL,
        headers: Mapping[str, str],
        upgrade: Upgrade,
    ) -> None:
        self._connector, self._upstream = connector, upstream
        self._url, self._headers, self._upgrade = url, headers, upgrade
        self._response: aiohttp.ClientResponse | None = None
        self._socket: aiohttp.ClientWebSocketResponse[bool] | None = None
        self._body = b""
        self.status = 101
        self.headers: Mapping[str, str] = {}

    async def __aenter__(self) -> Opening:
        try:
            async with Watch[Reason]() as watch:
                seconds = min(self._upstream.first_byte_seconds, OPENING_SECONDS)
                watch.expect(Reason.FIRST_BYTE, self._upstream.connect_seconds + seconds)
                self._socket = await self._connected()
        except _Refused as refused:
            self.status, self._body = refused.status, refused.body
            if self.status < 400:
                raise AttemptFailed(Reason.GARBAGE, f"{self.status} for an upgrade") from refused
        except Late as late:
            raise AttemptFailed(late.what) from late
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise AttemptFailed(reason_of(error), type(error).__name__) from error
        return self

    async def _connected(self) -> aiohttp.ClientWebSocketResponse[bool]:
        # A session of its own: it is the one way to see an answer before aiohttp closes what is no WebSocket.
        async with aiohttp.ClientSession(
            connector=self._connector,
            connector_owner=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._upstream.connect_seconds),
            raise_for_status=self._look,
        ) as session:
            return await session.ws_connect(
                self._url,
                headers=self._headers,
                protocols=self._upgrade.protocols,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_SECONDS),
                autoclose=False,
                heartbeat=self._upstream.idle_seconds * 2 / 3,  # and half of it for the answer to a ping
                max_msg_size=MESSAGE_LIMIT,
                decode_text=False,
                proxy=self._upstream.proxy,
            )

    async def _look(self, response: aiohttp.ClientResponse) -> None:
        self._response = response
        self.headers = self._upstream.heard(response.headers, self._url)
        if response.status != 101:
            body = bytearray()
            while len(body) < REFUSAL_LIMIT and (part := await response.content.readany()):
                body += part
            raise _Refused(response.status, bytes(body))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    # ── a refusal, as `Reply` ──

    async def read(self) -> bytes:
        body, self._body = self._body, b""
        return body

    async def drain(self, seconds: float) -> None:
        """A refusal is read whole, and a line has no end to wait for."""

    async def body(self, limit: int) -> bytes:
        return (await self.read())[:limit]

    def line(self) -> Opening:
        return self

    # ── the upstream's end of the conversation, as `Line` ──

    @property
    def protocol(self) -> str | None:
        assert self._socket is not None
        return self._socket.protocol

    async def receive(self) -> Message | Closing:
        assert self._socket is not None
        message = await self._socket.receive()
        if message.type is WSMsgType.TEXT or message.type is WSMsgType.BINARY:
            return Message(message.data, message.type is WSMsgType.TEXT)
        if message.type is WSMsgType.CLOSE:
            return Closing(message.data or 1000, message.extra or "")
        error = message.data if message.type is WSMsgType.ERROR else None
        if isinstance(error, TimeoutError):
            raise AttemptFailed(Reason.IDLE, "no answer to a ping")
        raise AttemptFailed(Reason.GARBAGE if isinstance(error, aiohttp.WebSocketError) else Reason.RESET)

    async def send(self, message: Message) -> None:
        assert self._socket is not None
        try:
            await self._socket.send_frame(message.data, WSMsgType.TEXT if message.is_text else WSMsgType.BINARY)
        except (aiohttp.ClientError, OSError) as error:
            raise AttemptFailed(Reason.RESET, type(error).__name__) from error

    async def close(self, closing: Closing) -> None:
        assert self._socket is not None
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._socket.close(code=closing.code, message=closing.reason.encode())
        except TimeoutError:
            self.abort()

    def abort(self) -> None:
        response = self._response
        if response is None:
            return
        if (connection := response.connection) is not None and connection.transport is not None:
            connection.transport.abort()
        response.close()
