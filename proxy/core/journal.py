"""The calls one account was sent, in order, counted in what a charge may depend on.

Every teacher of limits (`core.mirror`, `core.two_point`, `core.window`) reckons with differences of these sums, so a
call is written once, and remembers only where it stands.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

JITTER = 0.1  # seconds by which calls overtake each other on the way
REMEMBERED_SECONDS = 61.0  # how far back `since` can look: the longest window that is ever guessed from one refusal
STEP_SECONDS = 0.1
SCALE = 1000.0  # tokens; features are in thousands, so that the numbers of a regression stay near 1

Features = tuple[float, float, float]
NOTHING: Features = (0.0, 0.0, 0.0)
Count = tuple[int, Features]  # so many calls, and the sum of their features


def features(input_tokens: float, max_tokens: int | None) -> Features:
    """What a charge is a sum of, in thousands of tokens; the last is 1 for a call without max_tokens."""
    return input_tokens / SCALE, (max_tokens or 0) / SCALE, 1.0 if max_tokens is None else 0.0


def less(x: Features, y: Features) -> Features:
    return x[0] - y[0], x[1] - y[1], x[2] - y[2]


@dataclass(slots=True)
class Mark:
    """Where one call stands."""

    at: float
    features: Features
    calls: int  # until then, this one among them
    sums: Features  # of the features of all those
    before: Count  # all that were sent before it
    since: Count  # all that were sent more than JITTER before it
    until: Count | None = None  # all that were sent by JITTER after it; None: that is not over yet


class Journal:
    """
    Attributes:
        calls, sums: of all calls so far.
        began: when the first was sent; None before.
    """

    __slots__ = ("_past", "_recent", "began", "calls", "sums")

    def __init__(self) -> None:
        self.calls = 0
        self.sums: Features = NOTHING
        self.began: float | None = None
        self._recent: deque[Mark] = deque()  # sent within JITTER
        self._past: deque[tuple[float, Count]] = deque()  # (time, what was sent before)

    def write(self, x: Features, now: float) -> Mark:
        recent, past = self._recent, self._past
        before = self.calls, self.sums
        if not past or now - past[-1][0] >= STEP_SECONDS:
            if self.began is None:
                self.began = now
            past.append((now, before))
            while now - past[0][0] > REMEMBERED_SECONDS:
                past.popleft()
        while recent and now - recent[0].at > JITTER:
            recent.popleft().until = before
        sums = self.sums
        self.calls += 1
        self.sums = sums = sums[0] + x[0], sums[1] + x[1], sums[2] + x[2]
        mark = Mark(now, x, self.calls, sums, before, recent[0].before if recent else before)
        recent.append(mark)
        return mark

    def calls_around(self, mark: Mark) -> int:
        """How many `around` tells of."""
        until = self.calls if mark.until is None else mark.until[0]
        return until - mark.since[0] - 1

    def around(self, mark: Mark) -> Count:
        """Sent within JITTER before and after `mark`, as far as that is over, without itself."""
        calls, sums = mark.until or (self.calls, self.sums)
        calls_before, sums_before = mark.since
        return calls - calls_before - 1, less(less(sums, sums_before), mark.features)

    def before(self, at: float) -> Count:
        """All that was sent before `at`, to STEP_SECONDS; the earliest that is remembered where that is later."""
        count = self._past[0][1] if self._past else (0, NOTHING)
        for time, then in self._past:
            if time > at:
                break
            count = then
        return count
