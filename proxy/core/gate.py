"""Who may start now, who waits, who is turned away.

A call asks for the process's place and for the pools of one of its targets, all together. While it waits it holds none
of them. Its targets stand in the order of preference; it starts on the first that has room.

Rules
-----
1. A pool never has more calls in flight than its concurrency. Lowering it revokes nothing: those inside finish, and
   nobody new enters until the count has drained below.
2. Between lanes (class, caller, targets) the better class goes first; 30 s in which a lane is not served are worth one
   class, beyond the best one too, so nobody waits for ever and no backlog ages past those who are served in turn.
   Within a class the caller that was served least goes first, then who came first. Within a lane the order of arrival
   holds.
3. Nobody who stands first in a lane waits while a target of theirs has room that is not reserved (rule 6).
4. Every ticket ends exactly once. Ending it again changes nothing, so callers may end a ticket in `finally` without
   asking what became of it.
5. A ticket that pauses (its upstream said no) was not served; it gives the target's pools back and keeps the process's
   place. When it asks again it stands at the head of its lane.
6. A head that fits nowhere, and has waited 2 s, reserves. Of a rate that is short for it nobody of a later turn takes,
   so the small do not starve the large. And where no single pool keeps it out, but now one and then another, nobody of
   a later turn takes the last place of those that have room, so it need not wait for all to have room by chance. Who
   holds what it lacks waits for nothing that is kept, so it is kept no longer than until one of them ends.
7. A caller that was idle starts at the level of the least served active one: nobody saves up turns.
8. While batch calls wait, one of `BATCH_EVERY` that leave the queue is a batch call: they keep 5 %.
9. Who would wait beyond the deadline is refused at once, and told how long the wait would have been.
10. A class in `overload` whose queue has stood for longer than its target is overloaded: the newest of a lane goes
    first, and who has waited `OVERLOAD_WAIT` is refused. Old waiters are gone, or will be before their answer; the new
    ones can still be served in time. Batch calls have all the time there is, and are never in `overload`.

Rules 1 and 2 began as those of `trio.CapacityLimiter`. Service is counted as in the Virtual Token Counter of Sheng et
al., "Fairness in Serving Large Language Models", OSDI 2024: input tokens + 2 x output tokens, divided by the weight.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Protocol

from proxy.core.learner import Reservation, Size
from proxy.core.pool import Pool

AGING_SECONDS = 30.0  # a wait this long is worth one class
RESERVE_SECONDS = 2.0  # a head that waited this long without fitting holds its pools for itself
OUTPUT_WEIGHT = 2.0  # an output token costs about twice an input token (Sheng et al., section 3)
OUTPUT_GUESS = 256.0  # tokens, where the call names no maximum
BATCH_EVERY = 20
OVERLOAD_WAIT = 2.0  # seconds
PACE_OF = 64  # departures from the queue that its pace is the mean of
PACE_FROM = 8  # fewer tell nothing
CAUTION = 0.8  # of a wait guessed from the pace, so that nobody is refused who would have been in time


class Priority(IntEnum):
    INTERACTIVE = 0
    DEFAULT = 1
    BATCH = 2


STANDING_SECONDS = {Priority.INTERACTIVE: 0.5, Priority.DEFAULT: 5.0}  # a queue that stands for longer is overload


class Refusal(Enum):
    """Why a ticket was refused."""

    FULL = "full"  # too many wait already
    LATE = "late"  # it would wait beyond its deadline
    OVERLOAD = "overload"  # rule 10


class State(Enum):
    WAITING = "waiting"
    HELD = "held"  # holds the process's place and its target's pools
    PAUSED = "paused"  # holds the process's place only
    REFUSED = "refused"
    ENDED = "ended"


class Target(Protocol):
    """Something a call may be sent to."""

    @property
    def pools(self) -> Sequence[Pool]:
        """All it takes from, besides the process's place."""
        ...

    @property
    def account(self) -> Pool | None:
        """The one of `pools` whose limits are the provider's own: answers and refusals tell about it."""
        ...


