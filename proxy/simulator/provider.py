"""A provider with real limits, as a pure machine: no clock, no I/O, no waiting.

    arrive(now, size) -> Admitted (a place in flight, a pace, perhaps a fault) | Refused (status, headers, body)
    leave(admitted, now)                                                        the place is given back

It runs in whatever time the caller tells it: virtual in a benchmark, the event loop's under the HTTP server.

1. Time: `now` is in seconds and never goes back; periods and changes of the profile count from `started`.
2. Checks, in this order: outage, money, slow_down, concurrency, then each limit. The first that says no refuses.
3. All limits are charged together or, on a refusal, none (unless the profile charges refused calls). A call that then
   fails with a 5xx was charged.
4. Chance: each arrival draws the same numbers in the same order whatever is decided about it, and other clients'
   calls draw from a generator of their own. One profile, one seed and the same arrivals are the same run.
5. Other clients' calls wait their turn ahead of ours: where there is nothing left they are charged all the same, and
   the limit must first fill up to nothing again. They give up where they would wait for as long as a whole limit takes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from math import exp, inf, log
from random import Random
from typing import NamedTuple

from proxy.simulator import wording
from proxy.simulator.meter import Bucket, Meter, Window
from proxy.simulator.profile import Change, Period, Profile, Style

_MINUTE = 60.0
_DAY = 86400.0
EPOCH = 1_750_000_000.0  # the wall clock at time 0 unless told; any fixed date will do


class Fault(Enum):
    """What goes wrong with a call that was admitted."""

    RESET = "reset"  # the connection is reset before the first byte
    STALL = "stall"  # silence in the middle
    CUT = "cut"  # a clean end in the middle
    ABORT = "abort"  # the connection breaks in the middle
    ERROR_EVENT = "error_event"  # an error told in the middle


@dataclass(slots=True, frozen=True)
class Size:
    """What a call weighs: characters of prompt text, and the output it asks for at most."""

    characters: int = 0
    max_tokens: int | None = None

    @property
    def input_tokens(self) -> int:
        return max(1, self.characters // 4)


@dataclass(slots=True, eq=False)
class Admitted:
    """A call in flight. Nothing changes any more: pace, length and fault are decided on arrival. (To be frozen would
    cost 3 us a call, a quarter of `arrive`.)"""

    number: int  # of the arrival, from 1
    headers: dict[str, str]
    first_token: float  # seconds from arrival to the first token
    tokens_per_second: float  # may be infinite
    input_tokens: int
    output_tokens: int  # >= 1
    capped: bool  # whether max_tokens ended the output
    charged: float  # tokens taken from the limit
    fault: Fault | None
    fault_after: int  # output tokens that pass before the fault; >= 1

    @property
    def seconds(self) -> float:
        """From arrival to the last token, faults aside."""
        return self.first_token + self.output_tokens / self.tokens_per_second


@dataclass(slots=True, frozen=True, eq=False)
class Refused:
    number: int
    status: int
    headers: dict[str, str]
    body: dict[str, object]
    scope: str  # requests, tokens, too_large, concurrency, money, slow_down, outage, error: the key in `Stats.refused`
    wait: float | None  # seconds until it would be admitted if nobody else came; None where waiting has no known end


class _Drawn(NamedTuple):
    charge: float
    first_token: float
    output: float
    failed: bool = False
    fault: Fault | None = None
    where: float = 0.0  # of the fault, in [0, 1)


@dataclass(slots=True)
class Stats:
    """What happened so far. `refused` counts by scope; tokens are those charged, not those produced."""

    arrived: int = 0
    admitted: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    tokens_charged: float = 0.0
    in_flight: int = 0
    peak_in_flight: int = 0
    cross_admitted: int = 0
    cross_given_up: int = 0
    cross_tokens: float = 0.0

    @property
    def refusals(self) -> int:
        """For limits of any kind, overload among them; without outages and errors."""
        return sum(count for scope, count in self.refused.items() if scope not in ("outage", "error"))


class Provider:
    """See the module's rules.

    Args:
        profile: what it is like.
        seed: of all chance.
        started: the first `now`; periods, changes and windows count from here.
        epoch: the wall clock (seconds since 1970) at now = 0, for headers that carry dates.

    `outage`, `out_of_money` and `slow_down` may be assigned while it runs: `ALWAYS`, None, or a period.
    """

    def __init__(self, profile: Profile, seed: int = 0, *, started: float = 0.0, epoch: float = EPOCH) -> None:
        self.profile = profile
        self.stats = Stats()
        self.outage = profile.outage
        self.out_of_money = profile.out_of_money
        self.slow_down = profile.slow_down
        self.style = profile.style
        self._started = started
        self._epoch = epoch
        self._in_flight: set[int] = set()
        self._random = Random(seed)
        self._cross_random = Random(f"cross {seed}")
        self._lies = dict(profile.lies)
        self._meters: list[Meter] = []
        self._daily: Meter | None = None
        self._put_up_meters()
        self._shown = self._choose_shown()

        self._changes = list(reversed(profile.changes))
        self._next_cross = self._cross_pause()
        self._next_event = 0.0

        self._output_median = profile.output_tokens / exp(profile.output_sigma**2 / 2)  # the mean is what is given
        self._trouble: list[tuple[float, Fault | None]] = []  # up to which draw; None: a 5xx
        limit = 0.0
        for rate, fault in (
            (profile.error_rate, None),
            (profile.reset_rate, Fault.RESET),
            (profile.stall_rate, Fault.STALL),
            (profile.cut_rate, Fault.CUT),
            (profile.abort_rate, Fault.ABORT),
            (profile.error_event_rate, Fault.ERROR_EVENT),
        ):
            limit += rate
            if rate > 0:
                self._trouble.append((limit, fault))

    def __repr__(self) -> str:
        return f"<Provider {self.style.value} {self.stats}>"

    def arrive(self, now: float, size: Size, model: str = "gpt-4o-mini") -> Admitted | Refused:
        """Decide about one call. What is admitted must `leave` exactly once."""
        self.stats.arrived += 1
        number = self.stats.arrived
        elapsed = now - self._started
        if elapsed >= self._next_event:
            self._catch_up(elapsed)
        drawn = self._draw(size)
        for meter in self._meters:
            meter.advance(now)
        refusal = self._refusal_by_switch(number, now) or self._refusal_by_limit(number, now, drawn.charge, model)
        if refusal is not None:
            return refusal
        self._charge(drawn.charge)
        self.stats.tokens_charged += drawn.charge
        if drawn.failed:
            return self._refuse(number, now, "error", self.profile.error_status, wording.broken(self.style))
        return self._admit(number, now, size, drawn)

    def leave(self, admitted: Admitted, now: float) -> None:
        """Give the place back: the answer ended, broke, or its client left.

        Raises:
            KeyError: it has left already.
        """
        self._in_flight.remove(admitted.number)
        self.stats.in_flight = len(self._in_flight)

    def levels(self, now: float) -> dict[str, int]:
        """What is left of each limit, `requests` (of the minute) and `tokens`, for tests and live tables."""
        if now - self._started >= self._next_event:
            self._catch_up(now - self._started)
        for meter in self._meters:
            meter.advance(now)
        return {meter.dimension: meter.remaining for meter in self._meters if meter is not self._daily}

    def _put_up_meters(self) -> None:
        profile, started = self.profile, self._started
        for dimension, each_minute, burst in (
            ("requests", profile.requests_per_minute, profile.requests_burst),
            ("tokens", profile.tokens_per_minute, profile.tokens_burst),
        ):
            if each_minute is None:
                continue
            if profile.window_seconds is not None:
                span = profile.window_seconds
                self._meters.append(Window(dimension, each_minute * span / _MINUTE, span, period=_MINUTE, now=started))
            else:
                full = each_minute if burst is None else burst
                span = full / each_minute * _MINUTE if each_minute > 0 else _MINUTE
                self._meters.append(
                    Bucket(dimension, full if each_minute > 0 else 0.0, span, period=_MINUTE, now=started)
                )
        if profile.requests_per_day is not None:
            self._daily = Bucket("requests", profile.requests_per_day, _DAY, period=_DAY, now=started)
            self._meters.append(self._daily)

    def _choose_shown(self) -> wording.Shown:
        """Headers tell of one limit per dimension: Groq's requests are the day's, everybody else's the minute's."""
        shown: dict[str, Meter] = {}
        for meter in self._meters:
            if meter.dimension not in shown or (meter is self._daily and self.style is Style.GROQ):
                shown[meter.dimension] = meter
        return tuple(shown.items())

    def _cost(self, meter: Meter, charge: float) -> float:
        return charge if meter.dimension == "tokens" else 1.0

    def _charge(self, charge: float) -> None:
        for meter in self._meters:
            meter.take(self._cost(meter, charge))

    def _draw(self, size: Size) -> _Drawn:
        """All chance of one arrival. What is drawn depends on the profile alone, never on the decision."""
        profile, random = self.profile, self._random
        charge = (size.characters / 4 + profile.max_tokens_weight * (size.max_tokens or 0)) * profile.charge_factor
        if profile.charge_noise:
            charge *= 1.0 + profile.charge_noise * (2.0 * random.random() - 1.0)
        first = profile.first_token_seconds
        if profile.first_token_sigma:
            first *= exp(random.gauss(0.0, profile.first_token_sigma))
        output = self._output_median
        if profile.output_sigma:
            output *= exp(random.gauss(0.0, profile.output_sigma))
        if not self._trouble:
            return _Drawn(max(1.0, charge), first, output)
        which, where = random.random(), random.random()
        for limit, fault in self._trouble:
            if which < limit:
                return _Drawn(max(1.0, charge), first, output, fault is None, fault, where)
        return _Drawn(max(1.0, charge), first, output)

    def _admit(self, number: int, now: float, size: Size, drawn: _Drawn) -> Admitted:
        profile, stats = self.profile, self.stats
        self._in_flight.add(number)
        stats.admitted += 1
        stats.in_flight = busy = len(self._in_flight)
        stats.peak_in_flight = max(stats.peak_in_flight, busy)
        if drawn.fault is not None:
            stats.faults[drawn.fault.value] = stats.faults.get(drawn.fault.value, 0) + 1
        slower = max(1.0, busy / profile.knee) if profile.knee is not None else 1.0
        wanted = max(1, round(drawn.output))
        tokens = wanted if size.max_tokens is None else max(1, min(wanted, size.max_tokens))
        first = drawn.first_token + size.input_tokens / profile.prompt_tokens_per_second
        return Admitted(
            number=number,
            headers=self._limit_headers(now),
            first_token=first * slower / profile.speed,
            tokens_per_second=profile.tokens_per_second * profile.speed / slower,
            input_tokens=size.input_tokens,
            output_tokens=tokens,
            capped=tokens < wanted,
            charged=drawn.charge,
            fault=drawn.fault,
            fault_after=1 + int(drawn.where * (tokens - 1)),
        )

    def _refusal_by_switch(self, number: int, now: float) -> Refused | None:
        profile, style, elapsed = self.profile, self.style, now - self._started
        if _within(self.outage, elapsed):
            return self._refuse(number, now, "outage", profile.error_status, wording.broken(style))
        if _within(self.out_of_money, elapsed):
            return self._refuse(number, now, "money", 429, wording.no_money(style))
        if _within(self.slow_down, elapsed):
            return self._refuse(number, now, "slow_down", 429, wording.too_steep(style))
        if profile.concurrency is not None and len(self._in_flight) >= profile.concurrency:
            return self._refuse(number, now, "concurrency", *wording.overloaded(style))
        return None

    def _refusal_by_limit(self, number: int, now: float, charge: float, model: str) -> Refused | None:
        for meter in self._meters:
            cost = self._cost(meter, charge)
            if meter.wait(cost) == 0.0:
                continue
            if meter.dimension == "tokens" and cost > meter.limit:
                body = wording.too_large(self.style, meter, model=model, cost=cost)
                return self._refuse(number, now, "too_large", 429, body)
            if self.profile.charge_refused:
                for each in self._meters:
                    each.drain(self._cost(each, charge))
            wait = meter.wait(cost)
            body = wording.limit_reached(self.style, meter, model=model, cost=cost, wait=wait)
            return self._refuse(number, now, meter.dimension, 429, body, wait)
        return None

    def _refuse(
        self, number: int, now: float, scope: str, status: int, body: dict[str, object], wait: float | None = None
    ) -> Refused:
        self.stats.refused[scope] = self.stats.refused.get(scope, 0) + 1
        headers = self._limit_headers(now)
        headers.pop("retry-after", None)
        if wait is not None and self.profile.retry_after:
            headers |= wording.retry_headers(self.style, wait)
            headers = wording.with_lies(headers, self._lies)
        return Refused(number, status, headers, body, scope, wait)

    def _limit_headers(self, now: float) -> dict[str, str]:
        wall = self._epoch + now
        headers = wording.limit_headers(self.style, self._shown, wall=wall, stuck=self.profile.remaining_stuck)
        return wording.with_lies(headers, self._lies) if self._lies else headers

    def _catch_up(self, elapsed: float) -> None:
        """Live through the changes and the other clients' calls since the last arrival, in order of time."""
        while True:
            change_at = self._changes[-1].at if self._changes else inf
            self._next_event = min(change_at, self._next_cross)
            if self._next_event > elapsed:
                return
            if change_at <= self._next_cross:
                self._change(self._changes.pop())
            else:
                self._cross(self._next_cross)
                self._next_cross += self._cross_pause()

    def _change(self, change: Change) -> None:
        for meter in self._meters:
            meter.advance(self._started + change.at)
            meter.scale(change.factor)
        if change.style is not None:
            self.style = change.style
            self._shown = self._choose_shown()

    def _cross(self, elapsed: float) -> None:
        """[5]"""
        mean = self.profile.cross_tokens
        charge = mean * -log(1.0 - self._cross_random.random()) if mean else 1.0
        for meter in self._meters:
            meter.advance(self._started + elapsed)
        if any(meter.wait(self._cost(meter, charge)) >= meter.span for meter in self._meters):
            self.stats.cross_given_up += 1
            return
        self._charge(charge)
        self.stats.cross_admitted += 1
        self.stats.cross_tokens += charge

    def _cross_pause(self) -> float:
        rate = self.profile.cross_requests_per_minute / _MINUTE
        return self._cross_random.expovariate(rate) if rate > 0 else inf


def _within(period: Period | None, elapsed: float) -> bool:
    return period is not None and period[0] <= elapsed < period[1]
