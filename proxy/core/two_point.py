"""The limit of a provider that tells nothing, from its refusals alone.

When a call is refused the provider's bucket is empty. It was empty at the refusal before, too; so what was let through
between the two, over the time between them, *is* the limit, in our own units, however wrong our estimates are.

Rules
-----
1. Between refusals calls leave at just under the limit, so that a reserve grows at the provider; then a little faster,
   until the next refusal measures anew. One refusal in `CYCLE` calls is the price of knowing.
2. Refusals of calls that were on their way when the first came are that same refusal.
3. Any two refusals measure, so the estimate is that of the last `MEMORY` calls, as far back as the measurements agree.
   How far they may be apart is learned too: where others use the limit, they scatter, and the reserve must be larger.
4. Once more was let through than the limit explains, the limit has risen: the pace doubles every `CLIMB_SECONDS`
   until a refusal. So it does after the very first one, which tells hardly anything.
5. The ruler holds only while the provider's bucket cannot have been full: after idleness the next refusal restarts it.
6. A limit that fell far may be back before long: `PATIENCE` seconds after its last refusal the pace doubles as by
   rule 4, and each time that this only confirms the estimate the next is twice as far away.
7. The estimate is never 0 and never unbounded once a refusal came: each refusal bounds it from both sides.
"""

from __future__ import annotations

from collections import deque
from math import exp2, sqrt

from proxy.core.bucket import SLOWEST, Bucket
from proxy.core.journal import SCALE, Features, Journal, Mark

PRIOR_SECONDS = 60.0  # a first refusal is taken for the end of a bucket of so many seconds' worth
CYCLE = 600.0  # calls between two refusals, at best
CYCLE_LEAST = 40.0  # after a surprise, then doubling
RUN = 0.995  # of the limit
PROBE, PROBE_MOST = 0.05, 0.25  # above the limit: as far as it may be off, by what it was measured with
CATCH_UP = 1.08
CATCH_UP_SECONDS = 5.0  # in which what was saved up is spent, as far as CATCH_UP allows
CLIMB_SECONDS = 8.0  # in which the pace doubles
IDLE_SECONDS = 5.0  # what may leave at once after idleness, in seconds' worth of the limit
FALLEN = 0.8  # of the limit before: a fall to a tenth is measured in several steps
PATIENCE, PATIENCE_MOST = 20.0, 320.0  # seconds; who is low for longer is tried for more once in a cycle
CALM_SECONDS = 60.0  # after a refusal, before anything may leave at once
LONG_CYCLE = 0.6  # of the cycle; a refusal that comes later confirms the estimate
FULL_SECONDS = 30.0  # of the limit unused, and the provider's bucket may have been full
MEMORY = 1500.0  # calls whose measurements are averaged
SCATTER, SCATTER_LEAST, SCATTER_MOST = 0.3, 0.1, 2.0  # sigma of what n calls' worth of time lets through, over sqrt(n)
SCATTER_GAIN = 0.2  # of the newest measurement
EDGE = 1.5  # calls; at either end the bucket is only nearly empty


