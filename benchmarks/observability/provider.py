"""A provider that answers at once, and a collector that takes what it is sent: `python -m ... PORT`.

Raw protocols, so that they take as little as possible of the machine that they share with what is measured.
"""

from __future__ import annotations

import asyncio
import sys
from typing import cast

import uvloop

CHUNKS = 50  # of a stream
_ANSWER = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"m","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"' + b"a" * 400 + b'"},"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":50,"completion_tokens":100,"total_tokens":150}}'
)
_LIMITS = (
    b"x-request-id: req_1\r\nx-ratelimit-limit-requests: 10000000\r\nx-ratelimit-remaining-requests: 9999999\r\n"
    b"x-ratelimit-reset-requests: 6ms\r\n"
)
_EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{"content":" word"},"finish_reason":null}]}\n\n'
)
_USAGE = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1,"model":"m","choices":[],'
    b'"usage":{"prompt_tokens":50,"completion_tokens":50,"total_tokens":100}}\n\ndata: [DONE]\n\n'
)


def _sized(kind: bytes, body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\n%scontent-length: %d\r\n\r\n" % (kind, _LIMITS, len(body))
    return head + body


WHOLE = _sized(b"application/json", _ANSWER)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n%stransfer-encoding: chunked\r\n\r\n" % _LIMITS
TAKEN = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"


def _chunk(body: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(body), body)


class Provider(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.WriteTransport, transport)  # uvloop's is none by class
        self.heard = b""

    def data_received(self, data: bytes) -> None:
        self.heard += data
        head, blank, body = self.heard.partition(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if not blank or len(body) < int(length or 0):
            return
        self.heard = b""
        if b"/v1/traces" in head:
            self.transport.write(TAKEN)
        elif b'"stream":true' in body:
            self.transport.write(HEAD)
            self._stream(CHUNKS)
        else:
            self.transport.write(WHOLE)

    def _stream(self, left: int) -> None:
        """Each event in a turn of the loop, so that each is a packet of its own."""
        if left:
            self.transport.write(_chunk(_EVENT))
            asyncio.get_running_loop().call_later(0.0005, self._stream, left - 1)
        else:
            self.transport.write(_chunk(_USAGE) + b"0\r\n\r\n")


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Provider, "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
