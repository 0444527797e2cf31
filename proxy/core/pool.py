"""Limits shared by all that name them: places to be in flight, and rates.

A pool may stand for the process, an upstream, a model, one account or one GPU. A call asks for all its pools together
(`core.gate`), so it never holds one while it waits for another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from proxy.core.concurrency import Gradient
from proxy.core.learner import Learner, Reservation, Size

WORTH_TELLING = 0.1  # of the places; what a limit that follows a server's speed does all the time is no news


@dataclass(slots=True, eq=False)
class Pool:
    """
    Args:
        name: tells it from all others.
        label: what it is called in metrics; from the configuration. Several pools may share one: those of the models
            behind a wildcard do.
        concurrency: places, >= 0; None: no bound.
        rates: requests and tokens over time, and holds; None: no bound.
        gradient: learns the concurrency of a self-hosted upstream, and sets it; None: it is as configured.

    How much it was used is known exactly, for one addition at each change: what is left of the sum of all times of
    leaving less the sum of all times of entering is the seconds for which places were held, once those who are still
    inside are counted as leaving now.
    """

    name: str
    label: str
    concurrency: int | None = None
    rates: Learner | None = None
    gradient: Gradient | None = None
    in_use: int = 0
    told: int = 0  # the learned concurrency that was last told
    _held: float = 0.0  # seconds, as above
    _full: float = 0.0  # the same of the stretches in which no place was left

    def wait(self, size: Size, now: float) -> float:
        """0.0: room for `size` now. Else seconds until asking again is worth it; inf: until a place is left."""
        if self.concurrency is not None and self.in_use >= self.concurrency:
            return math.inf
        return self.rates.wait(size, now) if self.rates is not None else 0.0

    def enter(self, size: Size, now: float) -> Reservation | None:
        """Take a place and reserve `size`; only after `wait` said 0.0."""
        self.in_use += 1
        self._held -= now
        if self.in_use == self.concurrency:
            self._full -= now
        return self.rates.take(size, now) if self.rates is not None else None

    def leave(self, now: float) -> bool:
        """Give the place back. What was reserved is settled apart, when the use is known. True: somebody may have
        waited for a place, because none was left, or one that was kept."""
        assert self.in_use > 0
        if self.in_use == self.concurrency:
            self._full += now
        self.in_use -= 1
        self._held += now
        return self.concurrency is not None and self.in_use + 2 >= self.concurrency

    def resize(self, concurrency: int | None, now: float) -> None:
        """Have so many places from now on."""
        was_full = self._is_full
        self.concurrency = concurrency
        self._full += (was_full - self._is_full) * now

    def held_seconds(self, now: float) -> float:
        """Place-seconds ever used, until `now`: their growth over a stretch is the mean in use."""
        return self._held + self.in_use * now

    def full_seconds(self, now: float) -> float:
        """For how long there was no place left, ever, until `now`."""
        return self._full + self._is_full * now

    @property
    def _is_full(self) -> bool:
        return self.concurrency is not None and self.in_use >= self.concurrency

    def sped(self, first_token_seconds: float, size: Size, now: float) -> tuple[float, float] | None:
        """A first token came so long after its call was sent. Returns the places before and now if worth telling."""
        if self.gradient is None:
            return None
        self.gradient.observed(first_token_seconds, size.input_tokens, self.in_use)
        return self._follow(self.gradient, now)

    def dropped(self, sent_at: float, now: float) -> tuple[float, float] | None:
        """A call sent at `sent_at` was refused for want of capacity. Returns as `sped` does."""
        if self.gradient is None:
            return None
        self.gradient.dropped(sent_at, now)
        return self._follow(self.gradient, now)

    def _follow(self, gradient: Gradient, now: float) -> tuple[float, float] | None:
        places = int(gradient.limit)
        self.resize(places, now)
        before = self.told or places
        if self.told and abs(places - before) < WORTH_TELLING * before:
            return None
        self.told = places
        return (before, places) if places != before else None
