"""What are this upstream's limits, and may a call of this size be sent now?

One learner stands for one account: a credential and a model, or a configured pool. The gate asks `wait` and, at 0.0,
takes; then the attempt tells what became of it: `answered`, `refused` or `failed`, and at its end, always, `settle`.

What is believed of a limit comes from the best teacher there is: the headers of answers (`core.mirror`); where they
tell nothing, or do not explain a refusal, the refusals themselves (`core.silent`). What the configuration says is a
ceiling above all of them.

Rules
-----
1. A configured ceiling is never exceeded by the learner's own count, whatever the provider says.
2. `wait` is finite and >= 0 after any history. Whatever headers and refusals made of the limits, one call is let out
   `SILENCE_MAX` seconds after the last one, or after the provider's own word (rule 3); only a ceiling can be slower.
3. A refusal holds its limit for everybody, until the provider's own word; then calls leave at the limit's pace.
4. Of an upstream of which nothing is known, 8 calls are sent, and two more for each that is answered. The first answer
   that tells its limits ends this, and so does a refusal.
5. Headers are believed as long as they explain what happens. Those that tell of room while calls are refused are no
   help, so refusals teach beside them; those that tell of none while calls are answered are set aside.
6. Two ledgers: the provider's (what it charges, mirrored) and the caller's (what was used). In the caller's,
   reservations less refunds are what was used.
7. A clock that jumps back changes nothing: time stands still while it jumps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from math import inf

from proxy.core.bucket import EARLY, Bucket
from proxy.core.headers import DAY, Kind, Reading
from proxy.core.journal import Features, Journal, Mark, features
from proxy.core.mirror import Mirror
from proxy.core.outcome import Meaning, Reason
from proxy.core.ramp import Ramp
from proxy.core.silent import Silent
from proxy.core.usage import Usage
from proxy.core.window import Slot

COLD_CALLS = 8  # sent to an upstream of which nothing is known
COLD_RATE = 40.0  # of more than these, per second at most, so that few are on their way to a sudden wall ...
COLD_SHARE = 0.25  # ... or this much of what was answered, per second
UNSURE = 2.0  # times the tokens that a call is likely to be charged
UNBOUNDED = 2048.0  # tokens of an answer that has no bound
CEILING_SECONDS = 6.0  # the burst of a configured rate: 500 a minute let 50 go at once
SILENCE_MAX = 60.0  # seconds; the longest silence towards an upstream that did not ask for it
WORD_MAX = 60.0  # seconds; a retry-after beyond is believed only for limits whose window is longer
FIRST_HOLD = 1.0  # seconds, after a refusal that neither says nor lets guess when to come back; doubles up to WORD_MAX
ASK_AGAIN = 0.05  # seconds; when only an answer can let the next one out, and nobody knows when it comes
DOUBTS = 3  # answers to calls for which headers told of no room, before they are set aside
SET_ASIDE_SECONDS, SET_ASIDE_MOST = 600.0, DAY  # the first time, and doubling up to
SURPRISES, SURPRISE_SECONDS = 5, 60.0  # so many refusals by a limit in so short a time: its headers are no help
STALE_SECONDS = 300.0  # a limit that answers no longer tell is forgotten
LIMITS_MAX = 8  # told by one account
SHORT = 3600.0  # seconds; a longer window may stand beside a shorter one that is not told, as Groq's day does
WORTH_TELLING = 0.05  # of a limit; smaller corrections of an estimate are no change of it
CHANGES_KEPT = 256
OUTPUT_WEIGHT = 0.1  # of the newest answer, in the mean output of those that set no bound


class Source(Enum):
    """Where a limit is known from."""

    CONFIGURED = "configured"
    HEADERS = "headers"
    REFUSALS = "refusals"
    WINDOW = "window"
    COLD_START = "cold start"


@dataclass(slots=True)
class Size:
    """What a call will weigh, as far as it is known beforehand. Never changed; to be frozen would cost 1 us a call."""

    requests: int = 1
    input_tokens: float = 0.0  # estimated: characters / 4
    max_tokens: int | None = None
    model: str = ""
    features: Features = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.features = features(self.input_tokens, self.max_tokens)


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
    burst: float | None  # None: not known
    level: float
    hold_seconds: float
    since: float | None  # monotonic seconds; when it became what it is. None: from the start
    changes: int


@dataclass(slots=True, frozen=True)
class Snapshot:
    limits: tuple[Limit, ...]
    hold_seconds: float
    cold_calls: float | None  # calls that may be unanswered at once; None: no longer bounded by the cold start
    unanswered: int
    tokens_per_second_max: float | None  # after a slow_down; None: not bounded
    reserved: float  # tokens reserved by calls that have not ended
    used: float  # tokens used by calls that have


@dataclass(slots=True, eq=False)
class Reservation:
    """What one attempt took; handed back to the learner with each piece of news."""

    size: Size
    mark: Mark
    slots: dict[Kind, Slot | None]
    tokens: float  # reserved in the caller's ledger
    overdue: bool  # let out by rule 2, although there seemed to be no room
    told: bool = False  # an answer, refusal or failure came
    refused: bool = False
    settled: bool = False


@dataclass(slots=True)
class _Told:
    """One limit that headers tell."""

    name: str
    kind: Kind
    mirror: Mirror
    since: float
    read_at: float
    changes: int = 0
    doubts: int = 0
    heard_at: float = -inf  # when the last refusal that it explained was heard of
    surprises: deque[float] = field(default_factory=deque)  # when it explained a refusal, but had not kept us from it

    def is_no_help(self, now: float) -> bool:
        """It explains refusals, but lets us run into them all the same."""
        while self.surprises and self.surprises[0] < now - SURPRISE_SECONDS:
            self.surprises.popleft()
        return len(self.surprises) >= SURPRISES


@dataclass(slots=True)
class _Guessed:
    """One limit that refusals tell."""

    silent: Silent
    noted: float | None = None  # per minute, when it was last told
    since: float = 0.0
    changes: int = 0


@dataclass(slots=True)
class _Hold:
    """How long nobody may be sent because of one reason, and how long it may be next time without a word."""

    until: float = -inf
    next_seconds: float = 0.0


class Learner:
    """
    Args:
        requests_per_minute, tokens_per_minute: configured ceilings, > 0; None: none.
        learn: False: only the ceilings and the holds count.
        now: seconds, monotonic, as in every method.
    """

    def __init__(
        self,
        *,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        learn: bool = True,
        now: float | None = None,
    ) -> None:
        self._learn = learn
        self.changes: list[Change] = []  # drained by whoever tells them
        self._ceilings: dict[Kind, Bucket] = {}
        self._told: dict[str, _Told] = {}
        self._guessed: dict[Kind, _Guessed] = {}
        self._aside: dict[str, tuple[float, float]] = {}  # until when, and for how long, by name of limit
        self._holds: dict[Reason, _Hold] = {}
        self._held_until = -inf
        self._cold: float | None = COLD_CALLS  # calls that may be unanswered; None: no longer bounded so
        self._growth = 0.0  # answers that may each let one more out
        self._fitting = 0.0  # calls that may be unanswered because headers tell of room for them
        self._cold_pace = Bucket(COLD_RATE, COLD_CALLS, 0.0 if now is None else now)
        self._unanswered = 0
        self._answered = 0
        self._journal = Journal()
        self._output = 0.0  # mean output tokens of late
        self._reserved = 0.0
        self._used = 0.0
        self._last: float | None = now  # when a call was last let out, or it began
        self._seen = 0.0 if now is None else now
        self._jumped = 0.0
        self._ramp = Ramp(self._seen)
        self.configure(requests_per_minute=requests_per_minute, tokens_per_minute=tokens_per_minute, learn=learn)

    def configure(self, *, requests_per_minute: float | None, tokens_per_minute: float | None, learn: bool) -> None:
        """Take other ceilings; the levels stay, and so does what was learned."""
        if not learn:
            self._cold = None
        elif not self._learn and not self._told and not self._guessed:
            self._cold = COLD_CALLS
        self._learn = learn
        for kind, per_minute in ((Kind.REQUESTS, requests_per_minute), (Kind.TOKENS, tokens_per_minute)):
            if per_minute is None:
                self._ceilings.pop(kind, None)
                continue
            rate = per_minute / 60.0
            burst = max(1.0, rate * CEILING_SECONDS)
            if (bucket := self._ceilings.get(kind)) is None:
                self._ceilings[kind] = Bucket(rate, burst, self._seen)
            elif (bucket.rate, bucket.burst) != (rate, burst):
                bucket.change(rate, burst, self._seen)

    # ── the gate's side ──

    def wait(self, size: Size, now: float) -> float:
        """0.0: may be sent now. Else the seconds after which it is worth asking again; news of an attempt may make it
        sooner. Finite."""
        now = self._time(now)
        seconds = self._held_until - now if self._held_until > now else 0.0
        for kind, bucket in self._ceilings.items():
            seconds = max(seconds, bucket.wait(self._ceiling_cost(kind, size), now))
        if self._learn and (learned := self._learned_wait(size, now)) > seconds:
            if self._last is None:
                self._last = now
            seconds = max(seconds, min(learned, self._last + SILENCE_MAX - now))
        return max(seconds, EARLY) if seconds > 0.0 else 0.0  # so short a wait would never pass on a coarse clock

    def held(self, now: float) -> float:
        """Seconds for which refusals keep everybody back; 0.0: none."""
        return max(0.0, self._held_until - self._time(now))

    def take(self, size: Size, now: float) -> Reservation:
        """Reserve for one attempt; right after `wait` said 0.0."""
        now = self._time(now)
        x = size.features
        self._unanswered += 1
        overdue = self._last is not None and now - self._last >= SILENCE_MAX
        self._last = now
        for kind, bucket in self._ceilings.items():
            bucket.take(self._ceiling_cost(kind, size), now)
        if self._cold is not None:
            self._cold_pace.take(1.0, now)
            if self._unanswered >= self._cold / 2:  # it is used; what is not used proves nothing
                self._growth = self._cold
        for told in self._told.values():
            told.mirror.take(x, now)
        mark = self._journal.write(x, now)
        slots: dict[Kind, Slot | None] = {}
        for kind, guessed in self._guessed.items():
            slots[kind] = guessed.silent.take(x, now)
        self._ramp.take(size.input_tokens, now)
        tokens = self._ceiling_cost(Kind.TOKENS, size)
        self._reserved += tokens
        return Reservation(size, mark, slots, tokens, overdue)

    # ── what became of an attempt ──

    def answered(self, reservation: Reservation, readings: Sequence[Reading], now: float) -> bool:
        """An answer that is no refusal: 2xx, or a 4xx that is the caller's matter. True: more may fit than before."""
        now = self._time(now)
        if not self._tell(reservation):
            return False
        self._answered += 1
        for hold in self._holds.values():
            hold.next_seconds = 0.0
        if reservation.overdue:
            self._doubt_headers(now)
        self._read(reservation, readings, now)
        if self._cold is not None:
            if self._is_told_enough(reservation.mark.features):
                self._cold = None
            elif self._growth >= 1.0:
                self._growth, self._cold = self._growth - 1.0, self._cold + 1.0
            self._fitting = self._unanswered + self._room(reservation.size, now)
            self._cold_pace.change(max(COLD_RATE, COLD_SHARE * self._answered), COLD_CALLS, now)
            return True
        return bool(readings) or reservation.overdue

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
        now = self._time(now)
        if not self._tell(reservation):
            return
        reservation.refused = True
        self._read(reservation, readings, now)
        reason = meaning.reason
        hold = self._holds.setdefault(reason, _Hold())
        again = reservation.mark.at < hold.until  # sent before the hold began: the same refusal once more
        remaining = {reading.name: reading.remaining for reading in readings}
        explaining = self._explaining(reason, reservation, remaining, now)
        longest = max((WORD_MAX, *(told.mirror.window for told in explaining)))
        if retry_after is not None:
            seconds = min(retry_after, longest)
        elif again:
            seconds = 0.0
        else:
            seconds = min(WORD_MAX, hold.next_seconds or self._guess_hold(reason, reservation))
            hold.next_seconds = 2 * seconds
        hold.until = max(hold.until, now + seconds)
        self._held_until = max(self._held_until, hold.until)
        if not self._learn:
            return
        self._cold = None
        if reason is Reason.SLOW_DOWN:
            if not again:
                self._ramp.slow_down(now)
            return
        for told in explaining:
            if reservation.mark.at >= told.heard_at:
                told.surprises.append(now)
            told.heard_at = now
        for told in self._told.values():
            told.mirror.refused(reservation.mark, remaining.get(told.name), seconds, told in explaining, now)
        if any(not told.is_no_help(now) for told in explaining):
            return
        kind = Kind.TOKENS if reason is Reason.TOKENS else Kind.REQUESTS
        guessed = self._guessed.get(kind)
        if guessed is None:
            guessed = self._guessed[kind] = _Guessed(Silent(self._journal, tokens=kind is Kind.TOKENS, now=now))
        slot = reservation.slots.get(kind)
        if guessed.silent.refused(reservation.mark, slot, seconds, retry_after is not None, now):
            self._note_guess(kind, guessed, now)

    def failed(self, reservation: Reservation, now: float) -> bool:
        """No answer came, or one that says nothing about rates. True: more may fit than before."""
        self._time(now)
        return self._tell(reservation) and self._cold is not None

    def settle(self, reservation: Reservation, usage: Usage | None, now: float) -> bool:
        """The attempt has ended; exactly the first time counts. True: more may fit than before.

        Args:
            usage: as the upstream counted it; None: unknown, then the reservation stands, but for a refused attempt,
                whose reservation is given back. Nothing used and nothing told: it was never sent.
        """
        if reservation.settled:
            return False
        now = self._time(now)
        reservation.settled = True
        more = False
        if self._tell(reservation):
            more = self._cold is not None
            if usage is not None and not usage.input and not usage.output:
                self._take_back(reservation, now)
                more = True
        if usage is not None:
            used = float(usage.input + usage.output)
            self._output += OUTPUT_WEIGHT * (usage.output - self._output)
        else:
            used = 0.0 if reservation.refused else reservation.tokens
        self._reserved -= reservation.tokens
        self._used += used
        if (bucket := self._ceilings.get(Kind.TOKENS)) is not None:
            bucket.settle(used - reservation.tokens, now)
            more = more or used < reservation.tokens
        return more

    def snapshot(self, now: float) -> Snapshot:
        now = self._time(now)
        limits = [
            Limit(kind.value, kind, Source.CONFIGURED, 60 * bucket.rate, bucket.burst, bucket.level(now), 0.0, None, 0)
            for kind, bucket in self._ceilings.items()
        ]
        limits += [
            Limit(
                told.name,
                told.kind,
                Source.HEADERS,
                60 * told.mirror.rate,
                told.mirror.burst,
                told.mirror.level(now),
                self._held_for(told.kind, now),
                told.since - self._jumped,
                told.changes,
            )
            for told in self._told.values()
        ]
        limits += [
            Limit(
                kind.value,
                kind,
                _source(guessed),
                60 * guessed.silent.rate,
                None,
                guessed.silent.level(now),
                self._held_for(kind, now),
                guessed.since - self._jumped,
                guessed.changes,
            )
            for kind, guessed in self._guessed.items()
        ]
        return Snapshot(
            limits=tuple(limits),
            hold_seconds=max(0.0, self._held_until - now),
            cold_calls=self._cold,
            unanswered=self._unanswered,
            tokens_per_second_max=self._ramp.rate,
            reserved=self._reserved,
            used=self._used,
        )

    # ── within ──

    def _time(self, now: float) -> float:
        """Rule 7: the learner's own time never goes back."""
        now += self._jumped
        if now < self._seen:
            self._jumped += self._seen - now
            return self._seen
        self._seen = now
        return now

    def _learned_wait(self, size: Size, now: float) -> float:
        seconds = 0.0
        if self._cold is not None and self._unanswered >= COLD_CALLS:
            full = self._unanswered >= max(self._cold, self._fitting)
            seconds = ASK_AGAIN if full else self._cold_pace.wait(1.0, now)
        for told in self._told.values():
            if (wait := told.mirror.wait(size.features, now)) > seconds:
                seconds = wait
        for guessed in self._guessed.values():
            if (wait := guessed.silent.wait(size.features, now)) > seconds:
                seconds = wait
        if (wait := self._ramp.wait(size.input_tokens, now)) > seconds:
            seconds = wait
        return seconds

    def _tell(self, reservation: Reservation) -> bool:
        """True for the first news of an attempt."""
        if reservation.told:
            return False
        reservation.told = True
        self._unanswered -= 1
        return True

    def _take_back(self, reservation: Reservation, now: float) -> None:
        """It was never sent, so nobody charged it."""
        for told in self._told.values():
            told.mirror.refused(reservation.mark, None, 0.0, False, now)
        for kind, guessed in self._guessed.items():
            guessed.silent.unsent(reservation.mark, reservation.slots.get(kind))

    def _read(self, reservation: Reservation, readings: Sequence[Reading], now: float) -> None:
        if not self._learn:
            return
        untold = len(self._told)
        for reading in readings:
            told = self._told.get(reading.name)
            if told is None:
                if reading.limit is not None and now >= self._aside.get(reading.name, (now, 0.0))[0]:
                    self._begin(reservation, reading, now)
                continue
            told.read_at = now
            untold -= 1
            before = 60 * told.mirror.rate
            if told.mirror.read(reading, reservation.mark, now, refused=reservation.refused):
                told.since, told.changes = now, told.changes + 1
                self._note(told.name, 60 * told.mirror.rate, before, Source.HEADERS, "header", now)
        if untold > 0:
            for told in [told for told in self._told.values() if now - told.read_at > STALE_SECONDS]:
                self._forget(told)

    def _begin(self, reservation: Reservation, reading: Reading, now: float) -> None:
        if len(self._told) < LIMITS_MAX:
            mirror = Mirror(reading, reservation.mark, self._journal, now)
            self._told[reading.name] = _Told(reading.name, reading.kind, mirror, since=now, read_at=now)
            self._note(reading.name, 60 * mirror.rate, None, Source.HEADERS, "header", now)

    def _forget(self, told: _Told) -> None:
        del self._told[told.name]
        if not self._told and not self._guessed:
            self._cold = COLD_CALLS

    def _doubt_headers(self, now: float) -> None:
        """A call that headers had no room for was answered: after some of these their limit is set aside."""
        for told in list(self._told.values()):
            told.doubts += told.mirror.level(now) < 0.0
            if told.doubts >= DOUBTS:
                _, seconds = self._aside.get(told.name, (0.0, SET_ASIDE_SECONDS / 2))
                seconds = min(SET_ASIDE_MOST, 2 * seconds)
                self._aside[told.name] = now + seconds, seconds
                self._forget(told)

    def _is_told_enough(self, x: Features) -> bool:
        """Whether headers tell all that the cold start is to find out."""
        told = self._told.values()
        short = {each.kind for each in told if each.mirror.window <= SHORT}
        return bool(told) and all(each.kind in short and each.mirror.is_sure(x) for each in told)

    def _room(self, size: Size, now: float) -> float:
        """More calls like this one for which headers tell room, were each charged more than any is likely to be."""
        output = UNBOUNDED if size.max_tokens is None else size.max_tokens
        tokens = UNSURE * (UNSURE * size.input_tokens + output)
        short = [told for told in self._told.values() if told.mirror.window <= SHORT]
        return min(
            (told.mirror.level(now) / (1.0 if told.kind is Kind.REQUESTS else tokens) for told in short), default=0.0
        )

    def _explaining(
        self, reason: Reason, reservation: Reservation, remaining: Mapping[str, float | None], now: float
    ) -> list[_Told]:
        """The limits by headers that explain a refusal: of the kind it names, else any (providers misname them)."""
        short = [
            told
            for name, told in self._told.items()
            if told.mirror.explains(reservation.mark, remaining.get(name), now)
        ]
        return [told for told in short if _concerns(reason, told.kind)] or short

    def _guess_hold(self, reason: Reason, reservation: Reservation) -> float:
        """Seconds to hold after a refusal that says nothing: what one more call of the kind needs."""
        kind = Kind.TOKENS if reason is Reason.TOKENS else Kind.REQUESTS
        if (guessed := self._guessed.get(kind)) is None:
            return FIRST_HOLD
        silent = guessed.silent
        return max(ASK_AGAIN, min(FIRST_HOLD, silent.two_point.cost(reservation.mark.features) / silent.rate))

    def _note_guess(self, kind: Kind, guessed: _Guessed, now: float) -> None:
        before, per_minute = guessed.noted, 60 * guessed.silent.rate
        if before is None or abs(per_minute - before) > WORTH_TELLING * before:
            guessed.noted, guessed.since, guessed.changes = per_minute, now, guessed.changes + (before is not None)
            self._note(kind.value, per_minute, before, _source(guessed), "refusal", now)

    def _note(
        self, limit: str, per_minute: float, before: float | None, source: Source, cause: str, now: float
    ) -> None:
        if len(self.changes) < CHANGES_KEPT:
            self.changes.append(Change(now - self._jumped, limit, per_minute, before, source, cause))

    def _ceiling_cost(self, kind: Kind, size: Size) -> float:
        if kind is Kind.REQUESTS:
            return float(size.requests)
        most = size.max_tokens
        return size.input_tokens + (self._output if most is None or most > self._output else most)

    def _held_for(self, kind: Kind, now: float) -> float:
        return max((0.0, *(hold.until - now for reason, hold in self._holds.items() if _concerns(reason, kind))))


def _source(guessed: _Guessed) -> Source:
    return Source.WINDOW if guessed.silent.window is not None else Source.REFUSALS


def _concerns(reason: Reason, kind: Kind) -> bool:
    """Whether a refusal for `reason` is about a limit of this kind."""
    if reason is Reason.REQUESTS:
        return kind is Kind.REQUESTS
    if reason is Reason.TOKENS:
        return kind is not Kind.REQUESTS
    return True
