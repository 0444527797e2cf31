"""What are this upstream's limits, and may a call of this size be sent now?

One learner stands for one account: a credential and a model, or a configured pool. The gate asks `wait` and, at 0.0,
takes; then the attempt tells what became of it: `answered`, `refused` or `failed`, and at its end, always, `settle`.

What is believed of a limit comes from the best teacher there is: the headers of answers (`core.mirror`); else refusals.
What the configuration says is a ceiling above all of them.

Rules
-----
1. A configured ceiling is never exceeded by the learner's own count, whatever the provider says.
2. `wait` is finite and >= 0 after any history. While calls are sent and told about, one is let out at least every 60 s,
   or after the provider's own word (rule 3), whatever the headers claim; only a ceiling can be slower.
3. A refusal holds its limit for everybody, until the provider's own word; then calls leave at the limit's pace.
4. Of an upstream of which nothing is known, 8 calls are sent, and two more for each that is answered. The first answer
   that tells its limits ends this; a refusal begins it anew with one call.
5. Two ledgers: the provider's (what it charges, mirrored) and the caller's (what was used). In the caller's,
   reservations less refunds are what was used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from proxy.core.bucket import Bucket
from proxy.core.headers import Kind, Reading
from proxy.core.mirror import Mark, Mirror
from proxy.core.outcome import Meaning, Reason
from proxy.core.usage import Usage

COLD_CALLS = 8  # sent to an upstream of which nothing is known
CEILING_SECONDS = 6.0  # the burst of a configured rate: 500 a minute let 50 go at once
UNKNOWN_SECONDS = 60.0  # the longest silence towards an upstream that did not ask for it
WORD_MAX = 60.0  # seconds; a retry-after beyond is believed only for limits whose window is longer
FIRST_HOLD = 1.0  # seconds, after a refusal that does not say when to come back; doubles up to UNKNOWN_SECONDS
ASK_AGAIN = 0.05  # seconds; when only an answer can let the next one out, and nobody knows when it comes
CHANGES_KEPT = 256


class Source(Enum):
    """Where a limit is known from."""

    CONFIGURED = "configured"
    HEADERS = "headers"
    REFUSALS = "refusals"
    WINDOW = "window"
    COLD_START = "cold start"


@dataclass(slots=True, frozen=True)
class Size:
    """What a call will weigh, as far as it is known beforehand."""

    requests: int = 1
    input_tokens: float = 0.0  # estimated: characters / 4
    max_tokens: int | None = None
    model: str = ""


@dataclass(slots=True, frozen=True)
class Change:
    """A limit became another one."""

    at: float  # monotonic seconds
    limit: str
    per_minute: float
    before: float | None  # per minute; None: it was not known
    source: Source
    cause: str  # header, refusal, configuration


@dataclass(slots=True, frozen=True)
class Limit:
    """One limit at one instant."""

    name: str
    kind: Kind
    source: Source
    per_minute: float
    burst: float
    level: float
    hold_seconds: float
    since: float  # monotonic seconds; when it became what it is
    changes: int


@dataclass(slots=True, frozen=True)
class Snapshot:
    source: Source  # of the scarcest knowledge: COLD_START while no limit is known
    limits: tuple[Limit, ...]
    hold_seconds: float
    cold_calls: float | None  # calls that may be unanswered at once; None: no longer bounded by the cold start
    unanswered: int
    reserved: float  # tokens reserved by calls that have not ended
    used: float  # tokens used by calls that have


@dataclass(slots=True, eq=False)
class Reservation:
    """What one attempt took; handed back to the learner with each piece of news."""

    size: Size
    taken_at: float
    charged: dict[Kind, float]  # the sum of everything charged per kind, this call among it
    marks: dict[str, Mark]  # by name of limit
    tokens: float  # reserved in the caller's ledger
    told: bool = False  # an answer, refusal or failure came
    refused: bool = False
    settled: bool = False


@dataclass(slots=True)
class _Learned:
    """One limit the provider told."""

    name: str
    kind: Kind
    mirror: Mirror
    since: float
    changes: int = 0


@dataclass(slots=True)
class _Hold:
    """How long nobody may be sent because of one reason, and how long it may be next time without a word."""

    until: float = 0.0
    next_seconds: float = FIRST_HOLD


class Learner:
    """
    Args:
        requests_per_minute, tokens_per_minute: configured ceilings, > 0; None: none.
        learn: False: only the ceilings and the holds count.
    """

    def __init__(
        self,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        learn: bool = True,
        now: float = 0.0,
    ) -> None:
        self.changes: list[Change] = []  # drained by whoever tells them
        self._learn = learn
        self._ceilings: dict[Kind, Bucket] = {}
        self._limits: dict[str, _Learned] = {}
        self._holds: dict[Reason, _Hold] = {}
        self._charged = dict.fromkeys(Kind, 0.0)
        self._cold: float | None = COLD_CALLS if learn else None
        self._unanswered = 0
        self._output = 0.0  # mean output tokens of late, for calls that set no bound
        self._reserved = 0.0
        self._used = 0.0
        self._seen = now
        self.configure(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, learn=learn)

    def configure(self, *, requests_per_minute: float | None, tokens_per_minute: float | None, learn: bool) -> None:
        """Take other ceilings; the levels stay, and so does what was learned."""
        self._learn = learn
        if not learn:
            self._cold = None
        for kind, per_minute in ((Kind.REQUESTS, requests_per_minute), (Kind.TOKENS, tokens_per_minute)):
            if per_minute is None:
                self._ceilings.pop(kind, None)
                continue
            rate = per_minute / 60.0
            burst = max(1.0, rate * CEILING_SECONDS)
            if (bucket := self._ceilings.get(kind)) is None:
                self._ceilings[kind] = Bucket(rate, burst, self._seen)
            else:
                bucket.change(rate, burst, self._seen)

    # ── the gate's side ──

    def wait(self, size: Size, now: float) -> float:
        """0.0: may be sent now. Else the seconds after which it is worth asking again; news of an attempt may make it
        sooner. Finite."""
        longest = self.held(now)
        for kind, bucket in self._ceilings.items():
            longest = max(longest, bucket.wait(self._ceiling_cost(kind, size), now))
        for limit in self._limits.values():
            longest = max(longest, min(UNKNOWN_SECONDS, limit.mirror.wait(_cost(limit.kind, size), now)))
        if self._cold is not None and self._unanswered >= self._cold:
            longest = max(longest, ASK_AGAIN)
        return longest

    def held(self, now: float) -> float:
        """Seconds for which refusals keep everybody back; 0.0: none."""
        self._watch_clock(now)
        return max((0.0, *(hold.until - now for hold in self._holds.values())))

    def take(self, size: Size, now: float) -> Reservation:
        """Reserve for one attempt; right after `wait` said 0.0."""
        self._watch_clock(now)
        self._unanswered += 1
        for kind in Kind:
            self._charged[kind] += _cost(kind, size)
        for kind, bucket in self._ceilings.items():
            bucket.take(self._ceiling_cost(kind, size), now)
        marks = {name: limit.mirror.take(_cost(limit.kind, size), now) for name, limit in self._limits.items()}
        tokens = self._ceiling_cost(Kind.TOKENS, size)
        self._reserved += tokens
        return Reservation(size, now, dict(self._charged), marks, tokens)

    # ── what became of an attempt ──

    def answered(self, reservation: Reservation, readings: Sequence[Reading], now: float) -> None:
        """An answer that is no refusal: 2xx, or a 4xx that is the caller's matter."""
        if not self._tell(reservation):
            return
        for hold in self._holds.values():
            hold.next_seconds = FIRST_HOLD
        self._read(reservation, readings, now)
        if self._cold is not None:
            if self._limits:
                self._cold = None
            elif self._unanswered + 1 >= self._cold / 2:  # it is used; what is not used proves nothing
                self._cold += 1.0

    def refused(
        self,
        reservation: Reservation,
        meaning: Meaning,
        readings: Sequence[Reading],
        retry_after: float | None,
        now: float,
    ) -> None:
        """A limit is used up.

        Args:
            meaning: reason REQUESTS, TOKENS, UNNAMED or SLOW_DOWN.
            retry_after: seconds, the provider's own word, or None.
        """
        if not self._tell(reservation):
            return
        reservation.refused = True
        self._read(reservation, readings, now)
        hold = self._holds.setdefault(meaning.reason, _Hold())
        windows = [limit.mirror.window for limit in self._limits.values() if _concerns(meaning.reason, limit.kind)]
        if retry_after is None:
            if reservation.taken_at < hold.until:
                return  # sent before the hold began: the same refusal once more
            seconds = hold.next_seconds
            hold.next_seconds = min(UNKNOWN_SECONDS, 2 * seconds)
        else:
            seconds = min(retry_after, max((WORD_MAX, *windows)))
        hold.until = max(hold.until, now + seconds)
        for limit in self._limits.values():
            if _concerns(meaning.reason, limit.kind):
                limit.mirror.refused(_cost(limit.kind, reservation.size), seconds, now)
        if self._learn and not windows:
            self._cold = 1.0

    def failed(self, reservation: Reservation, now: float) -> None:
        """No answer came, or one that says nothing about rates."""
        self._tell(reservation)

    def settle(self, reservation: Reservation, usage: Usage | None, now: float) -> None:
        """The attempt has ended; exactly the first time counts.

        Args:
            usage: as the upstream counted it; None: unknown, then the reservation stands if it was answered, and is
                given back if it was refused.
        """
        if reservation.settled:
            return
        self._tell(reservation)
        reservation.settled = True
        if usage is not None:
            used = float(usage.input + usage.output)
            self._output += 0.1 * (usage.output - self._output)
        else:
            used = 0.0 if reservation.refused else reservation.tokens
        self._reserved -= reservation.tokens
        self._used += used
        if (bucket := self._ceilings.get(Kind.TOKENS)) is not None:
            bucket.settle(used - reservation.tokens, now)

    def snapshot(self, now: float) -> Snapshot:
        limits = [
            Limit(kind.value, kind, Source.CONFIGURED, bucket.rate * 60, bucket.burst, bucket.level(now), 0.0, 0.0, 0)
            for kind, bucket in self._ceilings.items()
        ]
        for name, limit in self._limits.items():
            bucket = limit.mirror.bucket
            holds = [hold.until - now for reason, hold in self._holds.items() if _concerns(reason, limit.kind)]
            limits.append(
                Limit(
                    name,
                    limit.kind,
                    Source.HEADERS,
                    bucket.rate * 60,
                    bucket.burst,
                    bucket.level(now),
                    max((0.0, *holds)),
                    limit.since,
                    limit.changes,
                )
            )
        source = Source.HEADERS if self._limits else Source.COLD_START if self._learn else Source.CONFIGURED
        return Snapshot(source, tuple(limits), self.held(now), self._cold, self._unanswered, self._reserved, self._used)

    # ── within ──

    def _tell(self, reservation: Reservation) -> bool:
        """True for the first news of an attempt."""
        if reservation.told:
            return False
        reservation.told = True
        self._unanswered -= 1
        return True

    def _read(self, reservation: Reservation, readings: Sequence[Reading], now: float) -> None:
        if not self._learn:
            return
        for reading in readings:
            known = self._limits.get(reading.name)
            if known is None:
                if reading.limit is None:
                    continue
                spent = self._charged[reading.kind] - reservation.charged[reading.kind]
                known = _Learned(reading.name, reading.kind, Mirror(reading, spent, now), now)
                self._limits[reading.name] = known
                self._note(known, None, "header", now)
                continue
            before = known.mirror.bucket.rate * 60
            if known.mirror.read(reading, reservation.marks.get(reading.name), now):
                known.since, known.changes = now, known.changes + 1
                self._note(known, before, "header", now)

    def _note(self, limit: _Learned, before: float | None, cause: str, now: float) -> None:
        if len(self.changes) < CHANGES_KEPT:
            rate = limit.mirror.bucket.rate * 60
            self.changes.append(Change(now, limit.name, rate, before, Source.HEADERS, cause))

    def _ceiling_cost(self, kind: Kind, size: Size) -> float:
        if kind is Kind.REQUESTS:
            return float(size.requests)
        output = self._output if size.max_tokens is None else min(float(size.max_tokens), 2 * self._output)
        return size.input_tokens + output

    def _watch_clock(self, now: float) -> None:
        """A clock that was set back must not lengthen a hold."""
        if now < self._seen:
            for hold in self._holds.values():
                hold.until -= self._seen - now
        self._seen = now


def _cost(kind: Kind, size: Size) -> float:
    if kind is Kind.REQUESTS:
        return float(size.requests)
    if kind is Kind.OUTPUT_TOKENS:
        return float(size.max_tokens or 0)
    return size.input_tokens


def _concerns(reason: Reason, kind: Kind) -> bool:
    """Whether a refusal for `reason` is about a limit of this kind."""
    if reason is Reason.REQUESTS:
        return kind is Kind.REQUESTS
    if reason is Reason.TOKENS:
        return kind is not Kind.REQUESTS
    return True
