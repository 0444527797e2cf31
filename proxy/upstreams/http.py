"""The transport over aiohttp's client.

What must not be left at aiohttp's defaults: its total timeout of 300 s ends long streams; its cookie jar would send one
caller's cookies for another; a followed redirect would carry key and prompt to another host; a proxy from the
environment would see them; decompressing would change the bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import TracebackType

import aiohttp
from yarl import URL

from proxy.core.outcome import Reason
from proxy.upstreams import AttemptFailed, Upstream
from proxy.watch import Late, Watch

KEEP_ALIVE_SECONDS = 30.0  # an idle connection is closed by us before most servers close theirs (nginx 75, uvicorn 5)


class HttpTransport:
    """Connections to all upstreams, each with a pool of its own. Used inside one running loop; `close` when done."""

    def __init__(self) -> None:
        self._sessions: dict[tuple[str, str, float, int], aiohttp.ClientSession] = {}

    def send(self, upstream: Upstream, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Exchange:
        # By value and not by plan: a reload keeps the connections of what it does not change.
        key = (upstream.name, upstream.base_url, upstream.connect_seconds, upstream.connections)
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = _session(upstream)
        url = URL(upstream.base_url + path, encoded=True)
        return Exchange(session, upstream, method, url, {**headers, **upstream.headers}, body)

    async def close(self) -> None:
        sessions, self._sessions = self._sessions, {}
        for session in sessions.values():
            await session.close()


def _session(upstream: Upstream) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(
            limit=upstream.connections, keepalive_timeout=KEEP_ALIVE_SECONDS, ttl_dns_cache=60
        ),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=upstream.connect_seconds),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
    )


class Exchange:
    """One request and its answer; see `proxy.upstreams.Transport.send`."""

    __slots__ = (
        "_body",
        "_headers",
        "_method",
        "_response",
        "_session",
        "_upstream",
        "_url",
        "_watch",
        "headers",
        "status",
    )

    def __init__(
        self,
        session: aiohttp.ClientSession,
        upstream: Upstream,
        method: str,
        url: URL,
        headers: Mapping[str, str],
        body: bytes,
    ) -> None:
        self._session, self._upstream = session, upstream
        self._method, self._url, self._headers, self._body = method, url, headers, body
        self._watch: Watch[Reason] = Watch()
        self._response: aiohttp.ClientResponse | None = None
        self.status = 0
        self.headers: dict[str, str] = {}

    async def __aenter__(self) -> Exchange:
        await self._watch.__aenter__()
        try:
            # Connecting has its own bound within; until it stands, this wait covers both.
            self._watch.expect(Reason.FIRST_BYTE, self._upstream.connect_seconds + self._upstream.first_byte_seconds)
            response = await self._session.request(
                self._method, self._url, data=self._body or None, headers=self._headers, allow_redirects=False
            )
            self._watch.rest()
        except BaseException as error:
            await self._leave(error)
            raise
        self._response = response
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.headers.items()}
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        response = self._response
        assert response is not None
        if not response.content.at_eof():
            response.close()
        await self._leave(error)

    async def _leave(self, error: BaseException | None) -> None:
        """End the watch and translate what aiohttp raised."""
        try:
            await self._watch.__aexit__(type(error) if error else None, error, error.__traceback__ if error else None)
        except Late as late:
            raise AttemptFailed(late.what) from error
        if isinstance(error, aiohttp.ClientError | TimeoutError | OSError):
            raise AttemptFailed(_reason(error), type(error).__name__) from error

    async def read(self) -> bytes:
        assert self._response is not None
        self._watch.expect(Reason.IDLE, self._upstream.idle_seconds)
        try:
            return await self._response.content.readany()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise AttemptFailed(_reason(error), type(error).__name__) from error
        finally:
            self._watch.rest()

    async def body(self, limit: int) -> bytes:
        whole = bytearray()
        while len(whole) < limit and (chunk := await self.read()):
            whole += chunk
        return bytes(whole[:limit])


def _reason(error: BaseException) -> Reason:
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return Reason.CONNECT
    if isinstance(error, aiohttp.ClientPayloadError):
        return Reason.RESET
    if isinstance(error, aiohttp.ClientResponseError | aiohttp.InvalidURL):
        return Reason.GARBAGE
    if isinstance(error, asyncio.TimeoutError):
        return Reason.CONNECT
    return Reason.RESET
