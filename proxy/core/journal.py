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


def features(input_tokens: float, max_tokens: int | None) -> Features:
    """What a charge is a sum of, in thousands of tokens; the last is 1 for a call without max_tokens."""
    return input_tokens / SCALE, (max_tokens or 0) / SCALE, 1.0 if max_tokens is None else 0.0


def add(x: Features, y: Features) -> Features:
    return x[0] + y[0], x[1] + y[1], x[2] + y[2]


def less(x: Features, y: Features) -> Features:
    return x[0] - y[0], x[1] - y[1], x[2] - y[2]


@dataclass(slots=True)
class Mark:
    """Where one call stands."""

    at: float
    features: Features
    calls: int  # until then, this one among them
    sums: Features  # of the features of all those
    before: tuple[int, Features]  # sent within JITTER before it
    after: tuple[int, Features] | None = None  # sent within JITTER after it; None: not over yet


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
        self._past: deque[tuple[float, int, Features]] = deque()  # (time, what was sent before)

    def write(self, x: Features, now: float) -> Mark:
        recent, past = self._recent, self._past
        if self.began is None:
            self.began = now
        if not past or now - past[-1][0] >= STEP_SECONDS:
            past.append((now, self.calls, self.sums))
            while now - past[0][0] > REMEMBERED_SECONDS:
                past.popleft()
        while recent and now - recent[0].at > JITTER:
            gone = recent.popleft()
            gone.after = self.calls - gone.calls, less(self.sums, gone.sums)
        before = (0, NOTHING)
        if recent:
            first = recent[0]
            before = self.calls - first.calls + 1, add(less(self.sums, first.sums), first.features)
        self.calls += 1
        self.sums = add(self.sums, x)
        mark = Mark(now, x, self.calls, self.sums, before)
        recent.append(mark)
        return mark

    def after(self, mark: Mark) -> tuple[int, Features]:
        """Sent within JITTER after `mark`, as far as that is over."""
        return (self.calls - mark.calls, less(self.sums, mark.sums)) if mark.after is None else mark.after

    def before(self, at: float) -> tuple[int, Features]:
        """All that was sent before `at`, to STEP_SECONDS; the earliest that is remembered where that is later."""
        calls, sums = (0, NOTHING) if not self._past else self._past[0][1:]
        for time, calls_then, sums_then in self._past:
            if time > at:
                break
            calls, sums = calls_then, sums_then
        return calls, sums