@dataclass(slots=True, eq=False)
class Ticket:
    """One call at the gate."""

    targets: tuple[Target, ...]
    size: Size
    priority: Priority
    caller: str
    since: float  # when it first asked, seconds
    state: State = State.WAITING
    target: Target | None = None  # where it may go, once HELD
    reservations: list[tuple[Pool, Reservation]] = field(default_factory=list)
    waited_for: str = ""  # label of the pool that kept it waiting, or that it was refused by
    refusal: Refusal | None = None
    expected_wait: float = 0.0  # seconds, once REFUSED
    inside: bool = False  # holds the process's place
    guess: float = 0.0  # tokens counted as service at its admission, until it is known what it used
    lane: _Lane | None = None  # where it stands while WAITING
    missed: dict[Target, set[Pool]] = field(default_factory=dict)  # what it missed at every look, of each target

    def misses(self, target: Target, pools: set[Pool]) -> bool:
        """It cannot enter, for want of these. True: at some look it had each of a target's, but never all (rule 6)."""
        always = self.missed.setdefault(target, pools)
        if always is not pools:
            always &= pools
        return not always


@dataclass(slots=True, eq=False)
class _Lane:
    """Those who wait alike. They enter in the order in which they stand."""

    priority: Priority
    caller: str
    targets: tuple[Target, ...]
    tickets: OrderedDict[Ticket, None] = field(default_factory=OrderedDict)
    blocked_by: str = ""
    wait: float = 0.0  # seconds that its head will wait at least, as of the last look
    served: float = -math.inf  # when one of them last entered
    newest_first: bool = False

    @property
    def head(self) -> Ticket:
        first = next(iter(self.tickets))
        return next(reversed(self.tickets)) if self.newest_first and not first.inside else first


@dataclass(slots=True, eq=False)
class _Caller:
    """What a caller was served, in tokens over its weight."""

    service: float = 0.0
    guessed: float = 0.0  # the part of it that stands for calls in flight
    busy: int = 0  # tickets not yet ended

    def serve(self, tokens: float, guess: float) -> None:
        """Add both; below zero, they are taken back."""
        self.service = max(0.0, self.service + tokens)
        self.guessed = max(0.0, self.guessed + guess)


@dataclass(slots=True)
class _Reserved:
    """What rule 6 keeps from those of a later turn, for the length of one look."""

    rates: set[Pool] = field(default_factory=set)
    places: set[Pool] = field(default_factory=set)  # of which the last place is kept

    def keeps(self, pool: Pool) -> bool:
        """Whether a pool that has room has none for those of a later turn."""
        if not self.rates and not self.places:
            return False
        if pool in self.rates:
            return True
        return pool in self.places and pool.concurrency is not None and pool.in_use + 1 >= pool.concurrency


@dataclass(slots=True)
class Level:
    """All pools of one label at one instant, for metrics and `repr`."""

    label: str
    concurrency: int | None
    in_use: int
    waiting: Mapping[Priority, int]
    held_seconds: float  # place-seconds used, ever
    queued_seconds: float  # that calls waited for it, ever
    full_seconds: float  # for which no place was left, ever


