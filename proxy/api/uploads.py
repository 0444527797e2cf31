"""Bodies that stream through: what came first is kept, so that it can be looked at and sent again; the rest never is.

    client -> kept (KEPT bytes, and of a form all up to the field that decides) -> the rest, part by part -> upstream

A body that ends within what is kept is sent as often as the relay likes. Of a larger one the rest is taken from the
client when an upstream takes it: from then on it is spent.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import IO

from proxy.api.edge import Visit
from proxy.core.multipart import Field, Malformed, Scanner, boundary_of
from proxy.errors import InvalidRequest
from proxy.upstreams import Body, Streamed

KEPT = 1 << 20  # bytes; a JSON body is smaller, and so is most speech. What is kept beyond it is kept on disk
MODEL, STREAM = "model", "stream"
_NOWHERE = Field(b"", 0, 0)


class Kept:
    """The beginning of a body: in memory, and where it is longer than KEPT, in a temporary file."""

    __slots__ = ("_file", "_tail", "size")

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._tail = bytearray()  # what the file does not hold yet
        self.size = 0

    @property
    def whole(self) -> bytes | None:
        """All of it; None where a part is on disk."""
        return bytes(self._tail) if self._file is None else None

    async def fill(self, parts: AsyncIterator[bytes], is_enough: Callable[[], bool]) -> bool:
        """Keep what comes, until it is enough. Returns whether there may be more."""
        async for part in parts:
            if len(self._tail) >= KEPT:
                await asyncio.to_thread(self._spill)
            self._tail += part
            self.size += len(part)
            if is_enough():
                return True
        return False

    async def blocks(self) -> AsyncIterator[bytes]:
        """From the beginning, as often as one likes."""
        if self._file is not None:
            at = 0
            while block := await asyncio.to_thread(self._block, self._file, at):
                at += len(block)
                yield block
        if self._tail:
            yield bytes(self._tail)

    def close(self) -> None:
        """Give the file back, soon: a thread does it, and nobody waits who may be cancelled meanwhile."""
        if self._file is not None:
            asyncio.get_running_loop().run_in_executor(None, self._file.close)

    def _spill(self) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it outlives this call; `close` ends it
        self._file.write(self._tail)
        self._tail.clear()

    @staticmethod
    def _block(file: IO[bytes], at: int) -> bytes:
        file.seek(at)
        return file.read(KEPT)


class Upload:
    """A body as `proxy.relay.Call` wants it.

    Args:
        head: what was kept of it.
        rest: what follows, read when it is sent; None: that was all.
        length: of the whole body in bytes; None: nobody knows.
        model: its name as the client wrote it; "" where it names none.
        named: where in `head` that stands.
        stream: whether the answer is to be streamed, as far as that is known before the rest is read.
    """

    __slots__ = ("_head", "_length", "_named", "_rest", "is_spent", "model", "stream")

    max_tokens = 0
    wants_usage = False
    input_tokens = 0.0  # the bytes of a file are no tokens

    def __init__(
        self,
        head: Kept,
        rest: AsyncIterator[bytes] | None,
        length: int | None,
        *,
        model: str = "",
        named: Field = _NOWHERE,
        stream: bool = False,
    ) -> None:
        self._head, self._rest, self._length, self._named = head, rest, length, named
        self.model, self.stream = model, stream
        self.is_spent = False

    @property
    def is_empty(self) -> bool:
        return self._head.size == 0 and self._rest is None

    def rewritten(self, model: str, *, ask_usage: bool) -> Body:
        """The same bytes, but for the model where it has another name."""
        named = self._named
        new = named.value if model == self.model else model.encode()
        if self._rest is None and (whole := self._head.whole) is not None:
            return whole[: named.start] + new + whole[named.end :] if named.end else whole
        length = self._head.size if self._rest is None else self._length
        if length is not None and named.end:
            length += len(new) - len(named.value)
        return Streamed(self._parts(new), length)

    async def _parts(self, new: bytes) -> AsyncIterator[bytes]:
        at, start, end = 0, self._named.start, self._named.end
        async for block in self._head.blocks():
            before, after = start - at, end - at
            at += len(block)
            if after <= 0 or before >= len(block):
                yield block
            else:
                yield block[: max(0, before)] + (new if before >= 0 else b"") + block[after:]
        if self._rest is not None:
            self.is_spent = True
            async for part in self._rest:
                yield part


async def read(visit: Visit) -> Upload:
    """A request's body, whatever it is.

    Raises:
        BodyTooLarge, Malformed, TooSlow: it is larger than what may stream through, broke off, or came too slowly.
        BodiesFull: there was no room for what is kept of it.
        ClientGone: the client left.
    """
    head, parts, body = Kept(), visit.parts(), visit.request.content
    await _hold(visit)
    has_more = await head.fill(parts, lambda: head.size >= KEPT and not body.at_eof())
    return Upload(head, parts if has_more else None, visit.request.content_length)


class Form:
    """A form, read up to the field that decides where it goes.

    Args:
        head, rest, length: as of `Upload`.
        fields: those that were wanted and have passed, by name.
    """

    def __init__(
        self, head: Kept, rest: AsyncIterator[bytes] | None, length: int | None, fields: Mapping[str, Field]
    ) -> None:
        self._head, self._rest, self._length, self._fields = head, rest, length, fields

    def text(self, name: str) -> str:
        """The value of a field; "" where there is none, or none yet. Raises InvalidRequest: it is not UTF-8."""
        return text_of(self._fields, name)

    def upload(self) -> Upload:
        """As it came."""
        return Upload(self._head, self._rest, self._length)

    def calling(self, otherwise: str) -> Upload:
        """As what calls a model: the one it names, or `otherwise`. Raises InvalidRequest: there is none."""
        return Upload(
            self._head,
            self._rest,
            self._length,
            model=self.text(MODEL) or otherwise or _missing(),
            named=self._fields.get(MODEL, _NOWHERE),
            stream=self.text(STREAM).strip().lower() == "true",
        )

    async def parts(self) -> AsyncIterator[bytes]:
        """All of its bytes, once."""
        async for block in self._head.blocks():
            yield block
        if self._rest is not None:
            async for part in self._rest:
                yield part


@asynccontextmanager
async def form(visit: Visit, deciding: str, *others: str) -> AsyncIterator[Form]:
    """A form and the field that decides where it goes, which stands anywhere in it; what comes before that is kept.

    Raises:
        InvalidRequest: it is no form, or has no one reading; while it is sent, if that shows only then.
        BodyTooLarge, BodiesFull, Malformed, TooSlow, ClientGone: as `read`.
    """
    scanner = scanner_of(visit, deciding, *others)
    head, parts, body = Kept(), _checked(visit.parts(), scanner), visit.request.content
    await _hold(visit)
    try:
        more = await head.fill(parts, lambda: head.size >= KEPT and deciding in scanner.fields and not body.at_eof())
        yield Form(head, parts if more else None, visit.request.content_length, scanner.fields)
    finally:
        head.close()


async def _hold(visit: Visit) -> None:
    """Of a body that streams through no more than its beginning is in memory."""
    if not visit.request.content.is_eof():
        length = visit.request.content_length
        await visit.hold(KEPT if length is None else min(KEPT, length))


def scanner_of(visit: Visit, *wanted: str, file: str | None = None) -> Scanner:
    """What reads the form that a request brings. Raises InvalidRequest: it brings none."""
    try:
        return Scanner(boundary_of(visit.request.headers.get("content-type", "")), frozenset(wanted), file)
    except Malformed as error:
        raise _invalid(error) from None


def text_of(fields: Mapping[str, Field], name: str) -> str:
    """The value of a field; "" where there is none. Raises InvalidRequest: it is not UTF-8."""
    try:
        return fields.get(name, _NOWHERE).value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"`{name}` is not UTF-8", code="invalid_form", param=name) from None


async def _checked(parts: AsyncIterator[bytes], scanner: Scanner) -> AsyncIterator[bytes]:
    """The parts of a form, each looked at before it goes on."""
    try:
        async for part in parts:
            scanner.feed(part)
            yield part
        scanner.close()
    except Malformed as error:
        raise _invalid(error) from None


def _invalid(error: Malformed) -> InvalidRequest:
    return InvalidRequest(str(error), code="invalid_form")


def _missing() -> str:
    raise InvalidRequest("the form has no `model`; name the model to call", code="missing_model", param=MODEL)
