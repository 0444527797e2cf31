"""An upstream over raw TCP that plays a script: bytes as they stand, cut, reset, held back or silent where a test says.

One play per request, in the order in which they arrive: bytes are written as they are, an event is waited for, an `Act`
is what its name says. After its last step the connection waits for the next request.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import struct
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, cast

from tests.e2e.running import until


class Act(Enum):
    FIN = "close, once all that was written has left"
    RST = "reset the connection; what the peer has not read is lost"
    SILENCE = "nothing more, until the peer leaves"


Step = bytes | asyncio.Event | Act
Play = Iterable[Step]

# ── what is written ──

EVENT_STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(said: object) -> bytes:
    return b"data: %b\n\n" % json.dumps(said, ensure_ascii=False, separators=(",", ":")).encode()


def words(text: str, finish: str | None = None) -> bytes:
    """One event of a chat stream."""
    delta = {"content": text} if text else {}
    return event({"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


USAGE = event({"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
TELLING = (words("one "), words("two"), words("", "stop"), DONE)  # a whole stream, whose usage nobody asked for


def stream(*events: bytes) -> list[Step]:
    """A whole streamed answer, each argument a chunk of its own."""
    return [EVENT_STREAM, *map(chunk, events), LAST]


def answer(said: object, status: int = 200, headers: Mapping[str, str] | None = None) -> list[Step]:
    """A whole answer that is not streamed."""
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    told = {"content-type": "application/json", "content-length": str(len(body))} | dict(headers or {})
    lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return [f"HTTP/1.1 {status} Whatever\r\n{lines}\r\n".encode() + body]


def refusal(status: int, code: str | None = None, kind: str = "", message: str = "no", **headers: str) -> list[Step]:
    """An error in OpenAI's shape; a keyword is a header, with `_` for `-`."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return answer({"error": error}, status, {name.replace("_", "-"): value for name, value in headers.items()})


ECHO = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}

# ── who writes it ──


@dataclass(eq=False)
class Exchange:
    """One request and what became of it. `gone` is set when its connection is lost; `gone_at` is when, by the loop."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    at: float
    gone: asyncio.Event = field(default_factory=asyncio.Event)
    gone_at: float = 0.0
    sent: int = 0  # bytes that the socket has taken

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Scripted:
    """
    Attributes:
        script: the plays to come; when it is empty, `otherwise` is played, or what `improvises` makes up.
        serving: the connection whose request came last, when a play is made up for it.
        exchanges: every request so far.
        in_flight, peak: requests whose play has not ended, now and at most.
    """

    def __init__(self) -> None:
        self.script: deque[Play] = deque()
        self.otherwise: Play = answer(ECHO)
        self.improvises: Callable[[], Play] = lambda: self.otherwise
        self.serving: _Line
        self.exchanges: list[Exchange] = []
        self.connections = 0
        self.in_flight = self.peak = 0
        self.port, self.scheme = 0, "http"
        self._lines: set[_Line] = set()

    @property
    def base_url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/v1"

    def plays(self, *plays: Play) -> None:
        self.script.extend(plays)

    async def exchange(self, index: int = 0) -> Exchange:
        """The request of that number, once it has arrived."""
        await until(lambda: len(self.exchanges) > index, f"request {index}")
        return self.exchanges[index]

    async def play(self, line: _Line, exchange: Exchange) -> None:
        """Answer one request."""
        self.exchanges.append(exchange)
        self.serving = line
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            for step in self.script.popleft() if self.script else self.improvises():
                if isinstance(step, bytes):
                    line.writer.write(step)
                    await line.writer.drain()
                    exchange.sent += len(step)
                elif isinstance(step, asyncio.Event):
                    await step.wait()
                elif step is Act.SILENCE:
                    await exchange.gone.wait()
                else:
                    line.end(step)
                    return
        finally:
            self.in_flight -= 1

    def cut_all(self) -> None:
        """Close every connection, busy or idle."""
        for line in list(self._lines):
            line.writer.close()


class _Line(asyncio.StreamReaderProtocol):
    """One connection. A client that closes its end has left: half-open connections have no friends here."""

    def __init__(self, upstream: Scripted) -> None:
        self.reader = asyncio.StreamReader()
        super().__init__(self.reader)
        self.upstream = upstream
        self.exchange: Exchange | None = None
        self.writer: asyncio.StreamWriter
        self.work: asyncio.Task[None]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        loop = asyncio.get_running_loop()
        self.writer = asyncio.StreamWriter(cast(asyncio.Transport, transport), self, self.reader, loop)
        self.upstream.connections += 1
        self.upstream._lines.add(self)
        self.work = loop.create_task(self._live(), name="scripted upstream")

    def eof_received(self) -> bool:
        super().eof_received()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.upstream.connections -= 1
        self.upstream._lines.discard(self)
        if (exchange := self.exchange) is not None:
            exchange.gone_at = asyncio.get_running_loop().time()
            exchange.gone.set()
        self.work.cancel()

    async def _live(self) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *rest = head.removesuffix("\r\n\r\n").split("\r\n")
                method, path, _ = first.split(" ")
                headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
                body = await self.reader.readexactly(int(headers.get("content-length", 0)))
                self.exchange = Exchange(method, path, headers, body, asyncio.get_running_loop().time())
                await self.upstream.play(self, self.exchange)

    def end(self, act: Act) -> None:
        transport = self.writer.transport
        if act is Act.RST:
            raw = transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() then sends RST
            transport.abort()
        else:
            transport.close()


@asynccontextmanager
async def scripted(*plays: Play, tls: ssl.SSLContext | None = None) -> AsyncIterator[Scripted]:
    """An upstream on a free port, for the length of the block; with `tls`, its `base_url` begins with https."""
    upstream = Scripted()
    upstream.plays(*plays)
    server = await asyncio.get_running_loop().create_server(
        lambda: _Line(upstream), "127.0.0.1", 0, backlog=4096, ssl=tls
    )
    upstream.scheme = "https" if tls else "http"
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        server.close()
        works = [line.work for line in upstream._lines]
        upstream.cut_all()
        await asyncio.gather(*works, return_exceptions=True)
        await server.wait_closed()