class Gate:
    """Admission to one process and to the pools of its targets.

    Args:
        process: the pool every call needs; its `concurrency` bounds all.
        queue_limit: waiters beyond which a newcomer is refused at once, >= 0.
        weights: of the callers, > 0; 1.0 where a caller is not named.
        overload: the classes that rule 10 is for.

    All four may be changed at any time; `advance` then lets in whoever fits by then.

    Whoever is let in or refused while waiting is put into `woken`, for the owner to wake and to clear. `wake_at` says
    when to call `advance`, because a rate or a hold will have room then (inf: nobody waits for time to pass).
    """

    def __init__(
        self,
        process: Pool,
        queue_limit: int,
        weights: Mapping[str, float] | None = None,
        overload: frozenset[Priority] = frozenset(),
    ) -> None:
        self.process = process
        self.queue_limit = queue_limit
        self.weights: Mapping[str, float] = weights or {}
        self.overload = overload
        self.waiting = 0
        self.wake_at = math.inf
        self.woken: list[Ticket] = []
        self._lanes: dict[tuple[Priority, str, tuple[Target, ...]], _Lane] = {}
        self._callers: dict[str, _Caller] = {}  # all that came since nobody was busy
        self._busy: dict[str, _Caller] = {}
        self._of_class = dict.fromkeys(Priority, 0)  # how many wait
        self._standing: dict[Priority, float] = {}  # since when somebody of the class waits
        self._without_batch = 0  # departures since a batch call's, while one waited
        self._departures: dict[str, deque[float]] = {}  # times, by what was waited for
        self._queued: dict[str, float] = {}  # seconds waited, by what was waited for; kept as `Pool` keeps its own

    def ask(
        self,
        now: float,
        targets: tuple[Target, ...],
        size: Size,
        *,
        priority: Priority,
        caller: str = "",
        deadline: float = math.inf,
    ) -> Ticket:
        """Return a ticket that is HELD, WAITING, or REFUSED because the queue is full, or too slow for the deadline."""
        ticket = Ticket(targets, size, priority, caller, since=now)
        self._arrive(caller)
        if not self.waiting and self._enter(ticket, now):
            return ticket
        lane = self._line_up(ticket, now)  # for its turn at least: a full queue is no way past a reservation
        if len(lane.tickets) == 1 or now >= self.wake_at or priority in self.overload:
            self._fill(now)  # else it stands behind one who does not fit
        if ticket.lane is not None:
            if self.waiting > self.queue_limit:
                self._refuse(ticket, Refusal.FULL, ticket.lane, now)
            elif now + self._expected_wait(ticket.lane) > deadline:
                self._refuse(ticket, Refusal.LATE, ticket.lane, now)
        return ticket

    def pause(self, ticket: Ticket, now: float) -> None:
        """Give the target's pools back and keep the process's place (rule 5)."""
        assert ticket.state is State.HELD
        self._leave_target(ticket, now)
        ticket.state = State.PAUSED
        self._settle(ticket, 0.0)  # it was not served
        self._fill(now)

    def again(self, ticket: Ticket, targets: tuple[Target, ...], now: float) -> None:
        """Ask again after a pause, at the head of the lane. Never refused by a full queue: it is inside already."""
        assert ticket.state is State.PAUSED
        ticket.targets, ticket.state = targets, State.WAITING
        self._line_up(ticket, now, first=True)
        self._fill(now)

    def end(self, ticket: Ticket, now: float) -> None:
        """Give everything back, or stop waiting. Places let others in by this alone; rates, whose use is settled apart,
        by `advance`."""
        if ticket.state in (State.REFUSED, State.ENDED):
            return
        freed = False
        if ticket.state is State.HELD:
            freed = self._leave_target(ticket, now)
        elif ticket.state is State.WAITING:
            self._step_out(ticket, now)
            freed = True  # of whom it stood before
        if ticket.inside:
            ticket.inside = False
            freed |= self.process.leave(now)
        ticket.state = State.ENDED
        if ticket.guess:  # nobody said what it used: the guess stands
            self._busy[ticket.caller].serve(0.0, -ticket.guess)
            ticket.guess = 0.0
        self._depart(ticket.caller)
        if freed or now >= self.wake_at:
            self._fill(now)

    def advance(self, now: float) -> None:
        """Time has passed, or a pool has changed."""
        self._fill(now)

    def served(self, ticket: Ticket, input_tokens: float, output_tokens: float) -> None:
        """Correct what `ticket` was counted for at its admission by what it really used."""
        self._settle(ticket, (input_tokens + OUTPUT_WEIGHT * output_tokens) / self.weights.get(ticket.caller, 1.0))

    def levels(self, pools: Iterable[Pool], now: float) -> Iterable[Level]:
        """The pools as they are now, each label with those who wait for it."""
        waiting: dict[str, dict[Priority, int]] = {}
        for lane in self._lanes.values():
            of_pool = waiting.setdefault(lane.blocked_by, {})
            of_pool[lane.priority] = of_pool.get(lane.priority, 0) + len(lane.tickets)
        levels: dict[str, Level] = {}
        for pool in pools:
            level = levels.get(pool.label)
            if level is None:
                of_pool = waiting.get(pool.label, {})
                queued = self._queued.get(pool.label, 0.0) + sum(of_pool.values()) * now
                level = levels[pool.label] = Level(pool.label, pool.concurrency, 0, of_pool, 0.0, queued, 0.0)
            level.in_use += pool.in_use
            level.held_seconds += pool.held_seconds(now)
            level.full_seconds += pool.full_seconds(now)
        return levels.values()

    def before(self, ticket: Ticket, now: float) -> Level | None:
        """The level that `ticket` waits for; of the pools that its own targets take from."""
        pools = (self.process, *(pool for target in ticket.targets for pool in target.pools))
        return next(iter(self.levels({pool for pool in pools if pool.label == ticket.waited_for}, now)), None)

    def __repr__(self) -> str:
        return f"<Gate {self.process.in_use}/{self.process.concurrency} in flight, {self.waiting} waiting>"

    def _fill(self, now: float) -> None:
        """Let in whoever may enter, best lane first. O(lanes log lanes), and O(log lanes) for each that enters."""
        self.wake_at = math.inf
        if not self.waiting:
            return
        if self.overload:
            self._shed(now)
        reserved = _Reserved()
        if len(self._lanes) == 1:  # nobody's turn to reckon
            (lane,) = self._lanes.values()
            while lane.tickets and self._serve(lane, now, reserved):
                pass
            return
        turns = [(self._turn(lane, now), number, lane) for number, lane in enumerate(self._lanes.values())]
        heapq.heapify(turns)
        while turns:
            _, number, lane = heapq.heappop(turns)
            if self._serve(lane, now, reserved) and lane.tickets:
                heapq.heappush(turns, (self._turn(lane, now), number, lane))

    def _serve(self, lane: _Lane, now: float, reserved: _Reserved) -> bool:
        """Let the head of a lane in, if it fits; else note what it waits for."""
        ticket = lane.head
        blocked = self._look(ticket, now, reserved)
        if blocked is None:
            lane.served = now
            self._step_out(ticket, now)
            self._note_departure(ticket, now)
            self.woken.append(ticket)
            return True
        blocker, wait = blocked
        if blocker != lane.blocked_by:
            self._waited(lane.blocked_by, len(lane.tickets) * now)
            self._waited(blocker, len(lane.tickets) * -now)
            lane.blocked_by = blocker
        lane.wait = wait if wait < math.inf else 0.0
        ticket.waited_for = ticket.waited_for or blocker
        self.wake_at = min(self.wake_at, now + wait)
        return False

    def _turn(self, lane: _Lane, now: float) -> tuple[float, float, float]:
        since = lane.head.since
        if lane.priority is Priority.BATCH and self._without_batch >= BATCH_EVERY - 1:
            aged = -math.inf  # rule 8
        else:
            aged = lane.priority - int((now - max(since, lane.served)) / AGING_SECONDS)
        return aged, self._busy[lane.caller].service, since

    def _shed(self, now: float) -> None:
        """Rule 10: find the classes that are overloaded, and refuse those who have waited too long in them."""
        for lane in list(self._lanes.values()):
            if lane.priority not in self.overload:
                continue
            overloaded_at = self._standing[lane.priority] + STANDING_SECONDS[lane.priority]
            lane.newest_first = now >= overloaded_at
            while lane.tickets:
                oldest = next(iter(lane.tickets))
                refused_at = max(overloaded_at, oldest.since + OVERLOAD_WAIT)
                if oldest.inside:
                    break
                if now < refused_at:
                    self.wake_at = min(self.wake_at, refused_at)
                    break
                self._refuse(oldest, Refusal.OVERLOAD, lane, now)
                self.woken.append(oldest)

    def _refuse(self, ticket: Ticket, refusal: Refusal, lane: _Lane, now: float) -> None:
        ticket.expected_wait = self._expected_wait(lane)
        self._step_out(ticket, now)
        ticket.state, ticket.refusal = State.REFUSED, refusal
        self._depart(ticket.caller)

    def _expected_wait(self, lane: _Lane) -> float:
        """Seconds until the last of a lane starts: what its limit says, and what the pace of late lets guess."""
        left = self._departures.get(lane.blocked_by)
        if left is None or len(left) < PACE_FROM:
            return lane.wait
        ahead = sum(
            len(other.tickets)
            for other in self._lanes.values()
            if other.blocked_by == lane.blocked_by and other.priority <= lane.priority
        )
        return max(lane.wait, CAUTION * ahead * (left[-1] - left[0]) / (len(left) - 1))

    def _enter(self, ticket: Ticket, now: float) -> bool:
        """Let in a newcomer, where nobody waits."""
        size = ticket.size
        if self.process.wait(size, now):
            return False
        for target in ticket.targets:
            for pool in target.pools:
                if pool.wait(size, now):
                    break
            else:
                self._let_in(ticket, target, now)
                return True
        return False

    def _let_in(self, ticket: Ticket, target: Target, now: float) -> None:
        size = ticket.size
        if not ticket.inside:
            self.process.enter(size, now)
            ticket.inside = True
        for pool in target.pools:
            if (reservation := pool.enter(size, now)) is not None:
                ticket.reservations.append((pool, reservation))
        ticket.target, ticket.state = target, State.HELD
        ticket.guess = guess = _guess(size) / self.weights.get(ticket.caller, 1.0)
        self._busy[ticket.caller].serve(guess, guess)

    def _look(self, ticket: Ticket, now: float, reserved: _Reserved) -> tuple[str, float] | None:
        """Let a head in, and return None; or reserve for it by rule 6, and return the label of the pool that keeps it
        out, and for how many seconds at least."""
        size = ticket.size
        if not ticket.inside and (wait := _wait(self.process, size, now, reserved)):
            for target in ticket.targets:
                ticket.misses(target, {self.process})
            return self.process.label, wait  # and reserves nothing: who holds a place of it may wait for those pools
        name, soonest = "", math.inf
        rates, places = set[Pool](), set[Pool]()
        for target in ticket.targets:
            waits = {pool: wait for pool in target.pools if (wait := _wait(pool, size, now, reserved))}
            if not waits:
                self._let_in(ticket, target, now)
                return None
            rates.update(pool for pool, wait in waits.items() if wait < math.inf)
            if ticket.misses(target, set(waits)) and not places:
                places.update(() if ticket.inside else (self.process,), target.pools)
                places.difference_update(waits)
            blocker = max(waits, key=waits.__getitem__)
            if waits[blocker] < soonest or not name:
                name, soonest = blocker.label, waits[blocker]
        if now - ticket.since >= RESERVE_SECONDS:
            reserved.rates |= rates
            reserved.places |= places
        return name, soonest

    def _leave_target(self, ticket: Ticket, now: float) -> bool:
        """True: somebody may have waited for one of its places."""
        target, freed = ticket.target, False
        assert target is not None
        for pool in target.pools:
            freed |= pool.leave(now)
        ticket.target = None
        return freed

    def _line_up(self, ticket: Ticket, now: float, *, first: bool = False) -> _Lane:
        key = (ticket.priority, ticket.caller, ticket.targets)
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = _Lane(*key)
        lane.tickets[ticket] = None
        if first:
            lane.tickets.move_to_end(ticket, last=False)
        ticket.lane = lane
        ticket.waited_for = lane.blocked_by
        self._waited(lane.blocked_by, -now)
        self.waiting += 1
        self._of_class[ticket.priority] += 1
        self._standing.setdefault(ticket.priority, now)
        return lane

    def _step_out(self, ticket: Ticket, now: float) -> None:
        lane, ticket.lane = ticket.lane, None
        assert lane is not None
        del lane.tickets[ticket]
        self._waited(lane.blocked_by, now)
        self.waiting -= 1
        self._of_class[lane.priority] -= 1
        if not self._of_class[lane.priority]:
            del self._standing[lane.priority]
        if not lane.tickets:
            del self._lanes[(lane.priority, lane.caller, lane.targets)]
        if not self.waiting:
            self._departures.clear()
            self.wake_at = math.inf

    def _waited(self, label: str, seconds: float) -> None:
        self._queued[label] = self._queued.get(label, 0.0) + seconds

    def _note_departure(self, ticket: Ticket, now: float) -> None:
        if ticket.priority is Priority.BATCH:
            self._without_batch = 0
        elif self._of_class[Priority.BATCH]:
            self._without_batch += 1
        if self.waiting:
            self._departures.setdefault(ticket.waited_for, deque(maxlen=PACE_OF)).append(now)

    def _arrive(self, caller: str) -> None:
        who = self._busy.get(caller)
        if who is None:
            who = self._callers.get(caller)
            if who is None:
                who = self._callers[caller] = _Caller()
            # Rule 7; guesses for calls in flight are no service yet.
            least = min((other.service - other.guessed for other in self._busy.values()), default=0.0)
            who.service = max(who.service, least)
            self._busy[caller] = who
        who.busy += 1

    def _depart(self, caller: str) -> None:
        who = self._busy[caller]
        who.busy -= 1
        if not who.busy:
            del self._busy[caller]
            if not self._busy:
                self._callers.clear()

    def _settle(self, ticket: Ticket, used: float) -> None:
        """Put what was used in the place of the guess."""
        self._busy[ticket.caller].serve(used - ticket.guess, -ticket.guess)
        ticket.guess = 0.0


def _wait(pool: Pool, size: Size, now: float, reserved: _Reserved) -> float:
    """As `Pool.wait`. What is kept for another is free when that one has entered, and time does not tell when."""
    return math.inf if reserved.keeps(pool) else pool.wait(size, now)


def _guess(size: Size) -> float:
    output = OUTPUT_GUESS if size.max_tokens is None else min(OUTPUT_GUESS, size.max_tokens)
    return size.input_tokens + OUTPUT_WEIGHT * output
