"""Bodies that stream through: what came first is kept, so that it can be looked at and sent again; the rest never is.

    client -> kept (up to KEPT bytes) -> the rest, part by part -> upstream

A body that ends within what is kept is sent as often as the relay likes. Of a larger one the rest is taken from the
client when an upstream takes it: from then on it is spent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

from proxy.api.edge import Visit
from proxy.upstreams import Body, Streamed

KEPT = 1 << 20  # bytes; a JSON body is smaller, and so is most speech


class Upload:
    """A body as `proxy.relay.Call` wants it, of which nothing is known but its bytes.

    Args:
        head: what was kept of it.
        rest: what follows, read when it is sent; None: that was all.
        length: of the whole body in bytes; None: nobody knows.
    """

    __slots__ = ("_head", "_length", "_rest", "is_spent")

    model = ""
    stream = False
    max_tokens = 0
    wants_usage = False
    input_tokens = 0.0  # the bytes of a file are no tokens

    def __init__(self, head: bytes, rest: AsyncIterator[bytes] | None = None, length: int | None = None) -> None:
        self._head, self._rest, self._length = head, rest, length
        self.is_spent = False

    def rewritten(self, model: str, *, ask_usage: bool) -> Body:
        """The same bytes, whatever the model is called."""
        return self._head if self._rest is None else Streamed(self._parts(self._rest), self._length)

    async def _parts(self, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield self._head
        self.is_spent = True
        async for part in rest:
            yield part


async def read(visit: Visit) -> Upload:
    """A request's body, whatever it is.

    Raises:
        BodyTooLarge: it says that it is larger than what may stream through.
        ClientGone: it broke off.
    """
    parts = visit.parts()
    head = bytearray()
    async for part in parts:
        head += part
        if len(head) >= KEPT:
            return Upload(bytes(head), parts, visit.request.content_length)
    return Upload(bytes(head))
