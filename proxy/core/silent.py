"""A limit of which no header tells: learned from refusals, as a bucket or as fixed windows, whichever they point to.

The two-point learner always runs along. A refusal that asks for far longer than a bucket of the rate it knows would
need may be the end of a window's quota: so is a first one, and so are two that point at ends a whole number of windows
apart. When windows do not explain the refusals after all, the bucket is back in force.
"""

from __future__ import annotations

from proxy.core.journal import Features, Journal, Mark
from proxy.core.two_point import TwoPoint
from proxy.core.window import Slot, Window, fitting

TOO_LONG = 2.0  # times what a bucket would need ...
ROUNDED = 1.5  # ... and so many seconds beside it: the hold may be in whole seconds, and late
REMEMBERED = 4  # ends
END_TOLERANCE = 1.1  # seconds by which two ends of whole-second holds may be apart
LONG = 2.5  # seconds; a first refusal that asks for more is taken for a window's (a slow bucket looks the same)


class Silent:
    """One limit, from its first refusal on.

    Args:
        journal: of all calls.
        tokens: it counts tokens, else calls.
    """

    def __init__(self, journal: Journal, *, tokens: bool, now: float) -> None:
        self.two_point = TwoPoint(journal, tokens=tokens, now=now)
        self.window: Window | None = None
        self._journal = journal
        self._doubts = 0  # windows that turned out to be none
        self._ends: list[tuple[float, float]] = []  # (when, after which hold) windows seem to have ended

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.window.rate if self.window is not None else self.two_point.rate or 0.0

    def level(self, now: float) -> float:
        """Units that should be left at the provider."""
        return self.window.left(now) if self.window is not None else self.two_point.saved(now)

    def wait(self, x: Features, now: float) -> float:
        cost = self.two_point.cost(x)
        return self.window.wait(cost, now) if self.window is not None else self.two_point.wait(cost, now)

    def take(self, x: Features, now: float) -> Slot | None:
        """A call leaves; after it was written into the journal."""
        cost = self.two_point.cost(x)
        self.two_point.take(cost, now)
        return self.window.take(cost, now) if self.window is not None else None

    def unsent(self, mark: Mark, slot: Slot | None) -> None:
        """A call was never sent after all."""
        self.two_point.unsent(mark)
        if self.window is not None and slot is not None:
            self.window.unsent(slot)

    def refused(self, mark: Mark, slot: Slot | None, hold: float, told: bool, now: float) -> bool:
        """A call was refused and the next fits after `hold` seconds; `told`: by the provider's own word. True: the
        limit is believed to be another one."""
        known = self.two_point.rate
        changed = self.two_point.refused(mark, hold, now)
        if self.window is not None:
            if slot is not None:
                changed = self.window.refused(slot, hold if told else None, now)
            if self.window.broken:
                self.window = None
                self._doubts += 1
                return True
            return changed
        cost = self.two_point.cost(mark.features)
        if told and changed and hold > (LONG if known is None else TOO_LONG * cost / known + ROUNDED):
            seconds = self._window_of(hold, now, sure=known is None)
            if seconds is not None:
                self.window = Window(seconds, hold, self._used(now + hold - seconds - 1.0, cost), now)
        return changed

    def _window_of(self, hold: float, now: float, *, sure: bool) -> float | None:
        """How long the windows are that `hold` is the rest of; None: it need not be a window."""
        ends, self._ends = self._ends, [*self._ends[-REMEMBERED:], (now + hold, hold)]
        agreeing = 0
        seconds = fitting(max((hold, *(hold for _, hold in ends))))
        if seconds is None:
            return None
        for end, _ in ends:
            apart = (now + hold - end) % seconds
            agreeing += min(apart, seconds - apart) <= END_TOLERANCE
        if agreeing + sure <= self._doubts:
            return None
        self._ends = []
        return seconds

    def _used(self, since: float, least: float) -> float:
        """Units sent since then, but for the refused call."""
        calls, sums = self._journal.before(since)
        now_calls, now_sums = self._journal.calls, self._journal.sums
        sent = (now_sums[0] - sums[0], 0.0, 0.0)
        return max(least, self.two_point.units(now_calls - calls, sent) - least)
