"""Reads what passes by in a stream of server-sent events, and lets whole events pass.

The gateway forwards the upstream's bytes untouched. Every chunk goes through `Reader.feed`, which gives back the bytes
that may go on: all up to the end of the last whole event. So whatever happens next (a broken upstream, an error to be
told, a comment to be put in) happens between events, and what a client has seen so far is always whole. Networks and
servers cut streams at the ends of events, so in practice the bytes that go in come out at once, the same object.

Rules
-----
1. The bytes given back, and `rest()` at the end, are the bytes fed, in order; less the usage event, where the gateway
   asked for it and the client had not (`hide_usage`).
2. Only CR, LF and CRLF end a line. `str.splitlines` also cuts at U+2028, which is legal inside JSON.
3. Nothing is parsed that cannot matter: events up to the first token, events that carry an error, the last few.
4. The stream is over with its [DONE]: what follows is not given back.
5. An event longer than EVENT_LIMIT is neither held back nor looked at, but for its name: forwarding never stops. Those
   after it are looked at again.

Source: the HTML standard, section "Server-sent events", "Parsing an event stream".
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping

import msgspec

from proxy.core import usage
from proxy.core.usage import Usage

EVENT_LIMIT = 1 << 20  # bytes; the longest real event seen was 64 KiB
LOOK_BACK = 6  # blocks; usage, finish reason and end mark stand in the last three of every dialect
_DECODE = msgspec.json.Decoder()
_BOM = b"\xef\xbb\xbf"
_ENDS = (
    "message_stop",
    *("response.completed", "response.failed", "response.incomplete"),
    *("image_generation.completed", "image_edit.completed", "transcript.text.done", "speech.audio.done"),
)
_DONE_EVENT = re.compile(rb"(?:\A(?:\xef\xbb\xbf)?|[\r\n])data:[ \t]*\[DONE\][ \t]*(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_NAMED_ENDS = tuple(b"event: " + kind.encode() for kind in _ENDS)  # response.completed repeats the whole answer


def is_stream(headers: Mapping[str, str]) -> bool:
    """Whether an answer is a stream of events that can be read; a compressed one passes like any other body.

    Args:
        headers: of the answer, names in lower case.
    """
    encoding = headers.get("content-encoding", "identity")
    return headers.get("content-type", "").startswith("text/event-stream") and encoding == "identity"


class Reader:
    """The state of one stream, as far as its bytes have been fed.

    Args:
        hide_usage: take the event that holds nothing but usage out of the stream.

    Attributes:
        first_token: whether content has passed: text, reasoning, a refusal or the arguments of a tool.
        is_over: whether [DONE] has passed; known at once, for there is nothing to be read after it.
        done: whether the dialect's end mark has passed; known after `close`.
        error: the message of an error event, "" if none has passed.
        usage, finish_reason, response_id, response_model: as the stream told them; complete after `close`.
        usage_unread: whether a usage was told in which there is no count.
    """

    __slots__ = (
        "_blind",
        "_held",
        "_hide_usage",
        "_is_closed",
        "_last",
        "_long_end",
        "done",
        "error",
        "finish_reason",
        "first_token",
        "is_over",
        "response_id",
        "response_model",
        "usage",
        "usage_unread",
    )

    def __init__(self, *, hide_usage: bool = False) -> None:
        self._hide_usage = hide_usage
        self._held = b""
        self._is_closed = False
        self._blind = b""  # the last bytes of an event that is too long, while it lasts
        self._long_end = False  # whether that event is the last of its stream
        self._last: deque[bytes] = deque(maxlen=LOOK_BACK)
        self.first_token = False
        self.is_over = False
        self.done = False
        self.error = ""
        self.usage: Usage | None = None
        self.usage_unread = False
        self.finish_reason = ""
        self.response_id = ""
        self.response_model = ""

    def feed(self, chunk: bytes) -> bytes:
        """Take the next bytes, cut anywhere; return those that may go on now. Never raises."""
        if self.is_over:
            return b""
        if not self._held and chunk.endswith(b"\n\n"):
            self._see_again()
            return self._passed(chunk)
        if self._blind:
            end = _end_of_events(self._blind + chunk) - len(self._blind)
            if end <= 0:
                self._blind = (self._blind + chunk)[-3:]
                return chunk
            self._see_again()
            self._held = chunk[end:]
            return self._passed(chunk[:end])
        data = self._held + chunk
        end = _end_of_events(data)
        passed = self._passed(data[:end]) if end else b""
        self._held = data[end:]
        if len(self._held) <= EVENT_LIMIT:
            return passed
        self._blind, self._long_end = self._held[-3:], self._held.startswith(_NAMED_ENDS)
        return passed + self.rest()

    def _see_again(self) -> None:
        if self._blind:
            self._blind, self.done = b"", self.done or self._long_end

    def rest(self) -> bytes:
        """What is still held back: an event that was never finished."""
        held, self._held = self._held, b""
        return b"" if self.is_over else held

    def close(self) -> bool:
        """The stream has ended. Returns whether it was whole: an end mark or a finish reason has passed.

        Some servers (transformers') send no end mark, only a finish reason; some leave out the blank line after the
        last event. But behind a finish reason half an event is one that was cut.
        """
        if not self._is_closed:
            self._is_closed = True
            if self._held:
                self._last.append(self._held)
            for block in self._last:
                for event in events(block):
                    self._note_end(event)
        return self.done or (bool(self.finish_reason) and not self._is_cut())

    @property
    def is_finished(self) -> bool:
        """Whether the end mark has passed in an event with its blank line, for a client sees no other; known after
        `close`."""
        return self.is_over or (self.done and not self._held.strip())

    def _is_cut(self) -> bool:
        """Whether the last event is not whole."""
        if self._blind:
            return True
        held = self._held.strip()
        return held != b"" and not held.startswith(b":") and not any(True for _ in events(held))

    def output_events(self, size: int) -> int:
        """About how many events so many bytes of the stream were, by the size of its last ones."""
        last = b"".join(self._last)
        return size * last.count(b"data:") // len(last) if last else 0

    def _passed(self, block: bytes) -> bytes:
        if not self.first_token:
            self._look_for_token(block)
        if b"[DONE]" in block and (end := _DONE_EVENT.search(block)) is not None:
            self.is_over, block = True, block[: end.end()]
        if b'"error"' in block:
            self._look_for_error(block)
        if self._hide_usage and b'"usage"' in block and (b'"choices":[]' in block or b'"choices": []' in block):
            self._last.append(block)
            return b"".join(event for event in _split(block) if not _only_usage(event))
        self._last.append(block)
        return block

    def _look_for_token(self, block: bytes) -> None:
        for event in events(block):
            self._note_start(event)
            if _has_content(event):
                self.first_token = True
                return

    def _look_for_error(self, block: bytes) -> None:
        for event in events(block):
            said = event.get("error") or _inner(event).get("error")
            if event.get("type") == "error" and not isinstance(said, Mapping):
                said = event
            if said:
                self.error = _text(said.get("message") if isinstance(said, Mapping) else said)[:200] or "error"

    def _note_start(self, event: Mapping[str, object]) -> None:
        """Ids, and Anthropic's count of the input, which comes first."""
        body = _inner(event)
        self.response_id = self.response_id or _text(body.get("id"))
        self.response_model = self.response_model or _text(body.get("model"))
        self._note_usage(body)

    def _note_end(self, event: Mapping[str, object]) -> None:
        if event is _DONE:
            self.done = True
            return
        kind = event.get("type")
        if kind in _ENDS:
            self.done = True
        body = _inner(event)
        self._note_usage(event)
        self._note_usage(body)
        for choice in _list(event.get("choices")):
            self.finish_reason = _text(choice.get("finish_reason")) or self.finish_reason
        delta = event.get("delta")
        if kind == "message_delta" and isinstance(delta, Mapping):
            self.finish_reason = _text(delta.get("stop_reason")) or self.finish_reason
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            self.finish_reason = _text(body.get("status")) or self.finish_reason

    def _note_usage(self, body: Mapping[str, object]) -> None:
        if (said := body.get("usage")) is None:
            return
        if (told := usage.of(said)) is None:
            self.usage_unread = True
        else:
            self.usage = usage.later(self.usage, told)


_DONE: Mapping[str, object] = {}


def _end_of_events(data: bytes) -> int:
    """Where the last whole event ends: behind the last blank line, 0 if there is none."""
    ends = (data.rfind(b"\n\n") + 2, data.rfind(b"\n\r\n") + 3, data.rfind(b"\r\r") + 2)
    lengths = (2, 3, 2)
    return max((end for end, length in zip(ends, lengths, strict=True) if end >= length), default=0)


def _split(block: bytes) -> Iterator[bytes]:
    """The events of a block, each with its blank line."""
    event = bytearray()
    for line in block.splitlines(keepends=True):
        event += line
        if not line.strip(b"\r\n"):
            yield bytes(event)
            event.clear()
    if event:
        yield bytes(event)


def events(block: bytes) -> Iterator[Mapping[str, object]]:
    """The JSON objects of a block's data lines, and `_DONE` for the end mark. Skips what is not JSON."""
    for line in block.removeprefix(_BOM).splitlines():  # bytes.splitlines cuts at CR, LF and CRLF only
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            yield _DONE
            continue
        try:
            event = _DECODE.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            continue
        if isinstance(event, dict):
            yield event


def _only_usage(event: bytes) -> bool:
    return any(said.get("choices") == [] and isinstance(said.get("usage"), Mapping) for said in events(event))


def _has_content(event: Mapping[str, object]) -> bool:
    kind = _text(event.get("type"))
    if kind:  # all but chat and completions say by type what they carry
        return kind.endswith((".delta", ".partial_image")) or kind == "content_block_delta"
    for choice in _list(event.get("choices")):
        if choice.get("text"):
            return True
        delta = choice.get("delta")
        if isinstance(delta, Mapping) and any(delta.get(name) for name in _CONTENT):
            return True
    return False


_CONTENT = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls", "function_call", "audio")


def _inner(event: Mapping[str, object]) -> Mapping[str, object]:
    """The object an event tells about: chat chunks are it, other dialects wrap it."""
    for name in ("response", "message"):
        inner = event.get(name)
        if isinstance(inner, Mapping):
            return inner
    return event


def _list(value: object) -> list[Mapping[str, object]]:
    return [item for item in value if isinstance(item, Mapping)] if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
