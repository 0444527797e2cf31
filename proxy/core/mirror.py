"""A local mirror of one limit of a provider, kept true by the headers of its answers.

An answer tells the level right after its own call was charged, but it comes late: since then we have sent others. So
the mirror reckons from a reference: the level after one call that was answered, plus the refill since, less what the
calls sent after that one are charged. The reference moves to ever newer calls as they are answered. How much of an
answer is believed is Kalman's: it depends on how sure the mirror is, and how sure the answer.

Rules
-----
1. The mirror believes in no level higher than one it has seen; a provider whose bucket is smaller than the limit it
   tells is found out before it is overrun.
2. Where the level falls by more than our calls explain, others use the limit too: the mean of what they take is
   learned, and how it scatters.
3. Calls overtake each other on the way, so an answer is as unsure as what was sent within `JITTER` of its call: those
   before it may not have been charged yet, those after it already.
4. It keeps a margin of `SIGMAS` for what it cannot know: the level at the reference, the charges of the calls since,
   the rounding of `remaining`. The margin grows with each refusal it did not foresee, and shrinks again.
5. A full bucket of tokens is not drained in one instant, but spread a little: what a call is charged is known from the
   answers, and those to calls sent all at once tell nothing.
6. After a refusal calls leave one by one, at the limit's pace, until it is clear that there is room.
"""

from __future__ import annotations

from math import inf, sqrt

from proxy.core.bucket import EARLY, SLOWEST, Bucket
from proxy.core.charge import Charge
from proxy.core.headers import CONVENTIONAL, Kind, Reading
from proxy.core.journal import JITTER, NOTHING, Count, Features, Journal, Mark, less

WINDOW = 60.0  # seconds; the window nearly every provider means, until the law of the header tells
OVERTAKING = 0.3  # of what was sent within JITTER, as a standard deviation: uniform would be 1 / sqrt(12)
DRIFT = 0.01  # units squared by which the variance of the level grows with each answer
OTHERS_SECONDS = 20.0  # over which it is learned how much others take from the limit
OTHERS_MOST = 0.95  # of the limit
SCATTER_GAIN = 0.05  # of the newest excess of an error's square, in their mean
SIGMAS = 4.0
SURPRISE = 1.5  # factor of the margin after a refusal that was not foreseen
SURPRISE_MAX = 20.0
CALM = 0.999  # factor of that factor, with each answer
MARGIN_MAX = 0.9  # of the bucket
SURE = 0.15  # of a call's charge, that the doubt about its weights may be
SURE_AFTER = 8  # observations
SPAN = 2.0  # times its doubt, that a difference between two answers must be to teach the charge
PACE = 1.0  # of the limit, at which calls leave after a refusal
PACE_GROWTH = 2.0  # times the rate of the last minute, if that is less: the limit may be told wrong
PACED_SECONDS = 60.0
SPREAD_SECONDS = 5.0  # over which a full bucket of tokens is drained at the quickest, beside what flows back ...
SPREAD_CALLS = 8.0  # ... but for so many calls at once
SPREAD_SHARE = 0.02  # ... or this much of it


