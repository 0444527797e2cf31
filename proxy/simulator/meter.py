"""The two ways in which providers keep count: a bucket that fills all the time, and a quota per fixed window.

A meter is asked in this order: `advance(now)`, then `wait(cost)`, then perhaps `take(cost)`. Its `limit`, `remaining`
and `reset` are what the provider puts in its headers. Times never go back; an earlier `now` is taken as the latest one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import ceil, floor

SLACK = 1e-6  # of one request or token: what floating point may lose without refusing who waited exactly long enough


class Meter(ABC):
    """One limit, of one dimension."""

    __slots__ = ("dimension", "factor", "full", "limit", "limit_text", "now", "period", "span")

    def __init__(self, dimension: str, full: float, span: float, *, period: float, now: float) -> None:
        """
        Args:
            dimension: "requests" or "tokens".
            full: what can be taken at once from the untouched meter; >= 0.
            span: seconds in which all of it comes back; > 0.
            period: seconds of the limit's name: 60 for "per minute", 86400 for "per day".
        """
        self.dimension = dimension
        self.full = full
        self.span = span
        self.period = period
        self.now = now
        self.scale(1.0)

    def scale(self, factor: float) -> None:
        """Make the limit `factor` times the configured one; what was used or left stays as it is."""
        self.factor = factor
        self.limit = self.full * factor
        self.limit_text = str(floor(self.limit + SLACK))

    @property
    def rate(self) -> float:
        """Per second."""
        return self.limit / self.span

    @property
    def spoken(self) -> int:
        """The limit as an error message names it, e.g. 500 where 500 a minute come from a bucket of 50."""
        return round(self.rate * self.period)

    @abstractmethod
    def advance(self, now: float) -> None: ...

    @abstractmethod
    def wait(self, cost: float) -> float:
        """Seconds until so much can be taken if nobody else comes; 0.0: now. At most `span`, even where it is never."""

    @abstractmethod
    def take(self, cost: float) -> None:
        """Charge it, into debt if there is less."""

    @abstractmethod
    def drain(self, cost: float) -> None:
        """Charge a refused call: take what is there of its cost."""

    @property
    @abstractmethod
    def remaining(self) -> int:
        """Whole units left."""

    @property
    @abstractmethod
    def reset(self) -> float:
        """Seconds until `remaining` would be the limit again."""


class Bucket(Meter):
    """A leaky bucket, seen as what is left: `level` rises at limit / span up to the limit; below 0 is debt."""

    __slots__ = ("level",)

    def __init__(self, dimension: str, full: float, span: float, *, period: float, now: float) -> None:
        self.level = full
        super().__init__(dimension, full, span, period=period, now=now)

    def scale(self, factor: float) -> None:
        super().scale(factor)
        self.level = min(self.level, self.limit)

    def advance(self, now: float) -> None:
        if now > self.now:
            self.level = min(self.limit, self.level + (now - self.now) * self.limit / self.span)
            self.now = now

    def wait(self, cost: float) -> float:
        short = cost - self.level
        if short <= SLACK:
            return 0.0
        return min(self.span, short / self.rate) if self.limit > 0 else self.span

    def take(self, cost: float) -> None:
        self.level -= cost

    def drain(self, cost: float) -> None:
        self.level = min(self.level, max(0.0, self.level - cost))

    @property
    def remaining(self) -> int:
        return max(0, floor(self.level + SLACK))

    @property
    def reset(self) -> float:
        """(limit - remaining) / limit * span, with `remaining` floored, as OpenAI and Groq compute it."""
        return (self.limit - self.remaining) / self.limit * self.span if self.limit > 0 else self.span


class Window(Meter):
    """A quota for each window of `span` seconds; the windows stand still, whoever comes. The next window owes what was
    taken beyond it."""

    __slots__ = ("began", "used")

    def __init__(self, dimension: str, full: float, span: float, *, period: float, now: float) -> None:
        self.began = now
        self.used = 0.0
        super().__init__(dimension, full, span, period=period, now=now)

    def advance(self, now: float) -> None:
        self.now = max(self.now, now)
        passed = floor((self.now - self.began) / self.span + SLACK)
        if passed > 0:
            self.began += passed * self.span
            self.used = max(0.0, self.used - passed * self.limit)

    def wait(self, cost: float) -> float:
        wanted = self.used + cost
        if wanted <= self.limit + SLACK:
            return 0.0
        windows = ceil(wanted / self.limit - 1.0 - SLACK) if self.limit > 0 else 2
        return min(self.span, self.reset + (windows - 1) * self.span)

    def take(self, cost: float) -> None:
        self.used += cost

    def drain(self, cost: float) -> None:
        self.used = max(self.used, min(self.limit, self.used + cost))

    @property
    def remaining(self) -> int:
        return max(0, floor(self.limit - self.used + SLACK))

    @property
    def reset(self) -> float:
        return max(0.0, self.began + self.span - self.now)
