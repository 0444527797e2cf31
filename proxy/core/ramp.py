"""After `slow_down`: the rate rose too fast for the provider, whatever its limits allow.

The rate of late is cut to 0.7 and may then rise by half in 15 minutes; below a million tokens a minute, where
providers do not mind, twice as fast each minute. Once it is far above what is asked for, it is forgotten.

Source: OpenAI's error guide, `slow_down`: "reduce to the original level, hold, then increase gradually".
"""

from __future__ import annotations

from math import exp

from proxy.core.bucket import Bucket

CUT = 0.7
RISE, RISE_SECONDS = 1.5, 900.0
FREE = 1_000_000 / 60.0  # tokens per second, below which the rise is `FREE_RISE`
FREE_RISE, FREE_RISE_SECONDS = 2.0, 60.0
BURST_SECONDS = 1.0
MEMORY_SECONDS = 10.0  # over which the rate of late is measured
FORGOTTEN = 10.0  # times the rate of late


class Ramp:
    """Tokens per second, measured always and bounded after a `slow_down`."""

    __slots__ = ("_at", "_bucket", "_lately")

    def __init__(self, now: float) -> None:
        self._at = now
        self._lately = 0.0  # tokens, decaying
        self._bucket: Bucket | None = None

    @property
    def rate(self) -> float | None:
        """Tokens per second that may be sent; None: not bounded."""
        return None if self._bucket is None else self._bucket.rate

    def wait(self, tokens: float, now: float) -> float:
        return 0.0 if self._bucket is None else self._bucket.wait(tokens, now)

    def take(self, tokens: float, now: float) -> None:
        elapsed, self._at = max(0.0, now - self._at), now
        self._lately = self._lately * exp(-elapsed / MEMORY_SECONDS) + tokens
        if self._bucket is None:
            return
        rate = self._bucket.rate
        rise, seconds = (RISE, RISE_SECONDS) if rate > FREE else (FREE_RISE, FREE_RISE_SECONDS)
        rate *= rise ** (min(elapsed, MEMORY_SECONDS) / seconds)
        if rate > FORGOTTEN * self._lately / MEMORY_SECONDS and rate > FREE:
            self._bucket = None
            return
        self._bucket.change(rate, max(rate * BURST_SECONDS, 1.0), now)
        self._bucket.take(tokens, now)

    def slow_down(self, now: float) -> None:
        lately = self._lately * exp(-max(0.0, now - self._at) / MEMORY_SECONDS) / MEMORY_SECONDS
        rate = max(1.0, CUT * (lately if self._bucket is None else min(lately, self._bucket.rate)))
        self._bucket = Bucket(rate, max(rate * BURST_SECONDS, 1.0), now)
        self._bucket.set_level(0.0, now)
