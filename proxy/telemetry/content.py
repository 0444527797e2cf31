"""What a call asked and what it was answered, for the spans of models whose configuration wants it (`capture_content`).

    the request's body, the answer's bytes -> Content -> masked, cut -> two attributes of the operation's span

1. Kept in memory while the call lasts, told by the span of a trace that is kept, and by nothing else: no log has it.
2. No more than so many bytes each way. A body that streamed through, or that is no text, is not told.
3. What looks like a credential is masked, and what the operator's patterns find; before it is cut, so that no half of
   a secret escapes its pattern.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

MOST: Mapping[str, int] = {"none": 0, "truncated": 4096, "full": 65_536}  # bytes of each, by the configuration's word
MASK = b"***"
_MARGIN = 512  # bytes behind the cut that the patterns see
_CREDENTIAL = rb"\b(?:sk|pk|rk|gh[pousr]|glpat|xox[abprs]|hf|AKIA|AIza)[-_A-Za-z0-9]{12,}|\bBearer\s+[^\s\"'\\]{8,}"


class Content:
    """
    Args:
        most: bytes to be told of what was asked, and as many of the answer.
        asked: the request's body.
    """

    __slots__ = ("_answered", "_asked", "_most")

    def __init__(self, most: int, asked: bytes) -> None:
        self._most = most
        self._asked = asked
        self._answered = bytearray()

    def answered(self, chunk: bytes) -> None:
        """The next bytes of the answer."""
        missing = self._most + _MARGIN - len(self._answered)
        if missing > 0:
            self._answered += chunk[:missing]

    def told(self, masks: Sequence[re.Pattern[bytes]]) -> tuple[str, str]:
        """What was asked and what was answered, as they may be told; "" for what is no text."""
        return self._told(self._asked, masks), self._told(self._answered, masks)

    def _told(self, body: bytes | bytearray, masks: Sequence[re.Pattern[bytes]]) -> str:
        said = bytes(body[: self._most + _MARGIN])
        if b"\0" in said:
            return ""
        for mask in masks:
            said = mask.sub(MASK, said)
        return said[: self._most].decode(errors="ignore")


def masks(patterns: Sequence[str]) -> tuple[re.Pattern[bytes], ...]:
    """What is masked: credentials, and what these regular expressions find.

    Raises:
        re.error: one of them is none.
    """
    return re.compile(_CREDENTIAL), *(re.compile(pattern.encode()) for pattern in patterns)
