"""A client over raw TCP: it sees every byte of an answer, and can leave as rudely as it likes."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from tests.e2e.running import ASK, CHAT, Answer


def request(
    said: object = ASK, path: str = CHAT, *, method: str = "POST", headers: Mapping[str, str] | None = None
) -> bytes:
    """The bytes of one request."""
    body = said if isinstance(said, bytes) else json.dumps(said).encode()
    told = {"host": "penstock", "content-type": "application/json", "content-length": str(len(body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in (told | dict(headers or {})).items())
    return f"{method} {path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + body


class Wire:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.headers: dict[str, str] = {}

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def head(self) -> int:
        """Read the status and the headers of the next answer. Returns the status."""
        first, *rest = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").rstrip().split("\r\n")
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
        return int(first.split()[1])

    async def answer(self) -> Answer:
        """The next answer, read by its length."""
        status = await self.head()
        return Answer(status, self.headers, await self.reader.readexactly(int(self.headers["content-length"])))

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body, b"" for the last.

        Raises:
            asyncio.IncompleteReadError: the connection ended before it.
        """
        size = int((await self.reader.readuntil(b"\r\n")).strip(), 16)
        data = await self.reader.readexactly(size + 2)
        return data[:-2]

    async def rest(self) -> bytes:
        """What is left of a chunked body, up to its last chunk; raises as `chunk` does."""
        parts = []
        while part := await self.chunk():
            parts.append(part)
        return b"".join(parts)

    async def until_closed(self) -> bytes:
        """All that comes until the other side closes."""
        return await self.reader.read(-1)

    def leave(self) -> None:
        """Close: what is still to be sent is sent, then FIN (RST, if something was not read)."""
        self.writer.close()

    def vanish(self) -> None:
        """Reset the connection."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


@asynccontextmanager
async def wire(port: int, *, receive_buffer: int = 0) -> AsyncIterator[Wire]:
    """A connection for the length of the block.

    Args:
        receive_buffer: bytes the kernel holds for a reader that does not read; 0: as it likes.
    """
    raw = socket.socket()
    raw.setblocking(False)
    if receive_buffer:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=raw, limit=1 << 16)
    try:
        yield Wire(reader, writer)
    finally:
        writer.transport.abort()
