"""Limits shared by all that name them: places to be in flight, and rates.

A pool may stand for the process, an upstream, a model, one account or one GPU. A call asks for all its pools together
(`core.gate`), so it never holds one while it waits for another.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from proxy.core.concurrency import Gradient
from proxy.core.learner import Learner, Reservation, Size


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

    def sped(self, first_token_seconds: float, size: Size) -> None:
        """A first token came so long after its call was sent."""
        if self.gradient is not None:
            self.gradient.observed(first_token_seconds, size.input_tokens, self.in_use)
            self.concurrency = int(self.gradient.limit)

    def dropped(self, sent_at: float, now: float) -> None:
        """A call sent at `sent_at` was refused for want of capacity."""
        if self.gradient is not None:
            self.gradient.dropped(sent_at, now)
            self.concurrency = int(self.gradient.limit)
