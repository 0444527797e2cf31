"""An answer that is gathered, where nobody reads it while it comes: the relay's sink for batches and pipelines."""

from __future__ import annotations

from collections.abc import Mapping

from proxy.errors import ClientGone, GatewayError

ANSWER_BYTES_MAX = 64 << 20  # a larger one would be a hundred times the longest seen


class Collected:
    """The whole answer to one call; see `proxy.relay.Sink`. One that is too long is given up as a client that leaves
    would.

    Attributes:
        status: 0 until it has begun.
        broke: what broke it off, so that `body` is not whole; None otherwise.
    """

    __slots__ = ("_chunks", "_size", "broke", "status")

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self._size = 0
        self.status = 0
        self.broke: GatewayError | None = None

    @property
    def body(self) -> bytes:
        return b"".join(self._chunks)

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        self.status = status

    async def write(self, chunk: bytes) -> None:
        self._size += len(chunk)
        if self._size > ANSWER_BYTES_MAX:
            raise ClientGone
        self._chunks.append(chunk)

    async def finish(self) -> None:
        """The answer is whole."""

    async def fail(self, error: GatewayError) -> None:
        self.broke = error
