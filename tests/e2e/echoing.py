"""An upstream that answers what it was asked: method, path, headers and body, so that a test sees what came through."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web
from aiohttp.client_exceptions import ClientPayloadError


@dataclass
class Came:
    """One request. `size` and `digest` are of the body, which is kept only up to 1 MiB."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes = b""
    size: int = 0
    digest: str = ""
    broke: bool = False


@dataclass
class Echo:
    """
    Attributes:
        status, headers: of every answer.
        says: what is answered in place of the echo.
        refuses: answer before the body is read.
        came: all requests, in order.
        begun: set with the first bytes of a body.
        hold: before the rest of the body is read, this is waited for.
    """

    port: int = 0
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    says: bytes | None = None
    refuses: bool = False
    came: list[Came] = field(default_factory=list)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    hold: asyncio.Event | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        came = Came(request.method, request.raw_path, request.headers)
        self.came.append(came)
        if not self.refuses:
            await self._read(request, came)
        said = self.says if self.says is not None else _told(came)
        if request.method == "HEAD" or self.status == 204:
            said = b""
        return web.Response(status=self.status, body=said, headers={"content-type": "application/json"} | self.headers)

    async def _read(self, request: web.BaseRequest, came: Came) -> None:
        digest = hashlib.sha256()
        try:
            while part := await request.content.readany():
                came.size += len(part)
                digest.update(part)
                if came.size <= 1 << 20:
                    came.body += part
                self.begun.set()
                if self.hold is not None:
                    await self.hold.wait()
        except (ClientPayloadError, ConnectionError):
            came.broke = True
        except asyncio.CancelledError:
            came.broke = True
            raise
        came.digest = digest.hexdigest()


def _told(came: Came) -> bytes:
    said: dict[str, Any] = {"method": came.method, "path": came.path, "body": came.body.decode("latin-1")}
    return msgspec.json.encode(said)


@asynccontextmanager
async def echoing(**said: Any) -> AsyncIterator[Echo]:
    """An echo on a free port, for the length of the block."""
    echo = Echo(**said)
    runner = web.ServerRunner(
        web.Server(echo.answer, handler_cancellation=True, auto_decompress=False, access_log=None),
        shutdown_timeout=0.1,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        echo.port = runner.addresses[0][1]
        yield echo
    finally:
        await runner.cleanup()
