"""Reads what passes by in a realtime session, from the upstream: usage, the first token, whose session it is.

Nothing is parsed that cannot matter: the message that opens the session, those with content up to the first token, and
the one that ends each response.

Source: OpenAI's API reference, "Realtime", server events.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from proxy.core import usage
from proxy.core.usage import Usage

MESSAGE_LIMIT = 1 << 20  # bytes; a longer one is not looked at
_DECODE = msgspec.json.Decoder(dict[str, Any])


class Reader:
    """
    Attributes:
        first_token: whether a model has said anything: text, audio, a transcript or the arguments of a function.
        usage: of all responses so far, together; None where none has told any.
        finish_reason: how the last response ended.
        session_id, model: of the session.
    """

    __slots__ = ("finish_reason", "first_token", "model", "session_id", "usage")

    def __init__(self) -> None:
        self.first_token = False
        self.usage: Usage | None = None
        self.finish_reason = self.session_id = self.model = ""

    def hear(self, message: bytes) -> None:
        """Take one whole message. Never raises: what is no event tells nothing."""
        if b'"response.done"' in message:
            self._note_end(_read(message))
        elif not self.first_token and b'.delta"' in message:
            kind = _text(_read(message).get("type"))
            self.first_token = kind.startswith("response.") and kind.endswith(".delta")
        elif not self.session_id and b'"session.created"' in message:
            session = _part(_read(message), "session")
            self.session_id, self.model = _text(session.get("id")), _text(session.get("model"))

    def _note_end(self, event: Mapping[str, object]) -> None:
        if event.get("type") != "response.done":
            return
        response = _part(event, "response")
        self.finish_reason = _text(response.get("status")) or self.finish_reason
        if (told := usage.of(response.get("usage"))) is not None:
            self.usage = told if self.usage is None else self.usage + told


def _read(message: bytes) -> Mapping[str, object]:
    if len(message) > MESSAGE_LIMIT:
        return {}
    try:
        return _DECODE.decode(message)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return {}


def _part(said: Mapping[str, object], name: str) -> Mapping[str, object]:
    part = said.get(name)
    return part if isinstance(part, Mapping) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
