"""The limit of a provider that says nothing but `retry-after` and counts in fixed windows.

Such a provider's refusals ask for far longer than a bucket would need, and all point at the same instants: the ends of
its windows. The quota of each window is spread evenly over it; a pause around each end, as long as the end is unsure,
keeps a call from being counted in a window it was not meant for.

Rules
-----
1. A window is at most spent by its quota; once in `CYCLE` calls it is tried for a little more, which a refusal ends.
2. A quota that turns out too small is searched: the pace doubles every `CLIMB_SECONDS`, and the refusal tells it.
3. Where refusals point at other instants than the ends believed in, there are no windows: `broken`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import exp2, inf

from proxy.core.headers import CONVENTIONAL

GUARD = 0.06  # seconds; how far calls and clocks are apart
CYCLE = 800.0  # calls between two trials for more
TRIAL = 0.02  # of the quota, at least one call
TINY, TINY_CYCLE = 2.0, 15  # calls; so small a quota is tried for more once in so many windows
CLIMB_SECONDS = 8.0
STRIKES = 3
ROUNDED = 1.0  # seconds by which a whole-second retry-after may be too long


@dataclass(slots=True)
class Slot:
    """In which window a call left."""

    number: int
    cost: float


def fitting(hold: float) -> float | None:
    """The shortest conventional window a wait of `hold` seconds may be the rest of."""
    return next((window for window in CONVENTIONAL if window > hold - ROUNDED), None)


class Window:
    """
    Args:
        seconds: of one window.
        hold: seconds until the present window ends, as the provider said.
        used: units spent in the present window, as far as they were seen; > 0.
    """

    def __init__(self, seconds: float, hold: float, used: float, now: float) -> None:
        self.seconds = seconds
        self.quota = used  # units per window
        self.used = used
        self.broken = False
        self._number = 0
        self._least, self._most = _end(hold, now)  # between them the present window ends
        self._plan = used  # units to be spent in the present window; inf while the quota is searched
        self._search_from: float | None = None
        self._unsure = True  # not all that was spent in the window of the refusal need have been ours, or been seen
        self._cost = 0.0  # of the largest call of late
        self._since_trial = 0
        self._refused_in = 0
        self._strikes = 0
        self._next = now

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.quota / self.seconds

    def left(self, now: float) -> float:
        self._roll(now)
        return min(self._plan, max(self.quota, self.used)) - self.used

    def wait(self, cost: float, now: float) -> float:
        self._roll(now)
        begins, closes = self._most - self.seconds + GUARD, self._least - GUARD
        if now < begins:
            return begins - now
        spent = self.used > 0.0 and self.used + cost > self._plan + 1e-6
        if self._refused_in == self._number or spent or now > closes:
            return self._most + GUARD - now
        return max(0.0, min(self._next, self._most + GUARD) - now)

    def take(self, cost: float, now: float) -> Slot:
        self._roll(now)
        self.used += cost
        self._cost = max(cost, 0.99 * self._cost)
        self._since_trial += 1
        if self._search_from is None and self.used > self.quota + 1e-6:
            self._search_from = now  # rule 2: a trial was not refused
        if self._search_from is not None:
            self._plan = inf
            self._next = now + cost / (self.rate * exp2(min(60.0, (now - self._search_from) / CLIMB_SECONDS)))
        else:
            left, rest = max(self._plan - self.used, 0.0), self._least - GUARD - now
            self._next = now + max(0.0, rest * cost / (left + cost))
        return Slot(self._number, cost)

    def unsent(self, slot: Slot) -> None:
        """A call was never sent after all."""
        if slot.number == self._number:
            self.used -= slot.cost

    def refused(self, slot: Slot, hold: float | None, now: float) -> bool:
        """A call was refused; `hold`: seconds until the window ends, as the provider said. True: the quota was
        learned anew."""
        self._roll(now)
        if slot.number != self._number:
            return False
        self.used -= slot.cost
        first, self._refused_in = self._refused_in != self._number, self._number
        if hold is not None:
            self._fit(*_end(hold, now))
        self.quota = max(slot.cost, self.used)
        self._search_from, self._unsure, self._since_trial = None, False, 0
        return first

    def _fit(self, least: float, most: float) -> None:
        if least <= self._most and most >= self._least:
            self._least, self._most = max(least, self._least), min(most, self._most)
            self._strikes = 0
            return
        self._strikes += 1
        longer = next((window for window in CONVENTIONAL if window > self.seconds), None)
        if longer is not None and most > self._most + GUARD:  # it ends later than its length allows
            self.seconds = longer
        self._least, self._most = least, most
        self.broken = self._strikes >= STRIKES or longer is None

    def _roll(self, now: float) -> None:
        """Go on to the window that `now` lies in."""
        if now < self._most:
            return
        passed = int((now - self._most) / self.seconds) + 1
        self._least += passed * self.seconds
        self._most += passed * self.seconds
        self._number += passed
        if self._search_from is not None:
            self.quota = max(self.quota, self.used)
        self.used = 0.0
        self._next = now
        self._plan = self.quota
        if self._unsure and self._search_from is None:
            self._search_from = now
        if self._search_from is not None:
            self._plan = inf
        elif self._since_trial > (TINY_CYCLE if self.quota <= TINY * self._cost else CYCLE):
            self._since_trial = 0
            self._plan = self.quota * (1.0 + TRIAL) + 1.0


def _end(hold: float, now: float) -> tuple[float, float]:
    """Between which instants a window ends whose rest was told as `hold`: whole seconds are rounded up."""
    doubt = ROUNDED if hold == int(hold) else GUARD
    return now + hold - doubt - GUARD, now + hold