class TwoPoint:
    """One limit, from its first refusal on.

    Args:
        journal: of all calls.
        tokens: it counts tokens, else calls.
    """

    def __init__(self, journal: Journal, *, tokens: bool, now: float) -> None:
        self.rate: float | None = None  # units per second; None until the first refusal was told
        self._journal = journal
        self._tokens = tokens
        self._anchor_at = now if journal.began is None else journal.began
        self._anchor_calls = 0
        self._anchor_total = 0.0
        self._refunds: list[tuple[int, float]] = []  # (number, cost) of refused calls since the anchor
        self._ruler_holds = True
        self._known_at = self._anchor_at  # when the present refusal was heard of
        self._calm_until = now
        self._gentle_until = now  # as long after a hold as it lasted, nobody tries for more
        self._burst = Bucket(SLOWEST, 0.0, now)  # what may leave at once
        self._cycle = CYCLE_LEAST
        self._spans: deque[tuple[float, float, int]] = deque()  # (seconds, admitted, calls) between refusals
        self._scatter = SCATTER
        self._climb: tuple[float, float] | None = None  # when climbing began, and what was admitted until then
        self._patience: float | None = None  # rule 6
        self._idle_burst = IDLE_SECONDS
        self._pace = Bucket(SLOWEST, 0.0, now)

    def cost(self, x: Features) -> float:
        """Of one call, in units. Any measure of tokens will do, as long as it is always the same."""
        return self.units(1, x)

    def saved(self, now: float) -> float:
        """Units that should be left at the provider; below zero: more was let through than the estimate explains."""
        return 0.0 if self.rate is None else self.rate * (now - self._anchor_at) - self._admitted()

    def wait(self, cost: float, now: float) -> float:
        if self.rate is None:
            return 0.0
        seconds = self._pace.wait(0.0, now)
        if seconds and now > self._calm_until and self._climb is None:
            saved = min(self.saved(now), self._burst.level(now))
            if saved >= self._reserve * self._mean() + cost:
                return 0.0
        return seconds

    def take(self, cost: float, now: float) -> None:
        """A call leaves; after it was written into the journal."""
        if self.rate is not None:
            self._pace.change(self._choose_pace(now), 0.0, now)
            self._pace.take(cost, now)
            self._burst.change(self.rate, self.rate * self._idle_burst, now)
            self._burst.take(cost, now)

    def unsent(self, mark: Mark) -> None:
        """A call was never sent after all."""
        if mark.calls >= self._anchor_calls:
            self._anchor_total += self.cost(mark.features)

    def refused(self, mark: Mark, hold: float, now: float) -> bool:
        """A call was refused and the next fits after `hold` seconds. True: the limit was measured anew."""
        if mark.calls < self._anchor_calls:
            return False
        total = self.units(mark.calls - 1, (mark.sums[0] - mark.features[0], 0.0, 0.0))
        refunded = sum(cost for calls, cost in self._refunds if calls < mark.calls)
        self._refunds.append((mark.calls, self.cost(mark.features)))
        anew = self.rate is None or mark.at >= self._known_at
        if anew:
            self._measure(mark, total - self._anchor_total - refunded)
            self._known_at = now
        self._anchor_at, self._anchor_calls, self._anchor_total = mark.at, mark.calls, total
        self._refunds = [refund for refund in self._refunds if refund[0] >= mark.calls]
        assert self.rate is not None
        self._pace = Bucket(self.rate, 0.0, now)
        self._pace.take(self.rate * hold, now)
        self._calm_until = now + hold + CALM_SECONDS
        self._gentle_until = now + hold + min(hold, CALM_SECONDS)
        self._burst.set_level(-self.rate * hold, now)
        return anew

    def _measure(self, mark: Mark, admitted: float) -> None:
        seconds, admitted = max(mark.at - self._anchor_at, 1e-3), max(admitted, 0.0)
        number = max(1, mark.calls - self._anchor_calls)
        cost = max(self.cost(mark.features), admitted / number)
        long = number >= LONG_CYCLE * self._cycle
        climb, self._climb = self._climb, None
        if self.rate is None:
            before = self.units(*self._journal.before(mark.at - PRIOR_SECONDS))
            lately = self.units(mark.calls, mark.sums) - before
            if seconds > PRIOR_SECONDS:
                seconds, admitted = PRIOR_SECONDS, min(admitted, lately)
            self.rate = max(admitted, cost) / (seconds + PRIOR_SECONDS)
            self._climb = mark.at, admitted
            return
        worth = max(1.0, self.rate * seconds / cost)  # calls that this time should let through
        error, doubt = admitted - self.rate * seconds, cost * (EDGE + 3.0 * self._scatter * sqrt(worth))
        if not self._ruler_holds:
            self._idle_burst = max(0.5, 0.5 * self._idle_burst)
            self.rate = max(self.rate, (admitted - doubt) / seconds)
        elif abs(error) <= doubt:
            self._spans.append((seconds, admitted, number))
            self._forget(cost)
            self.rate = max(sum(span[1] for span in self._spans), cost) / sum(span[0] for span in self._spans)
            if self._patience is not None:
                self._patience = 2.0 * self._patience if self._patience < PATIENCE_MOST else None
        else:
            self._spans.clear()
            if climb is not None and error > 0.0:
                # The pace was too low, so the bucket may have been full when the climb began.
                climbing, climbed = mark.at - climb[0] + PRIOR_SECONDS, admitted - climb[1]
                told = max(admitted / seconds, climbed / climbing)
            else:
                told = (admitted + (doubt if error < 0.0 else -doubt)) / seconds
            if told < FALLEN * self.rate:
                self._patience = PATIENCE
            elif error > 0.0:
                self._patience = None
            self.rate = max(told, 0.2 * self.rate, SLOWEST)
            self._cycle = CYCLE_LEAST
        scatter = min(max(0.0, error**2 / cost**2 - EDGE) / worth, (2.0 * self._scatter) ** 2)
        mean_square = self._scatter**2 + SCATTER_GAIN * (scatter - self._scatter**2)
        self._scatter = min(max(sqrt(mean_square), SCATTER_LEAST), SCATTER_MOST)
        if long and abs(error) <= doubt:
            self._cycle = min(CYCLE, 2.0 * self._cycle)
        self._ruler_holds = True

    def _forget(self, cost: float) -> None:
        """Keep as many of the latest measurements as `MEMORY` calls, and as agree: several may together be too far
        from the estimate that each alone is near enough to."""
        assert self.rate is not None
        seconds = admitted = 0.0
        calls = 0
        for number, span in enumerate(reversed(self._spans), 1):
            seconds, admitted, calls = seconds + span[0], admitted + span[1], calls + span[2]
            doubt = cost * (EDGE + 3.0 * self._scatter * sqrt(max(1.0, self.rate * seconds / cost)))
            if calls > MEMORY or abs(admitted - self.rate * seconds) > doubt:
                self._spans = deque(list(self._spans)[-number:])
                return

    @property
    def _reserve(self) -> float:
        """Calls that should be left at the provider."""
        return max(2.0, 1.5 * self._scatter * sqrt(CYCLE) - 2.0)

    def _choose_pace(self, now: float) -> float:
        """Units per second until the next call."""
        assert self.rate is not None
        if self._climb is not None:
            return self.rate * exp2(min(60.0, (now - self._climb[0]) / CLIMB_SECONDS))
        saved, calls, mean = self.saved(now), self._journal.calls - self._anchor_calls, self._mean()
        if saved > FULL_SECONDS * self.rate:
            self._anchor_at += saved / self.rate - FULL_SECONDS
            self._ruler_holds = False
        unexplained = -saved - mean * (EDGE + max(4.0, 3.0 * self._scatter * sqrt(calls)))
        if not self._ruler_holds:
            unexplained -= FULL_SECONDS * self.rate
        is_over = self._patience is not None and now - self._known_at > self._patience and now > self._gentle_until
        if unexplained > 0.0 or is_over:
            self._climb = now, self._admitted()
            return self.rate
        if calls > self._cycle and now > self._gentle_until:
            known = sum(span[2] for span in self._spans) + 1.0
            return self.rate * (1.0 + min(PROBE_MOST, max(PROBE, (EDGE + 3.0 * self._scatter * sqrt(known)) / known)))
        goal = mean * (self._reserve + (1.0 - RUN) * calls)
        urge = (saved - goal) / (self.rate * CATCH_UP_SECONDS)
        return self.rate * min(CATCH_UP, max(0.9, 1.0 + urge))

    def _mean(self) -> float:
        """Units of a call, on average."""
        return self.units(self._journal.calls, self._journal.sums) / max(1, self._journal.calls)

    def _admitted(self) -> float:
        """Units let through since the anchor."""
        refunded = sum(cost for _, cost in self._refunds)
        return self.units(self._journal.calls, self._journal.sums) - self._anchor_total - refunded

    def units(self, calls: int, x: Features) -> float:
        """So many calls whose features sum to `x`, in units."""
        return x[0] * SCALE + calls if self._tokens else float(calls)