class Mirror:
    """
    Args:
        reading: the first that told this limit; its `limit` is not None.
        mark: of the call it answers.
        journal: in which that and all others stand.
        now: seconds, monotonic.

    Attributes:
        limit, window: units, and the seconds in which they flow back.
        rate: units per second.
        burst: the highest level seen.
    """

    def __init__(self, reading: Reading, mark: Mark, journal: Journal, now: float) -> None:
        assert reading.limit is not None
        self.limit = reading.limit
        self.window = reading.window_seconds if reading.window_seconds in CONVENTIONAL else WINDOW
        self.rate = max(self.limit / self.window, SLOWEST)
        self._charge = None if reading.kind is Kind.REQUESTS else Charge(of_output=reading.kind is Kind.OUTPUT_TOKENS)
        level = self.limit if reading.remaining is None else reading.remaining
        self.burst = max(level, 1.0)
        self._grain = 1000.0 if self._charge is not None and level % 1000.0 == 0.0 else 1.0

        self._journal = journal
        # The reference: the level after `_ref_calls` calls, at `_ref_at`.
        self._ref_at, self._ref_level, self._ref_calls, self._ref_sums = mark.at, level, mark.calls, mark.sums
        self._spent: float | None = None  # units charged for the calls since; None: to be reckoned anew
        self._variance = self._doubt_of(self._around(mark))  # of that level
        self._others = 0.0  # units per second that others take from the limit
        self._scatter = 0.0  # units squared by which their taking scatters, per second
        self._ignored = 0  # answers to calls up to here are older than what is known from elsewhere

        self._margin: float | None = None  # None: to be reckoned anew
        self._surprise = 1.0
        self._odd: tuple[float, float, float] | None = None  # another window told, at what was spent, and when
        # An answered call, what was left after it, and what was charged for those around it.
        self._observed: tuple[Mark, float, float] | None = None
        self._pace: Bucket | None = None
        self._pace_most = 0.0
        self._heard_at = -inf  # when the last refusal was heard of
        self._paced_until = 0.0
        self._drained_at = now  # rule 5: when the calls so far would have left, spread evenly ...
        self._ahead = 0.0  # ... and by so many seconds they may be earlier

    def cost(self, x: Features) -> float:
        """What a call will be charged."""
        return 1.0 if self._charge is None else self._charge.of(x)

    def level(self, now: float) -> float:
        """Units left at the provider, as far as it is known."""
        level = self._reckoned(now)
        return level if level < self.burst else self.burst

    @property
    def _flow(self) -> float:
        """Units per second that flow back for us."""
        return self.rate - self._others

    def wait(self, x: Features, now: float) -> float:
        """Seconds until a call fits, with the margin beside it."""
        level, seconds = self._reckoned(now), 0.0
        if level > self.burst:
            level = self.burst
        cost = 1.0 if self._charge is None else self._charge.of(x)
        if level < cost + MARGIN_MAX * self.burst:  # else there is room, whatever the margin
            if self._margin is None:
                self._margin = self._reckon_margin(now)
            lacking = min(cost + self._margin, self.burst) - level
            seconds = lacking / self._flow if lacking > 0.0 else 0.0
        if self._charge is not None and (spread := self._drained_at - self._ahead - now) > seconds:
            seconds = spread
        if self._pace is not None:
            if now > self._paced_until or level > 0.9 * max(self.limit, 1.0):
                self._pace = None
            else:
                seconds = max(seconds, self._pace.wait(0.0, now))
        return seconds if seconds > EARLY else 0.0

    def is_sure(self, x: Features) -> bool:
        """Whether it knows well enough what a call is charged."""
        charge = self._charge
        return charge is None or (charge.seen >= SURE_AFTER and charge.variance_of(x, 0) < (SURE * charge.of(x)) ** 2)

    def take(self, x: Features, now: float) -> None:
        """A call leaves; before it is written into the journal."""
        burst, charge = self.burst, self._charge
        if self._reckoned(now) > burst:
            self._refer(burst, now)  # it was full; what would have flowed in is lost
        self._margin = None
        cost = 1.0 if charge is None else charge.of(x)
        if self._pace is not None:
            self._pace.take(cost, now)
        if charge is not None:
            self._spent = self._charged() + cost
            rate = self.rate + burst / SPREAD_SECONDS
            self._drained_at = (now if now > self._drained_at else self._drained_at) + cost / rate
            self._ahead = max(SPREAD_CALLS * cost, SPREAD_SHARE * burst) / rate

    def read(self, reading: Reading, mark: Mark, now: float, *, refused: bool = False) -> bool:
        """Correct by an answer; True where the limit itself changed."""
        _, limit, remaining, _, window, _ = reading
        if limit is None:
            limit = self.limit
        if window is None or abs(window - self.window) <= 0.05 * self.window:
            self._odd, window = None, self.window
        else:
            window = self._believe_window(window, 0.0 if remaining is None else limit - remaining, now)
        changed = limit != self.limit or window != self.window
        if changed:
            level = self.level(now)
            self.limit, self.window, self.burst = limit, window, max(1.0, min(self.burst, limit))
            self.rate = max(limit / window, SLOWEST)
            self._others = min(self._others, OTHERS_MOST * self.rate)
            self._refer(min(level, limit), now, keep=True)
            if self._pace is not None:
                self._pace.change(min(PACE * self.rate, self._pace_most), 0.0, now)
        if remaining is None or refused:
            return changed
        if self.burst < limit:
            self.burst = max(self.burst, min(limit, remaining + self.cost(mark.features)))
        if self._surprise > 1.0:
            self._surprise = max(1.0, self._surprise * CALM)
        around = self._around(mark)
        if self._charge is not None:
            self._learn_charge(self._charge, mark, remaining, around)
        if mark.calls > self._ignored:
            self._believe(mark, remaining, self._doubt_of(around))
        return changed

    def explains(self, mark: Mark, remaining: float | None, now: float) -> bool:
        """Whether a refusal that told `remaining` was to be expected: there was no room for the call, or hardly any."""
        cost = self.cost(mark.features)
        if remaining is not None:
            return remaining < 1.5 * cost + self._grain
        return self.level(now) < cost + self._reckon_margin(now) + 0.05 * self.limit

    def refused(self, mark: Mark, remaining: float | None, hold: float, ours: bool, now: float) -> None:
        """A call was refused, so it was not charged.

        Args:
            remaining: what its headers told.
            ours: it was refused for this limit; the next call fits after `hold` seconds.
        """
        self._observed = None
        if ours:
            self._refer(min(self.level(now), 0.0 if remaining is None else remaining), now)
            self._paced_until = max(self._paced_until, now + hold + PACED_SECONDS)
            if mark.at < self._heard_at:
                return  # it was on its way when the last one was heard of: the same refusal once more
            self._heard_at = now
            if self._pace is None:
                self._surprise = min(SURPRISE_MAX, self._surprise * SURPRISE)
            lately = self._of(self._sent_since(self._journal.before(now - WINDOW))) / WINDOW
            self._pace_most = max(PACE_GROWTH * lately, self.cost(mark.features))
            self._pace = Bucket(min(PACE * self.rate, self._pace_most), 0.0, now)
        elif mark.calls > self._ref_calls:
            cost = self.cost(mark.features)
            self._refer(min(self.burst, self.level(now) + cost), now, keep=True)
            self._variance += cost**2

    def _refer(self, level: float, now: float, *, keep: bool = False) -> None:
        """Reckon from here: `level` is left now. `keep`: answers still to come may correct it."""
        self._variance += self._doubt_since()
        journal = self._journal
        self._ref_at, self._ref_level, self._ref_calls, self._ref_sums = now, level, journal.calls, journal.sums
        self._margin = self._spent = None
        if not keep:
            self._ignored = journal.calls

    def _reckoned(self, now: float) -> float:
        """The level, were there no brim."""
        spent = self._spent if self._spent is not None else self._charged()
        return self._ref_level + (self.rate - self._others) * (now - self._ref_at) - spent

    def _charged(self) -> float:
        """Units charged for the calls since the reference."""
        if self._charge is None:
            return float(self._journal.calls - self._ref_calls)
        if self._spent is None:
            self._spent = self._of(self._sent_since((self._ref_calls, self._ref_sums)))
        return self._spent

    def _doubt_since(self) -> float:
        """The variance of that."""
        if self._charge is None or self._journal.calls == self._ref_calls:
            return 0.0
        return self._charge.variance_of(less(self._journal.sums, self._ref_sums), self._journal.calls - self._ref_calls)

    def _sent_since(self, then: Count) -> Count:
        return self._journal.calls - then[0], less(self._journal.sums, then[1])

    def _of(self, count: Count) -> float:
        """Units charged for so many calls; of less than none, it is negative."""
        calls, sums = count
        if self._charge is None or not calls:
            return float(calls)
        return self._charge.of(sums) if calls > 0 else -self._charge.of(less(NOTHING, sums))

    def _around(self, mark: Mark) -> float:
        """Units charged for calls sent within JITTER of one."""
        if self._charge is None:
            return float(self._journal.calls_around(mark))
        return self._of(self._journal.around(mark))

    def _doubt_of(self, around: float) -> float:
        """The variance of what an answer tells of the level, by what was charged for the calls around its own."""
        return (OVERTAKING * around) ** 2 + self._grain**2

    def _reckon_margin(self, now: float) -> float:
        variance = self._variance + self._doubt_since() + self._scatter * (now - self._ref_at)
        doubt = SIGMAS * sqrt(variance) + self._grain + JITTER * self.rate
        return min(doubt * self._surprise, MARGIN_MAX * self.burst)

    def _believe(self, mark: Mark, remaining: float, doubt: float) -> None:
        """Correct the reference, or move it to a newer call; learn what others take.

        Source: Kalman, "A New Approach to Linear Filtering", 1960; the state is the level after the reference's call.
        """
        calls, between, charge = mark.calls - self._ref_calls, 0.0, float(mark.calls - self._ref_calls)
        if self._charge is not None and calls:
            sums = less(mark.sums, self._ref_sums)
            between, charge = self._charge.variance_of(sums, abs(calls)), self._of((calls, sums))
        seconds = mark.at - self._ref_at
        expected = self._ref_level + self._flow * seconds - charge
        error = remaining - expected
        prior = self._variance + DRIFT
        if calls > 0:
            prior += between + (self._scatter * seconds if seconds > 0.0 else 0.0)
        else:
            doubt += between + (self._scatter * -seconds if seconds < 0.0 else 0.0)
        square = error * error
        if calls > 0 and seconds > 0.0:
            per_second = (square - prior - doubt) / max(seconds, 1.0 / self.rate)
            scatter = self._scatter + SCATTER_GAIN * min(per_second, 1.0 + 3.0 * self._scatter)
            self._scatter = scatter if scatter > 0.0 else 0.0
        if square > SIGMAS**2 * (prior + doubt):  # others use the limit too, or it is another one now
            prior += square / SIGMAS
        gain = prior / (prior + doubt)
        correction = gain * error
        self._variance = (1.0 - gain) * prior
        self._margin = None
        if calls > 0:
            others = self._others - correction / OTHERS_SECONDS
            self._others = min(others, OTHERS_MOST * self.rate) if others > 0.0 else 0.0
            self._ref_at, self._ref_calls, self._ref_sums = mark.at, mark.calls, mark.sums
            self._ref_level, self._spent = expected + correction, None
        else:
            self._ref_level += correction

    def _learn_charge(self, charge: Charge, mark: Mark, remaining: float, around: float) -> None:
        """Between two answers `remaining` fell by what was charged, less the refill."""
        if not 0.0 < remaining < 0.985 * self.burst or mark.calls <= self._ignored:
            self._observed = None  # a full bucket hides what flowed back, an empty one what was owed
            return
        if self._observed is None:
            self._observed = mark, remaining, around
            return
        then, left, around_then = self._observed
        calls, x = mark.calls - then.calls, less(mark.sums, then.sums)
        doubt = 0.5 * (around + around_then) + self._grain
        if not calls or abs(self._of((calls, x))) < SPAN * doubt:
            return
        self._observed = mark, remaining, around
        charged = left - remaining + self.rate * (mark.at - then.at)
        if calls < 0:
            calls, charged, x = -calls, -charged, less(NOTHING, x)
        charge.learn(x, charged, calls, doubt)
        self._margin = self._spent = None

    def _believe_window(self, told: float, spent: float, now: float) -> float:
        """Another window than the one believed in counts when two answers agree on it that tell of different levels,
        or, if it is a conventional one, at different times: rounding, fixed windows and lies can fake one."""
        if self._odd is None or abs(told - self._odd[0]) > 0.05 * told:
            self._odd = told, spent, now
            return self.window
        _, before, since = self._odd
        if max(spent, before) > 1.3 * min(spent, before) or (told in CONVENTIONAL and now - since > 2.0):
            self._odd = None
            return told
        return self.window
