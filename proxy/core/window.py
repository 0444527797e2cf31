"""The limit of a provider that says nothing but `retry-after` and counts in fixed windows.

Such a provider's refusals ask for far longer than a bucket would need, and all point at the same instants: the ends of
its windows. The quota of each window is spread evenly over it; a pause around each end, as long as the end is unsure,
keeps a call from being counted in a window it was not meant for.

Rules
-----
1. A window is at most spent by its quota; once in `CYCLE` calls it is tried for more, which a refusal ends.
2. A quota that was enlarged and not refused is enlarged again, by half, until it is.
3. Where refusals point at other instants than the ends believed in, there are no windows: `broken`.
"""

from __future__ import annotations

from dataclasses import dataclass

from proxy.core.headers import CONVENTIONAL

GUARD = 0.06  # seconds; how far calls and clocks are apart
CYCLE = 800.0  # calls between two trials for more
STRIKES = 3
ROUNDED = 1.0  # seconds by which a whole-second retry-after may be too long


@dataclass(slots=True)
class Slot:
    """When a call left, and in which window."""

    at: float
    cost: float
    number: int


def fitting(hold: float) -> float | None:
    """The shortest conventional window a wait of `hold` seconds may be the rest of."""
    return next((window for window in CONVENTIONAL if window > hold - ROUNDED), None)


class Window:
    """
    Args:
        seconds: of one window.
        quota: units of one window, > 0.
        hold: seconds until the present window ends, as the provider said.
        used: units spent in the present window.
    """

    def __init__(self, seconds: float, quota: float, hold: float, used: float, now: float) -> None:
        self.seconds = seconds
        self.quota = quota
        self.broken = False
        self.used = used
        self._cost = 1.0
        self._number = 0
        self._least, self._most = _end(hold, now)  # between them the present window ends
        self._plan = quota
        self._raised = 0
        self._since_trial = 0.0
        self._refused_in = -1
        self._strikes = 0
        self._next = now

    @property
    def rate(self) -> float:
        """Units per second."""
        return self.quota / self.seconds

    def left(self, now: float) -> float:
        self._roll(now)
        return self._plan - self.used

    def wait(self, cost: float, now: float) -> float:
        self._roll(now)
        begins = self._most - self.seconds + GUARD
        if now < begins and self._number:
            return begins - now
        closes = self._least - GUARD
        if (
            self._refused_in == self._number
            or (self.used > 0.0 and self.used + cost > self._plan + 1e-6)
            or now > closes
        ):
            return max(self._most + GUARD - now, 1e-3)
        return max(0.0, self._next - now)

    def take(self, cost: float, now: float) -> Slot:
        self._roll(now)
        self._cost += 0.05 * (cost - self._cost)
        self.used += cost
        self._since_trial += 1
        closes = self._least - GUARD
        left = max(self._plan - self.used, 0.0)
        spacing = (closes - now) * cost / (left + cost) if closes > now else 0.0
        self._next = now + max(0.0, spacing)
        return Slot(now, cost, self._number)

    def refused(self, slot: Slot, hold: float | None, now: float) -> bool:
        """True: the quota was learned anew."""
        self._roll(now)
        if slot.number != self._number:
            return False
        self.used -= slot.cost
        first, self._refused_in = self._refused_in != self._number, self._number
        if hold is not None:
            self._fit(*_end(hold, now))
        if not first:
            self.quota = self._plan = max(self._cost, min(self.quota, self.used))
            return False
        self.quota = self._plan = max(self._cost, self.used)
        self._raised = 0
        self._since_trial = 0.0
        return True

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
        if self._refused_in != self._number and self.used >= self._plan - 1e-6 and self._plan > self.quota:
            self.quota = self._plan  # rule 2
            self._raised += 1
        self._least += passed * self.seconds
        self._most += passed * self.seconds
        self._number += passed
        self.used = 0.0
        self._plan = self.quota
        if self._raised:
            self._plan = self.quota * 1.5
        elif self._since_trial > CYCLE:
            self._since_trial = 0.0
            self._plan = self.quota + max(self._cost, 0.02 * self.quota)
        self._next = now


def _end(hold: float, now: float) -> tuple[float, float]:
    """Between which instants a window ends whose rest was told as `hold`: whole seconds are rounded up."""
    doubt = ROUNDED if hold == int(hold) else GUARD
    return now + hold - doubt - GUARD, now + hold
