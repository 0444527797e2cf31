"""One limit of a rate: is there room for this much, and if not, when?

GCRA: the whole bucket is one instant, `tat` (theoretical arrival time), at which it will be full again. What was taken
and has not flowed back yet is `(tat - now) * rate`; the level is `burst` less that. It may fall below zero: a call's
true cost is known only at its end, and the debt is paid by the refill before anybody else enters.

Rules
-----
1. Over any span of `s` seconds of forward time, what is taken through `wait` is at most `burst + rate * s`, and one
   call dearer than the bucket more.
2. A call dearer than the whole bucket enters when the bucket is full; it would never enter otherwise.
3. A rate of 0 lets the present level out and nothing more; it never means unlimited.
4. A clock that jumps back neither grants nor stalls: the level stays, and time flows on from the new reading.

Source: ITU-T I.371, generic cell rate algorithm (virtual scheduling).
"""

from __future__ import annotations

SLOWEST = 1e-9  # units/s that stand for a rate of 0: one unit in 30 years
EARLY = 1e-6  # seconds; a wait shorter than any timer is no wait, and float rounding cannot make a caller spin


class Bucket:
    """
    Args:
        rate: refill, in units per second, >= 0.
        burst: level of a full bucket, in units, >= 0.
        now: when it begins, full; seconds, monotonic.
    """

    __slots__ = ("_rate", "_seen", "_tat", "burst")

    def __init__(self, rate: float, burst: float, now: float = 0.0) -> None:
        self.burst = burst
        self._rate = max(rate, SLOWEST)
        self._tat = now
        self._seen = now

    @property
    def rate(self) -> float:
        """Units per second."""
        return self._rate if self._rate > SLOWEST else 0.0

    def level(self, now: float) -> float:
        """Units that can be taken now; at most `burst`, below zero while in debt."""
        return self.burst - self._used(now)

    def wait(self, cost: float, now: float) -> float:
        """Seconds until `cost` fits, 0.0 when it fits now. Always finite."""
        lacking = self._used(now) - self.burst + min(cost, self.burst)
        seconds = lacking / self._rate
        return seconds if seconds > EARLY else 0.0

    def take(self, cost: float, now: float) -> None:
        """Charge `cost`, whether it fits or not."""
        self._tat = now + (self._used(now) + cost) / self._rate

    def give_back(self, amount: float, now: float) -> None:
        """Return `amount` of what was taken; the level never rises above `burst`."""
        self._tat = now + max(0.0, self._used(now) - amount) / self._rate

    def settle(self, delta: float, now: float) -> None:
        """Correct a reservation by `delta` = actual cost - what was reserved."""
        if delta >= 0.0:
            self.take(delta, now)
        else:
            self.give_back(-delta, now)

    def change(self, rate: float, burst: float, now: float) -> None:
        """Give it another rate and size; the level stays, but for what no longer fits."""
        level = self.level(now)
        self._rate = max(rate, SLOWEST)
        self.burst = burst
        self.set_level(level, now)

    def set_level(self, level: float, now: float) -> None:
        """Say what the level is; above `burst` means full."""
        self._seen = now
        self._tat = now + max(0.0, self.burst - level) / self._rate

    def _used(self, now: float) -> float:
        if now < self._seen:  # rule 4
            self._tat -= self._seen - now
        self._seen = now
        return max(0.0, self._tat - now) * self._rate

    def __repr__(self) -> str:
        return f"<Bucket {self._rate:g}/s, burst {self.burst:g}, level {self.level(self._seen):g}>"
