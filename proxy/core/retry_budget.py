"""May we retry at all? A share of what went well lately, so that retries cannot multiply a failure.

Successes earn retries: over the last 10 seconds at most a tenth of the successes, and never fewer than 3 a second, may
be retries. A call that waits its paced turn again after a 429 is none: the limit itself paces it.

Source: the retry budgets of Finagle and linkerd; "Handling Overload", Site Reliability Engineering, ch. 21.
"""

from __future__ import annotations

from collections import deque

SECONDS = 10.0
SHARE = 0.1  # of the successes
FLOOR = 3.0  # retries per second, however little succeeds
SLICE = 0.5  # seconds; what is counted together


class RetryBudget:
    """One per upstream."""

    def __init__(self, *, share: float = SHARE, floor: float = FLOOR) -> None:
        self.share = share
        self.floor = floor
        self._slices: deque[list[float]] = deque()  # [began, successes, retries], oldest first
        self._successes = 0.0
        self._retries = 0.0

    def succeeded(self, now: float) -> None:
        self._slice(now)[1] += 1
        self._successes += 1

    def left(self, now: float) -> float:
        """Retries that may be made now; may be below 1."""
        self._slice(now)
        return self.share * self._successes + self.floor * SECONDS - self._retries

    def spend(self, now: float) -> bool:
        """Whether one more retry may be made; if so, it is counted."""
        if self.left(now) < 1.0:
            return False
        self._slices[-1][2] += 1
        self._retries += 1
        return True

    def _slice(self, now: float) -> list[float]:
        if self._slices and now < self._slices[-1][0]:  # the clock was set back: keep what was counted, from now on
            back = self._slices[-1][0] - now
            for each in self._slices:
                each[0] -= back
        if not self._slices or now - self._slices[-1][0] >= SLICE:
            self._slices.append([now, 0.0, 0.0])
        while self._slices[0][0] <= now - SECONDS:
            _, successes, retries = self._slices.popleft()
            self._successes -= successes
            self._retries -= retries
        return self._slices[-1]
