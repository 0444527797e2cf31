"""What the body of an answer that was not streamed tells: read once it has passed, never before it is passed on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from proxy.core import usage
from proxy.core.usage import Usage

BODY_LIMIT = 8 << 20  # bytes; a larger answer (thousands of embeddings) is passed on but not read


class Answer(msgspec.Struct, frozen=True):
    """Of an answer to chat, completions, embeddings or responses; "" and None where it does not say."""

    id: str = ""
    model: str = ""
    finish_reason: str = ""
    usage: Usage | None = None
    usage_unread: bool = False  # there was a `usage`, and no count in it


class _Choice(msgspec.Struct):
    finish_reason: Any = None


class _Body(msgspec.Struct):
    id: Any = None
    model: Any = None
    status: Any = None
    stop_reason: Any = None
    usage: Any = None
    choices: list[_Choice] | None = None


_READ = msgspec.json.Decoder(_Body)
_SYNTAX = msgspec.json.Decoder(msgspec.Raw)
_NOTHING = Answer()


def read(body: bytes) -> Answer:
    """Never raises: what is no JSON object tells nothing."""
    try:
        said = _READ.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return _NOTHING
    told = usage.of(said.usage)
    reasons = [choice.finish_reason for choice in said.choices or ()] or [said.stop_reason or said.status]
    return Answer(
        id=_text(said.id),
        model=_text(said.model),
        finish_reason=_text(reasons[0]),
        usage=told,
        usage_unread=told is None and said.usage is not None,
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


class BodyReader:
    """Reads an answer that is not a stream of events as it passes; the same shape as `sse.Reader`.

    Args:
        headers: of the answer, names in lower case.

    Attributes:
        usage, finish_reason, response_id, response_model: as the body told them; known after `close`.
        usage_unread: whether it may have told its usage, in a way that could not be read.
    """

    __slots__ = (
        "_chunks",
        "_limit",
        "_proves_itself",
        "_size",
        "finish_reason",
        "response_id",
        "response_model",
        "usage",
        "usage_unread",
    )

    error = ""
    first_token = is_over = is_finished = False

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._chunks: list[bytes] = []
        self._size = 0
        content_type = headers.get("content-type", "")
        is_json = content_type.startswith("application/json")
        self._limit = BODY_LIMIT if is_json or not content_type else 0  # of speech nothing is kept
        is_framed = "content-length" in headers or "transfer-encoding" in headers
        self._proves_itself = is_json and not is_framed and "content-encoding" not in headers
        self.usage: Usage | None = None
        self.usage_unread = False
        self.finish_reason = self.response_id = self.response_model = ""

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes; all of them may go on."""
        self._size += len(chunk)
        if self._size <= self._limit:
            self._chunks.append(chunk)
        elif self._limit:
            self._chunks.clear()
            self.usage_unread = True
        return chunk

    def rest(self) -> bytes:
        return b""

    def close(self) -> bool:
        """The body is over. Returns whether it is whole where HTTP does not say so itself: of one that lasted until its
        connection closed, JSON that breaks off tells."""
        if not self._chunks:
            return self._size > 0 or not self._proves_itself
        body = b"".join(self._chunks)
        self._chunks.clear()
        said = read(body)
        self.usage, self.finish_reason = said.usage, said.finish_reason
        self.response_id, self.response_model = said.id, said.model
        self.usage_unread = said.usage_unread or (said is _NOTHING and self._size > 0)
        return not self._proves_itself or said is not _NOTHING or _is_json(body)

    def output_events(self, size: int) -> int:
        """None: half an answer does not say how much of it was written."""
        return 0


def _is_json(body: bytes) -> bool:
    try:
        _SYNTAX.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True
