"""A local mirror of one limit of a provider, kept true by the headers of its answers.

An answer tells the level after its own call was charged, but it comes late: since then we have sent others. So each
call remembers the level the mirror believed in after charging it; the answer's error against *that* is what the mirror
is corrected by, together with what it was corrected by in between.

Rules
-----
1. The mirror believes in no level higher than one it has seen; a provider whose bucket is smaller than the limit it
   tells is found out before it is overrun.
2. Where it was too hopeful it believes the provider at once; where it was too careful, by degrees: answers overtake
   each other on the way, and one call too few costs less than one refusal.
3. It leaves a margin, which grows with each refusal it did not foresee and shrinks as calls go well.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxy.core.bucket import Bucket
from proxy.core.headers import Reading

WINDOW = 60.0  # seconds; the window nearly every provider means, until the law of the header tells
TRUST = 0.25  # share of a hopeful correction that is believed at once
MARGIN = 0.003  # of the limit, at the start
MARGIN_MAX = 0.05  # of the limit


@dataclass(slots=True)
class Mark:
    """What the mirror believed right after it charged one call."""

    cost: float
    level: float
    corrected: float  # the sum of all corrections until then


class Mirror:
    """
    Args:
        reading: the first that told this limit; its `limit` is not None.
        mark: of the call that it answers, or None where the limit was not known when that call was sent.
        spent: units charged to calls sent after that one, which the reading cannot know of.
        now: seconds, monotonic.
    """

    __slots__ = ("_corrected", "_odd_window", "bucket", "limit", "margin", "window")

    def __init__(self, reading: Reading, spent: float, now: float) -> None:
        assert reading.limit is not None
        self.limit = reading.limit
        self.window = reading.window_seconds or WINDOW
        level = self.limit if reading.remaining is None else reading.remaining
        self.bucket = Bucket(self.limit / self.window, level, now)
        self.bucket.set_level(level - spent, now)
        self.margin = MARGIN
        self._corrected = 0.0
        self._odd_window: float | None = None

    def wait(self, cost: float, now: float) -> float:
        """Seconds until a call of `cost` fits, and the margin beside it."""
        return self.bucket.wait(cost + self.margin * self.bucket.burst, now)

    def take(self, cost: float, now: float) -> Mark:
        self.bucket.take(cost, now)
        self.margin = max(MARGIN, self.margin * 0.9995)
        return Mark(cost, self.bucket.level(now), self._corrected)

    def read(self, reading: Reading, mark: Mark | None, now: float) -> bool:
        """Correct by an answer; True where the limit itself changed."""
        limit = self.limit if reading.limit is None else reading.limit
        window = self._believe_window(reading.window_seconds)
        changed = limit != self.limit or window != self.window
        if changed:
            self.limit, self.window = limit, window
            self.bucket.change(limit / window, min(self.bucket.burst, limit), now)
        if reading.remaining is None or mark is None:
            return changed
        seen = min(limit, reading.remaining + mark.cost)
        if seen > self.bucket.burst:
            self.bucket.change(self.bucket.rate, seen, now)
        error = reading.remaining - (mark.level + self._corrected - mark.corrected)
        correction = error if error < 0.0 else error * TRUST
        self._corrected += correction
        self.bucket.set_level(self.bucket.level(now) + correction, now)
        return changed

    def refused(self, cost: float, hold: float, now: float) -> None:
        """A call of `cost` was refused and fits after `hold` seconds."""
        level = min(cost - hold * self.bucket.rate, self.bucket.level(now))
        self._corrected += level - self.bucket.level(now)
        self.bucket.set_level(level, now)
        self.margin = min(MARGIN_MAX, self.margin * 1.5)

    def _believe_window(self, told: float | None) -> float:
        """Another window than the one believed in counts only when told twice: rounding can fake one."""
        if told is None or abs(told - self.window) <= 0.05 * self.window:
            self._odd_window = None
        elif self._odd_window is not None and abs(told - self._odd_window) <= 0.05 * told:
            self._odd_window = None
            return told
        else:
            self._odd_window = told
        return self.window
