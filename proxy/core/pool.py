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
    """

    name: str
    label: str
    concurrency: int | None = None
    rates: Learner | None = None
    gradient: Gradient | None = None
    in_use: int = 0
    told: int = 0  # the learned concurrency that was last told

    def wait(self, size: Size, now: float) -> float:
        """0.0: room for `size` now. Else seconds until asking again is worth it; inf: until a place is left."""
        if self.concurrency is not None and self.in_use >= self.concurrency:
            return math.inf
        return self.rates.wait(size, now) if self.rates is not None else 0.0

    def enter(self, size: Size, now: float) -> Reservation | None:
        """Take a place and reserve `size`; only after `wait` said 0.0."""
        self.in_use += 1
        return self.rates.take(size, now) if self.rates is not None else None

    def leave(self) -> None:
        """Give the place back. What was reserved is settled apart, when the use is known."""
        assert self.in_use > 0
        self.in_use -= 1

    def sped(self, first_token_seconds: float, size: Size) -> tuple[float, float] | None:
        """A first token came so long after its call was sent. Returns the places before and now if worth telling."""
        if self.gradient is None:
            return None
        self.gradient.observed(first_token_seconds, size.input_tokens, self.in_use)
        return self._follow(self.gradient)

    def dropped(self, sent_at: float, now: float) -> tuple[float, float] | None:
        """A call sent at `sent_at` was refused for want of capacity. Returns as `sped` does."""
        if self.gradient is None:
            return None
        self.gradient.dropped(sent_at, now)
        return self._follow(self.gradient)

    def _follow(self, gradient: Gradient) -> tuple[float, float] | None:
        self.concurrency = int(gradient.limit)
        before = self.told or self.concurrency
        if self.told and abs(self.concurrency - before) < WORTH_TELLING * before:
            return None
        self.told = self.concurrency
        return (before, self.concurrency) if self.concurrency != before else None
