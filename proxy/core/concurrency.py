"""How many calls at once serve a self-hosted upstream best: found by its speed.

A server of one's own has no rate limit; it has a batch that fits its GPU, and beyond it every call only waits inside it
instead of here. What shows it is the time to the first token, for its size: when it grows beyond what it is without
load, there is a queue over there and the limit shrinks in proportion; else it grows by about its square root. A 503 is
the plain word for the same.

1. Times are divided by the prompt's length: reading takes time in proportion, and long prompts are no sign of load.
2. What speed is without load is the least that was seen; when it has not been seen for `UNSEEN` calls, the limit is
   halved for `PROBE` calls to see it anew. A mean over the long term, as in the source, follows the load that the limit
   itself makes: kept full, it drifts to the ceiling (measured: 1,000 at a server whose batch is 64).
3. What is not used proves nothing: the limit grows only while at least half of it is in flight.

Source: Netflix's concurrency-limits, `Gradient2Limit`, less its long-term mean; the probe is that of BBR, "BBR:
Congestion-Based Congestion Control", ACM Queue 2016.
"""

from __future__ import annotations

from math import sqrt

LEAST = 4.0
MOST = 1000.0
START = 20.0
TOLERANCE = 1.25  # how much longer than without load is still well; a full batch is a little slower than an empty one
SMOOTHING = 0.2  # of the newest wish, in the limit
SHORT = 0.1  # of the newest time, in the mean of late
NEAR = 1.1  # times the least; so near counts as having seen it
UNSEEN = 400
PROBE = 60  # calls, the first half of them still under the old load
LEAST_SECONDS = 1e-6  # nothing answers faster; clocks may say so
DROP = 0.9  # of the limit, after a 503
TOKENS_OFFSET = 500.0  # tokens whose reading takes about as long as the fixed part of a call


class Gradient:
    """
    Args:
        most: the configured ceiling; None: 1000.
    """

    __slots__ = ("_drop_before", "_least", "_limit", "_probe_left", "_short", "_unseen", "most")

    def __init__(self, most: int | None = None) -> None:
        self._limit = START
        self._short: float | None = None
        self._least = 0.0
        self._unseen = 0
        self._probe_left = 0
        self._drop_before = 0.0
        self.configure(most)

    def configure(self, most: int | None) -> None:
        """Take another ceiling; what was learned stays below it."""
        self.most = MOST if most is None else float(most)
        self._limit = min(self._limit, self.most)

    @property
    def limit(self) -> float:
        """Calls at once, >= `LEAST` unless the ceiling is lower."""
        if self._probe_left:
            return max(min(LEAST, self.most), self._limit / 2)
        return self._limit

    def observed(self, first_token_seconds: float, input_tokens: float, in_flight: int) -> None:
        """A call's first token came.

        Args:
            first_token_seconds: from its sending, >= 0.
            in_flight: calls at the upstream when it came, this one among them.
        """
        sample = max(first_token_seconds, LEAST_SECONDS) / (input_tokens + TOKENS_OFFSET)
        if self._short is None:
            self._short = self._least = sample
        self._short += SHORT * (sample - self._short)
        if self._probe_left:
            self._probe_left -= 1
            if not self._probe_left:
                self._least = self._short
            return
        self._least = min(self._least, self._short)
        self._unseen = self._unseen + 1 if self._short > NEAR * self._least else 0
        if self._unseen >= UNSEEN:
            self._unseen, self._probe_left = 0, PROBE
            return
        if in_flight < self._limit / 2:
            return
        gradient = max(0.5, min(1.0, TOLERANCE * self._least / self._short))
        wanted = self._limit * gradient + sqrt(self._limit)
        self._move(self._limit * (1 - SMOOTHING) + wanted * SMOOTHING)

    def dropped(self, sent_at: float, now: float) -> None:
        """A call was refused because the upstream is full. Calls sent before the last cut are no news."""
        if sent_at >= self._drop_before:
            self._drop_before = now
            self._move(self._limit * DROP)

    def _move(self, limit: float) -> None:
        self._limit = min(self.most, max(min(LEAST, self.most), limit))
