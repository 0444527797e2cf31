"""May this upstream be asked at all? Closed, limited, or shut.

Rules
-----
1. Money shuts: the first refusal because of credit, quota or a spend limit, for 60 s, then twice as long each time, up
   to 15 min. So do three refusals of the credential (401, 403) in a row, and three of a limit that has no name, with no
   word when to come back and no success between them: that is money by another name.
2. When the time is over one call probes. Its success opens the upstream; another refusal shuts it again. A probe that
   tells nothing within `PROBE_SECONDS` makes room for another.
3. Failures limit: as long as fewer than 2 of 3 calls of the last two minutes were accepted, a share of the calls is
   turned away here: `p = max(0, (calls - 1.5 * accepted) / (calls + 1))`. Refusals by a limit are accepted calls in
   this sense; pacing is the limit's matter, never the breaker's. Calls in flight do not count yet.

Source of the formula: "Handling Overload", Site Reliability Engineering, ch. 21, with K = 1.5.
"""

from __future__ import annotations

from collections import deque
from enum import Enum
from math import inf

from proxy.core.outcome import Meaning, Outcome, Reason

SHUT_SECONDS = 60.0
SHUT_MAX = 900.0
PROBE_SECONDS = 60.0
IN_A_ROW = 3
WINDOW = 120.0  # seconds that count
SLICE = 5.0  # seconds counted together
MULTIPLIER = 1.5
FEW = 10  # calls in the window; of fewer nothing is concluded


class State(Enum):
    """The value is the `state` label of metrics."""

    CLOSED = "closed"
    LIMITED = "limited"
    SHUT = "shut"


class Breaker:
    """One per upstream, which is one credential at one endpoint."""

    __slots__ = ("_accepted", "_calls", "_next_seconds", "_probe_until", "_row", "_shut_until", "_slices", "reason")

    def __init__(self) -> None:
        self.reason = Reason.NONE  # why it is shut
        self._shut_until = -inf
        self._next_seconds = SHUT_SECONDS
        self._probe_until = -inf
        self._row: dict[Reason, int] = {}
        self._slices: deque[list[float]] = deque()  # [began, calls, accepted]
        self._calls = 0.0
        self._accepted = 0.0

    def admits(self, now: float, draw: float) -> bool:
        """Whether one call may be sent now; if so, what became of it is to be told by `ended`.

        Args:
            draw: a random number in [0, 1).
        """
        if self.reason is not Reason.NONE:
            if now < max(self._shut_until, self._probe_until):
                return False
            self._probe_until = now + PROBE_SECONDS
            return True
        if draw >= self._share(now):
            return True
        self._count(now, accepted=0.0)
        return False

    def ended(self, meaning: Meaning, retry_after: float | None, now: float) -> None:
        """An admitted call came to this."""
        if meaning.outcome is Outcome.CANCELLED:
            return
        reason = meaning.reason
        if self._shuts(reason, retry_after):
            self.reason = reason
            self._shut_until = now + self._next_seconds
            self._next_seconds = min(SHUT_MAX, 2 * self._next_seconds)
            self._probe_until = -inf
            self._row.clear()
            return
        failed = meaning.outcome in (Outcome.FAILED, Outcome.OVERLOADED, Outcome.TRUNCATED)
        self._count(now, accepted=0.0 if failed else 1.0)
        if meaning.outcome is Outcome.OK:
            self.reason, self._shut_until, self._probe_until = Reason.NONE, -inf, -inf
            self._next_seconds = SHUT_SECONDS
            self._row.clear()

    def shut_for(self, now: float) -> float:
        """Seconds until a probe may go; 0.0: not shut, or a probe may go now."""
        if self.reason is Reason.NONE:
            return 0.0
        return max(0.0, max(self._shut_until, self._probe_until) - now)

    def state(self, now: float) -> State:
        if self.reason is not Reason.NONE:
            return State.SHUT
        return State.LIMITED if self._share(now) > 0.0 else State.CLOSED

    def _shuts(self, reason: Reason, retry_after: float | None) -> bool:
        if reason is Reason.MONEY:
            return True
        if reason is Reason.AUTH or (reason is Reason.UNNAMED and retry_after is None):
            self._row[reason] = self._row.get(reason, 0) + 1
            return self._row[reason] >= IN_A_ROW or self.reason is reason
        return False

    def _share(self, now: float) -> float:
        """The share of calls to turn away, in [0, 1)."""
        self._slice(now)
        if self._calls < FEW:
            return 0.0
        return max(0.0, (self._calls - MULTIPLIER * self._accepted) / (self._calls + 1))

    def _count(self, now: float, *, accepted: float) -> None:
        """A call is over; one in flight says nothing yet."""
        counted = self._slice(now)
        counted[1] += 1.0
        counted[2] += accepted
        self._calls += 1.0
        self._accepted += accepted

    def _slice(self, now: float) -> list[float]:
        slices = self._slices
        if not slices or not slices[-1][0] <= now < slices[-1][0] + SLICE:
            slices.append([now, 0.0, 0.0])
        while slices[0][0] <= now - WINDOW or slices[0][0] > now:
            _, calls, accepted = slices.popleft()
            self._calls -= calls
            self._accepted -= accepted
        return slices[-1]
