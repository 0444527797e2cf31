"""The limit of a provider that tells nothing, from its refusals alone.

When a call is refused the provider's bucket is empty. It was empty at the refusal before, too; so what was let through
between the two, over the time between them, *is* the limit, in our own units, however wrong our estimates are.

Rules
-----
1. Between refusals calls leave at just under the limit, so that a reserve grows at the provider; then a little faster,
   until the next refusal measures anew. One refusal in `CYCLE` calls is the price of knowing.
2. Refusals of calls that were on their way when the first came are that same refusal.
3. A refusal that comes too early (others use the limit too, or it fell) makes the reserve larger; cycles that last
   make it smaller.
4. Once more was let through than the limit explains, the limit has risen: the pace doubles every `CLIMB_SECONDS`
   until a refusal.
5. The ruler holds only while the provider's bucket cannot have been full: after idleness the next refusal restarts it.
6. The estimate is never 0 and never unbounded once a refusal came: each refusal bounds it from both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

from proxy.core.bucket import SLOWEST, Bucket

PRIOR_SECONDS = 60.0  # a first refusal is taken for the end of a bucket of so many seconds' worth
CYCLE = 600.0  # calls between two refusals, at best
CYCLE_LEAST = 60.0  # after a surprise, then doubling
RUN = 0.995  # of the limit
PROBE = 1.03
CATCH_UP = 1.05
CATCH_UP_SECONDS = 10.0
CLIMB_SECONDS = 8.0  # in which the pace doubles
IDLE_SECONDS = 5.0  # what may be saved up while nobody asks, in seconds' worth of the limit
CALM_SECONDS = 60.0  # after a refusal, before what was saved up may leave at once
GAIN = 0.3  # of a new measurement that agrees with the estimate


@dataclass(slots=True)
class Point:
    """Where the ruler stood when a call left."""

    at: float
    cost: float
    total: float  # cost of all calls before it that were not known to be refused
    given_back: float


class TwoPoint:
    """One limit. `rate` is in units per second, None until a first refusal."""

    def __init__(self, now: float) -> None:
        self.rate: float | None = None
        self.refusals = 0
        self._total = 0.0
        self._given_back = 0.0
        self._anchor_at = now
        self._anchor_total = 0.0
        self._began = False
        self._ruler_holds = True
        self._episode_until = now  # calls taken before are part of the refusal already known
        self._cycle = CYCLE_LEAST
        self._calls = 0  # since the anchor
        self._cost = 1.0  # of a call, on average
        self._reserve = 2.0  # calls
        self._climb_from: float | None = None  # when climbing began
        self._climb_rate = 0.0
        self._idle_burst = IDLE_SECONDS
        self._pace = Bucket(SLOWEST, 0.0, now)

    def saved(self, now: float) -> float:
        """Units that should be left at the provider; below zero: more was let through than the estimate explains."""
        if self.rate is None:
            return 0.0
        return self.rate * (now - self._anchor_at) - (self._total - self._anchor_total)

    def wait(self, cost: float, now: float) -> float:
        if self.rate is None:
            return 0.0
        seconds = self._pace.wait(0.0, now)
        if seconds and now - self._episode_until > CALM_SECONDS:
            needed = self._reserve * self._cost + cost
            if self._climb_from is None and self.saved(now) >= needed:
                return 0.0
        return seconds

    def take(self, cost: float, now: float) -> Point:
        if not self._began:
            self._began, self._anchor_at = True, now
        self._cost += 0.02 * (cost - self._cost) if self._calls > 50 else (cost - self._cost) / (self._calls + 1)
        point = Point(now, cost, self._total, self._given_back)
        self._total += cost
        self._calls += 1
        if self.rate is not None:
            self._steer(now)
            self._pace.take(cost, now)
        return point

    def refused(self, point: Point, hold: float, now: float) -> bool:
        """A call was refused and the next fits after `hold` seconds. True: the estimate was made anew."""
        self.refusals += 1
        before = self._total_before(point)
        self._total -= point.cost
        self._given_back += point.cost
        if point.at < self._anchor_at:
            self._anchor_total -= point.cost
            return False
        measured = False
        if point.at >= self._episode_until:
            self._measure(point, before - self._anchor_total)
            measured = True
        self._anchor_at, self._anchor_total = point.at, before
        self._episode_until = max(self._episode_until, now)
        self._calls = 0
        assert self.rate is not None
        self._pace = Bucket(self.rate, 0.0, now)
        self._pace.take(self.rate * hold, now)
        return measured

    def _measure(self, point: Point, admitted: float) -> None:
        seconds = max(point.at - self._anchor_at, 1e-3)
        early = self._calls < 0.6 * self._cycle
        climbed, self._climb_from = self._climb_from is not None, None
        calls = max(1.0, admitted / self._cost)
        doubt = max(point.cost, self._cost) * (1.0 + 0.3 * sqrt(calls))
        least, most = max(0.0, admitted - doubt) / seconds, (admitted + doubt) / seconds
        if self.rate is None:
            self.rate = max(admitted, self._cost) / (seconds + PRIOR_SECONDS)
            self._start_climbing(self.rate, point.at)
        elif not self._ruler_holds:
            self._idle_burst = max(0.5, 0.5 * self._idle_burst)
            self.rate = max(self.rate, least)
        else:
            told = admitted / seconds
            blended = told if climbed else self.rate + GAIN * (told - self.rate)
            self.rate = max(min(max(blended, least), most), 0.2 * self.rate, SLOWEST)
        if climbed or early:
            self._cycle = CYCLE_LEAST if climbed else self._cycle
            if early and not climbed:
                self._reserve = min(2.0 * self._reserve, max(4.0, 6.0 * self.rate / self._cost))
        else:
            self._cycle = min(CYCLE, 2.0 * self._cycle)
            self._reserve = max(2.0, 0.8 * self._reserve)
        self._ruler_holds = True

    def _steer(self, now: float) -> None:
        """Choose the pace until the next call."""
        assert self.rate is not None
        rate = self.rate
        if self._climb_from is not None:
            rate = self._climb_rate * 2.0 ** min(60.0, (now - self._climb_from) / CLIMB_SECONDS)
        else:
            saved = self.saved(now)
            if saved > self._idle_burst * rate:
                self._anchor_at += saved / rate - self._idle_burst
                self._ruler_holds = False
            behind = -saved - max(3.0 * self._cost, self._reserve * self._cost, 0.02 * self._calls * self._cost)
            if behind > 0.0 and self._ruler_holds:
                self._start_climbing(rate, now)
            elif self._calls > self._cycle:
                rate *= PROBE
            else:
                goal = self._reserve * self._cost + (1.0 - RUN) * self._calls * self._cost
                urge = (saved - goal) / (rate * CATCH_UP_SECONDS)
                rate *= min(CATCH_UP, max(0.9, 1.0 + urge))
        self._pace.change(rate, 0.0, now)

    def _start_climbing(self, rate: float, now: float) -> None:
        self._climb_from, self._climb_rate = now, rate

    def _total_before(self, point: Point) -> float:
        """Cost of the calls that left before `point` and were let through: those refused since were before it."""
        return point.total - (self._given_back - point.given_back)
