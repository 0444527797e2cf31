"""A limit of which no header tells: learned from refusals, as a bucket or as fixed windows, whichever they point to.

The two-point learner always runs along. A refusal that asks for far longer than a bucket of the rate it knows would
need is the end of a window's quota; when windows do not explain the refusals after all, the bucket is back in force.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from proxy.core.two_point import Point, TwoPoint
from proxy.core.window import Slot, Window, fitting

TOO_LONG = 2.0  # times what a bucket would need ...
ROUNDED = 1.5  # ... and so many seconds beside it: the hold may be in whole seconds, and late
REMEMBERED_SECONDS = 60.0
STEP_SECONDS = 0.1


@dataclass(slots=True)
class Stamp:
    """What is remembered of one call that left."""

    point: Point
    slot: Slot | None


class Silent:
    """One limit. It lets everything through until its first refusal."""

    def __init__(self, now: float) -> None:
        self.two_point = TwoPoint(now)
        self.window: Window | None = None
        self._doubts = 0  # windows that turned out to be none
        self._evidence = 0
        self._past: deque[tuple[float, float]] = deque([(now, 0.0)])  # (time, taken until then)
        self._taken = 0.0

    @property
    def rate(self) -> float | None:
        """Units per second; None until a first refusal."""
        return self.window.rate if self.window is not None else self.two_point.rate

    def level(self, now: float) -> float:
        """Units that should be left at the provider."""
        return self.window.left(now) if self.window is not None else self.two_point.saved(now)

    def wait(self, cost: float, now: float) -> float:
        return self.window.wait(cost, now) if self.window is not None else self.two_point.wait(cost, now)

    def take(self, cost: float, now: float) -> Stamp:
        past = self._past
        if now - past[-1][0] >= STEP_SECONDS:
            past.append((now, self._taken))
            while past[0][0] < now - REMEMBERED_SECONDS:
                past.popleft()
        self._taken += cost
        slot = self.window.take(cost, now) if self.window is not None else None
        return Stamp(self.two_point.take(cost, now), slot)

    def refused(self, stamp: Stamp, hold: float, told: bool, now: float) -> bool:
        """A call was refused and the next fits after `hold` seconds; `told`: by the provider's own word. True: the
        limit is believed to be another one."""
        known = self.two_point.rate
        self._taken -= stamp.point.cost
        changed = self.two_point.refused(stamp.point, hold, now)
        if self.window is not None:
            if stamp.slot is not None:
                changed = self.window.refused(stamp.slot, hold if told else None, now)
            if self.window.broken:
                self.window = None
                self._doubts += 1
                return True
            return changed
        rate = known if known is not None else self.two_point.rate
        assert rate is not None
        if told and changed and hold > TOO_LONG * stamp.point.cost / rate + ROUNDED:
            self._evidence += 1
            seconds = fitting(hold)
            if seconds is not None and self._evidence > self._doubts:
                self._evidence = 0
                used = self._taken - self._taken_until(now + hold - seconds)
                self.window = Window(seconds, max(used, stamp.point.cost), hold, used, now)
        return changed

    def _taken_until(self, at: float) -> float:
        taken = 0.0
        for time, total in self._past:
            if time > at:
                break
            taken = total
        return taken
