"""The gate's rules, checked against every history Hypothesis can invent; the numbers are those of its docstring."""

import math
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from proxy.core.gate import (
    AGING_SECONDS,
    CAUTION,
    OVERLOAD_WAIT,
    RESERVE_SECONDS,
    Gate,
    Priority,
    Refusal,
    State,
)
from proxy.core.learner import Learner, Size
from proxy.core.pool import Pool


@dataclass(frozen=True, eq=False)
class To:
    """A target: something with pools."""

    pools: tuple[Pool, ...]
    account: Pool | None = None


def places(name, concurrency):
    return Pool(name, name, concurrency)


def rated(name, *, requests=None, tokens=None, concurrency=None):
    """Per minute; the burst is six seconds' worth."""
    rates = Learner(requests_per_minute=requests, tokens_per_minute=tokens, learn=False)
    return Pool(name, name, concurrency, rates)


def gate_of(concurrency, *, queue_limit=1000, weights=None, overload=()):
    return Gate(places("process", concurrency), queue_limit, weights, frozenset(overload))


def weigh(tokens):
    return Size(input_tokens=float(tokens), max_tokens=0)


ONE = weigh(1)
NOWHERE = (To(()),)  # takes from nothing but the process


def ask(gate, targets=NOWHERE, *, size=ONE, priority=Priority.DEFAULT, caller="", now=0.0, deadline=math.inf):
    return gate.ask(now, targets, size, priority=priority, caller=caller, deadline=deadline)


def leave(gate, ticket, now):
    """End a ticket as `limits.local` does: what it reserved is settled first."""
    settle(gate, ticket, now)
    gate.end(ticket, now)


def pause(gate, ticket, now):
    settle(gate, ticket, now)
    gate.pause(ticket, now)


def settle(gate, ticket, now):
    more = [pool.rates.settle(reservation, None, now) for pool, reservation in ticket.reservations]
    ticket.reservations.clear()
    if any(more):
        gate.advance(now)


def let_in(gate):
    """Those let in since the last look, in their order."""
    woken, gate.woken = gate.woken, []
    return woken


def drained(gate, held, *, now):
    """End the one inside, and each that comes in after it; those who came in, in their order."""
    order = []
    while True:
        leave(gate, held, now)
        woken = let_in(gate)
        if not woken:
            return order
        (held,) = woken
        order.append(held)


class Histories(RuleBasedStateMachine):
    """Targets that share pools, places and rates among them; three callers of three classes."""

    overload = ()

    def __init__(self):
        super().__init__()
        self.now = 100.0
        self.gate = gate_of(4, queue_limit=6, weights={"heavy": 3.0}, overload=self.overload)
        self.requests = rated("requests", requests=60, concurrency=5)
        shared, own = places("shared", 3), places("own", 1)
        self.tokens = tokens = rated("tokens", tokens=600)
        self.pools = (self.gate.process, shared, own, self.requests, tokens)
        near, far, free = To((shared, own)), To((shared, self.requests)), To((self.requests,))
        self.routes = ((near,), (far,), (near, far), (free,), (To((tokens,)),), (To((tokens, shared)), near))
        self.tickets = []
        self.served = {}  # when a lane that still has somebody was last served
        self.lanes = {}  # those who wait alike, in the order in which they must enter
        self.sent = []  # when somebody took from `requests` ...
        self.spent = []  # ... and how much from `tokens`
        self.areas = {pool.label: [0.0, 0.0, 0.0] for pool in self.pools}  # under in use, waiting and full, over time

    # ── what happens ──

    @rule(
        route=st.integers(0, 5),
        tokens=st.sampled_from((0, 1, 20, 60, 200)),
        priority=st.sampled_from(Priority),
        caller=st.sampled_from(("", "light", "heavy")),
        patience=st.sampled_from((0.5, 10.0, math.inf)),
    )
    def ask(self, route, tokens, priority, caller, patience):
        waiting, deadline, size = self.gate.waiting, self.now + patience, weigh(tokens)
        with self.event() as subject:
            ticket = self.gate.ask(
                self.now, self.routes[route], size, priority=priority, caller=caller, deadline=deadline
            )
            self.tickets.append(ticket)
            subject.append(ticket)
            if ticket.state is not State.REFUSED:
                self.lane(ticket).append(ticket)
        if ticket.state is State.REFUSED:
            assert ticket.waited_for
            assert self.lane(ticket) or not self.has_room(ticket, besides=self.reserved(ticket))
            if ticket.refusal is Refusal.LATE:  # rule 9
                assert patience < ticket.expected_wait < math.inf
            else:
                assert ticket.refusal is Refusal.FULL
                assert self.gate.waiting >= self.gate.queue_limit
        assert ticket.state is not State.WAITING or self.gate.waiting <= max(waiting, self.gate.queue_limit)

    @precondition(lambda self: self.those(State.HELD))
    @rule(pick=st.integers(0))
    def pause(self, pick):
        """Rule 5."""
        ticket = self.one_of(pick, State.HELD)
        with self.event():
            pause(self.gate, ticket, self.now)
        assert ticket.state is State.PAUSED
        assert ticket.inside

    @precondition(lambda self: self.those(State.PAUSED))
    @rule(pick=st.integers(0), route=st.integers(0, 5))
    def again(self, pick, route):
        """Rule 5: at the head of its lane, and never refused, however many wait."""
        ticket = self.one_of(pick, State.PAUSED)
        with self.event() as subject:
            self.gate.again(ticket, self.routes[route], self.now)
            subject.append(ticket)
            self.lane(ticket).insert(0, ticket)
        assert ticket.state in (State.HELD, State.WAITING)

    @precondition(lambda self: self.tickets)
    @rule(pick=st.integers(0), use=st.none() | st.tuples(st.integers(0, 300), st.integers(0, 300)))
    def end(self, pick, use):
        ticket = self.tickets[pick % len(self.tickets)]
        with self.event():
            if ticket.state is State.HELD and use is not None:
                self.gate.served(ticket, *use)
            if ticket.state is State.WAITING:
                self.lane(ticket).remove(ticket)
            leave(self.gate, ticket, self.now)
        books = self.books()
        self.gate.end(ticket, self.now)  # rule 4
        assert self.books() == books
        assert ticket.state in (State.ENDED, State.REFUSED)

    @rule(eighths=st.integers(1, 400))
    def time_passes(self, eighths):
        """The owner asks again when the gate told it to, and not else; so `wake_at` is held to its word."""
        until, looks = self.now + eighths / 8, 0
        while self.gate.wake_at <= until:
            looks = looks + 1 if self.gate.wake_at <= self.now else 0
            assert looks < 3, "the gate wants to be asked again and again at one instant"
            self.be(max(self.now, self.gate.wake_at))
            with self.event():
                self.gate.advance(self.now)
        self.be(until)

    @rule(pick=st.integers(0, 3), concurrency=st.integers(0, 5), queue_limit=st.integers(0, 8))
    def resize(self, pick, concurrency, queue_limit):
        before = [pool.in_use for pool in self.pools]
        with self.event():
            self.pools[pick].resize(concurrency, self.now)
            self.gate.queue_limit = queue_limit
            self.gate.advance(self.now)
        assert all(pool.in_use >= was for pool, was in zip(self.pools, before, strict=True))  # rule 1

    def teardown(self):
        """Nobody waits for ever, and nothing is left."""
        for pick in range(4):
            self.resize(pick, 1, 6)
        for _ in range(2 * len(self.tickets) + 1):
            for pick, ticket in enumerate(self.tickets):
                if ticket.state in (State.HELD, State.PAUSED):
                    self.end(pick, None)
            if self.gate.wake_at < math.inf:
                self.time_passes(8 * math.ceil(self.gate.wake_at - self.now))
        assert not self.those(State.WAITING, State.HELD, State.PAUSED)
        assert [pool.in_use for pool in self.pools] == [0] * len(self.pools)
        assert (self.gate.waiting, self.gate.wake_at) == (0, math.inf)

    def be(self, then):
        """Let nothing happen until `then`."""
        for level in self.gate.levels(self.pools, self.now):
            is_full = level.concurrency is not None and level.in_use >= level.concurrency
            for kind, height in enumerate((level.in_use, sum(level.waiting.values()), is_full)):
                self.areas[level.label][kind] += height * (then - self.now)
        self.now = then

    # ── what must hold ──

    @contextmanager
    def event(self):
        """One thing that happens to the gate, and the check of whom it let in."""
        held, inside = set(self.those(State.HELD)), {ticket for ticket in self.tickets if ticket.inside}
        subject = []  # whoever asks in this event learns by its state, and need not be woken
        yield subject
        entered = [ticket for ticket in self.those(State.HELD) if ticket not in held]
        shed = [ticket for lane in self.lanes.values() for ticket in lane if ticket.state is State.REFUSED]
        for ticket in shed:  # rule 10
            assert ticket.refusal is Refusal.OVERLOAD
            assert ticket.priority in self.overload
            assert self.now - ticket.since >= OVERLOAD_WAIT
            self.lane(ticket).remove(ticket)
        woken, self.gate.woken = self.gate.woken, []
        assert len(set(woken)) == len(woken)
        assert set(woken) - set(subject) == {*entered, *shed} - set(subject)
        for ticket in entered:  # rule 1
            pools = ticket.target.pools if ticket in inside else (self.gate.process, *ticket.target.pools)
            assert all(pool.concurrency is None or pool.in_use <= pool.concurrency for pool in pools)
            if self.requests in pools:
                self.sent.append(self.now)
            if self.tokens in pools:
                self.spent.append((self.now, ticket.size.input_tokens))
        for ticket in entered:  # rule 2: nobody ahead of it in its lane stays behind
            lane = self.lane(ticket)
            ahead, behind = lane[: lane.index(ticket)], lane[lane.index(ticket) + 1 :]
            may_be_newest_first = ticket.priority in self.overload and not any(other.inside for other in ahead)
            assert set(ahead) <= set(entered) or (may_be_newest_first and set(behind) <= set(entered))
        for ticket in entered:
            self.lane(ticket).remove(ticket)
        if len(entered) == 1 and entered[0].priority is not Priority.BATCH:  # whose share is its own (rule 8)
            self.had_the_best_turn(entered[0], was_inside=entered[0] in inside)
        for ticket in entered:
            self.served[self.key(ticket)] = self.now
        self.served = {key: at for key, at in self.served.items() if self.lanes.get(key)}

    def had_the_best_turn(self, ticket, *, was_inside):
        """Rule 2: nobody who stands before it was left behind and could have had what it took."""
        process = self.gate.process
        taken = {*ticket.target.pools} if was_inside else {process, *ticket.target.pools}

        def had_room(pool):
            return pool.rates is None and (pool.concurrency is None or pool.in_use - (pool in taken) < pool.concurrency)

        for other in self.heads():
            if self.lane(other) is self.lane(ticket):
                continue  # where not the time counts, but who stands first
            kept = self.reserved(other)
            if self.stands_before(other, ticket) and (other.inside or (process not in kept and had_room(process))):
                assert not any(
                    all(pool not in kept and had_room(pool) for pool in target.pools) for target in other.targets
                )

    def stands_before(self, one, other):
        mine, its = (
            ticket.priority - int((self.now - self.unserved_since(ticket)) / AGING_SECONDS) for ticket in (one, other)
        )
        return mine < its or (mine == its and one.caller == other.caller and one.since < other.since)

    @invariant()
    def the_books_balance(self):
        held = self.those(State.HELD)
        for pool in self.pools[1:]:
            assert pool.in_use == sum(pool in ticket.target.pools for ticket in held)
        assert self.gate.process.in_use == sum(ticket.inside for ticket in self.tickets)
        assert self.gate.waiting == len(self.those(State.WAITING)) == sum(map(len, self.lanes.values()))
        levels = list(self.gate.levels(self.pools, self.now))
        assert [level.in_use for level in levels] == [pool.in_use for pool in self.pools]
        assert sum(sum(level.waiting.values()) for level in levels) == self.gate.waiting

    @invariant()
    def what_it_counted_is_what_was_seen(self):
        for level in self.gate.levels(self.pools, self.now):
            counted = (level.held_seconds, level.queued_seconds, level.full_seconds)
            assert counted == pytest.approx(self.areas[level.label], abs=1e-6)

    @invariant()
    def a_state_says_what_is_held(self):
        for ticket in self.tickets:
            assert (ticket.target is not None) == (ticket.state is State.HELD)
            assert ticket.inside or ticket.state not in (State.HELD, State.PAUSED)
            assert not ticket.inside or ticket.state not in (State.REFUSED, State.ENDED)

    @invariant()
    def nobody_waits_while_there_is_room(self):
        """Rule 3."""
        for head in self.heads():
            assert not self.has_room(head, besides=self.reserved(head))

    @invariant()
    def whoever_waits_can_say_what_for(self):
        labels = {pool.label for pool in self.pools}
        assert all(ticket.waited_for in labels for ticket in self.those(State.WAITING))

    @invariant()
    def no_more_is_sent_than_the_rate_allows(self):
        """60 calls a minute, 6 at once; 600 tokens a minute, 60 at once, and one call dearer than that."""
        for index, began in enumerate(self.sent):
            assert len(self.sent) - index <= 6 + (self.now - began) * 1.0 + 1e-6
        for index, (began, _) in enumerate(self.spent):
            spent = [tokens for _, tokens in self.spent[index:]]
            assert sum(spent) - max(spent) <= 60 + (self.now - began) * 10.0 + 1e-6

    # ── to ask about ──

    def those(self, *states):
        return [ticket for ticket in self.tickets if ticket.state in states]

    def one_of(self, pick, state):
        those = self.those(state)
        return those[pick % len(those)]

    def unserved_since(self, ticket):
        return max(ticket.since, self.served.get(self.key(ticket), -math.inf))

    def key(self, ticket):
        return ticket.priority, ticket.caller, ticket.targets

    def lane(self, ticket):
        return self.lanes.setdefault(self.key(ticket), [])

    def heads(self):
        """Who must enter next of each lane; where that may be either end (rule 10), none."""
        lanes = [lane for lane in self.lanes.values() if lane]
        return [lane[0] for lane in lanes if len(lane) == 1 or lane[0].inside or lane[0].priority not in self.overload]

    def books(self):
        states = [ticket.state for ticket in self.tickets]
        return [pool.in_use for pool in self.pools], self.gate.waiting, states, list(self.gate.woken)

    def has_room(self, ticket, besides):
        process = self.gate.process
        if not ticket.inside and (process in besides or process.wait(ticket.size, self.now)):
            return False
        return any(
            not any(pool in besides or pool.wait(ticket.size, self.now) for pool in target.pools)
            for target in ticket.targets
        )

    def reserved(self, ticket):
        """Rule 6: what others lack who have waited long, and the last places of what they have missed in turns."""
        long = [
            other
            for lane in self.lanes.values()
            for other in {*lane[:1], *lane[-1:]}
            if other is not ticket and self.now - other.since >= RESERVE_SECONDS
        ]
        rates = {
            pool
            for other in long
            for target in other.targets
            for pool in target.pools
            if 0.0 < pool.wait(other.size, self.now) < math.inf
        }
        places = {
            pool
            for other in long
            for target, missed in other.missed.items()
            if not missed
            for pool in (self.gate.process, *target.pools)
            if pool.concurrency is not None and pool.in_use + 1 >= pool.concurrency
        }
        return rates | places


class OverloadedHistories(Histories):
    """The same, where the newest may go first and the oldest may be sent away."""

    overload = (Priority.INTERACTIVE, Priority.DEFAULT)


TestHistories, TestOverloadedHistories = Histories.TestCase, OverloadedHistories.TestCase
TestHistories.settings = TestOverloadedHistories.settings = settings(
    max_examples=100, stateful_step_count=40, deadline=None
)


# ── rule 1 ──


def test_lowering_a_pool_revokes_nothing_and_lets_nobody_in_until_it_has_drained():
    pool = places("pool", 3)
    gate, to = gate_of(10), (To((pool,)),)
    inside = [ask(gate, to) for _ in range(3)]
    waiter = ask(gate, to)
    pool.concurrency = 1
    gate.advance(0.0)
    for ticket in inside:
        assert ticket.state is State.HELD
        assert waiter.state is State.WAITING
        leave(gate, ticket, 0.0)
    assert waiter.state is State.HELD


def test_raising_a_pool_lets_in_as_many_as_it_grew_by():
    pool = places("pool", 0)
    gate, to = gate_of(10), (To((pool,)),)
    waiters = [ask(gate, to) for _ in range(5)]
    pool.concurrency = 3
    gate.advance(0.0)
    assert [ticket.state for ticket in waiters] == [State.HELD] * 3 + [State.WAITING] * 2
    assert gate.woken == waiters[:3]


# ── rule 2 ──


def test_the_better_class_goes_first_and_then_who_came_first():
    gate = gate_of(1)
    held = ask(gate)
    asked = [Priority.BATCH, Priority.DEFAULT, Priority.INTERACTIVE, Priority.DEFAULT, Priority.INTERACTIVE]
    waiters = [ask(gate, priority=priority, now=at / 8) for at, priority in enumerate(asked)]
    assert [waiters.index(ticket) for ticket in drained(gate, held, now=1.0)] == [2, 4, 1, 3, 0]


@pytest.mark.parametrize(
    ("priority", "seconds", "goes_first"),
    [
        (Priority.DEFAULT, 29.9, False),
        (Priority.DEFAULT, 30.1, True),
        (Priority.BATCH, 59.9, False),
        (Priority.BATCH, 60.1, True),
    ],
)
def test_a_wait_of_thirty_seconds_is_worth_one_class(priority, seconds, goes_first):
    gate = gate_of(1)
    held = ask(gate)
    old = ask(gate, priority=priority)
    new = ask(gate, priority=Priority.INTERACTIVE, now=seconds)
    leave(gate, held, seconds)
    assert (old.state is State.HELD, new.state is State.HELD) == (goes_first, not goes_first)


@given(
    st.lists(
        st.tuples(st.lists(st.integers(1, 50), min_size=5, max_size=40), st.sampled_from((0.5, 1.0, 4.0))),
        min_size=2,
        max_size=5,
    ),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
@settings(max_examples=60)
def test_callers_who_always_have_work_get_service_by_their_weights(callers, concurrency, random):
    """However large their calls are, and in whatever order they end."""
    weights = {str(name): weight for name, (_, weight) in enumerate(callers)}
    gate = gate_of(0, weights=weights)
    for name, (sizes, _) in enumerate(callers):
        for size in sizes:
            ask(gate, size=weigh(size), caller=str(name))
    unserved = {str(name): len(sizes) for name, (sizes, _) in enumerate(callers)}
    service = dict.fromkeys(weights, 0.0)
    gate.process.concurrency = concurrency
    gate.advance(0.0)
    inside = []
    while True:
        for ticket in let_in(gate):
            inside.append(ticket)
            unserved[ticket.caller] -= 1
            service[ticket.caller] += ticket.size.input_tokens / weights[ticket.caller]
            if all(unserved.values()):
                assert max(service.values()) - min(service.values()) <= 50 / min(weights.values())
        if not inside:
            break
        leave(gate, inside.pop(random.randrange(len(inside))), 0.0)
    assert not any(unserved.values())


def test_a_caller_that_floods_gets_no_more_than_its_share():
    """Eight callers, sizes 1 to 50; one asks for a hundred times as much as it can get. What is guessed is wrong."""
    gate = gate_of(0, queue_limit=100_000)
    callers = [str(number) for number in range(8)]
    sizes = dict(zip(callers, (1, 2, 5, 10, 20, 30, 40, 50), strict=True))
    service = dict.fromkeys(callers, 0.0)

    def another(caller):
        ask(gate, size=Size(input_tokens=sizes[caller], max_tokens=None), caller=caller)

    for caller in callers:
        for _ in range(5000 if caller == "3" else 50):
            another(caller)
    gate.process.concurrency = 8
    gate.advance(0.0)
    for _ in range(500):
        for ticket in let_in(gate):
            service[ticket.caller] += 3.0 * sizes[ticket.caller]
            gate.served(ticket, sizes[ticket.caller], sizes[ticket.caller])
            another(ticket.caller)
            leave(gate, ticket, 0.0)
    shares = service.values()
    assert sum(shares) ** 2 / (8 * sum(share**2 for share in shares)) >= 0.99  # Jain's index


def test_an_attempt_that_came_to_nothing_is_not_counted_as_service():
    gate = gate_of(0)
    served, refused = (ask(gate, size=weigh(100), caller=caller) for caller in ("served", "refused"))
    gate.process.concurrency = 2
    gate.advance(0.0)
    for _ in range(10):
        pause(gate, refused, 0.0)
        gate.again(refused, NOWHERE, 0.0)
    let_in(gate)
    for at, caller in enumerate(("served", "served", "refused", "refused")):
        ask(gate, size=weigh(60), caller=caller, now=float(at))
    assert [ticket.caller for ticket in drained(gate, served, now=9.0)] == ["served", "refused", "served", "refused"]


# ── rule 3 ──


def test_the_first_target_that_has_room_is_taken():
    best, second = To((places("best", 1),)), To((places("second", 1),))
    gate = gate_of(10)
    tickets = [ask(gate, (best, second)) for _ in range(3)]
    assert [ticket.target for ticket in tickets] == [best, second, None]
    leave(gate, tickets[1], 0.0)
    assert tickets[2].target is second


def test_whoever_waits_for_one_pool_does_not_hold_up_those_who_need_another():
    shared, full = places("shared", 2), places("full", 0)
    gate = gate_of(10)
    blocked = ask(gate, (To((shared, full)),))
    assert ask(gate, (To((shared,)),)).state is State.HELD
    assert blocked.state is State.WAITING
    assert blocked.waited_for == "full"
    assert shared.in_use == 1  # who waits holds nothing


def test_a_full_queue_refuses_whom_it_cannot_seat_and_nobody_else():
    free, full = To((places("free", 1),)), To((places("full", 0),))
    gate = gate_of(10, queue_limit=2)
    assert [ask(gate, (full,)).state for _ in range(3)] == [State.WAITING, State.WAITING, State.REFUSED]
    assert ask(gate, (free,)).state is State.HELD
    assert gate.waiting == 2


def test_a_queue_of_none_refuses_at_once_and_says_what_was_full():
    gate = gate_of(1, queue_limit=0)
    held = ask(gate)
    refused = ask(gate)
    assert (refused.state, refused.waited_for) == (State.REFUSED, "process")
    leave(gate, held, 0.0)
    assert ask(gate).state is State.HELD


# ── rule 4 ──


@pytest.mark.parametrize("state", [State.HELD, State.WAITING, State.PAUSED, State.REFUSED])
def test_ending_a_ticket_again_changes_nothing(state):
    gate = gate_of(2, queue_limit=1)
    kept = ask(gate)
    ticket = ask(gate)
    if state is State.PAUSED:
        pause(gate, ticket, 0.0)
    elif state in (State.WAITING, State.REFUSED):
        ticket = ask(gate)
        if state is State.REFUSED:
            ticket = ask(gate)
    assert ticket.state is state
    gate.end(ticket, 0.0)
    books = (gate.process.in_use, gate.waiting)
    gate.end(ticket, 0.0)
    assert (gate.process.in_use, gate.waiting) == books
    assert kept.state is State.HELD


# ── rule 5 ──


def test_a_pause_gives_the_target_to_another_and_keeps_the_place_in_the_process():
    pool = places("pool", 1)
    gate, to = gate_of(2), (To((pool,)),)
    refused = ask(gate, to)
    waiters = [ask(gate, to) for _ in range(2)]
    pause(gate, refused, 0.0)
    assert waiters[0].state is State.HELD
    assert (pool.in_use, gate.process.in_use) == (1, 2)
    gate.again(refused, to, 0.0)
    leave(gate, waiters[0], 0.0)
    assert refused.state is State.HELD  # before the second waiter, who came earlier
    assert waiters[1].state is State.WAITING


def test_whoever_asks_again_says_what_it_waits_for_now():
    near, far = places("near", 0), places("far", 0)
    gate = gate_of(2)
    ticket = ask(gate, (To((near,)),))
    near.concurrency = 1
    gate.advance(0.0)
    pause(gate, ticket, 0.0)
    gate.again(ticket, (To((far,)),), 0.0)
    assert ticket.waited_for == "far"


# ── rule 6 ──


@given(st.integers(2, 200), st.integers(1, 5), st.sampled_from((60, 600, 6000)), st.sampled_from(("a", "b")))
@settings(max_examples=60)
def test_a_large_call_gets_in_though_small_ones_never_cease(large, small, per_minute, caller):
    """After it has waited 2 s it waits no longer than its own tokens take to flow in."""
    rate = per_minute / 60
    pool = rated("pool", tokens=per_minute)
    gate, to = gate_of(1000, queue_limit=20), (To((pool,)),)
    now = 0.0
    while not gate.waiting:
        ask(gate, to, size=weigh(small), caller="a", now=now)
    one = ask(gate, to, size=weigh(large), caller=caller, now=now)
    owed = small * gate.waiting / rate  # those of its caller who came before it
    while one.state is State.WAITING:
        now += small / rate / 2  # twice as many come as can be served
        gate.advance(now)
        let_in(gate)
        if one.state is State.WAITING:
            ask(gate, to, size=weigh(small), caller="a", now=now)
        assert now <= RESERVE_SECONDS + owed + (min(large, max(1.0, rate * 6)) + 3 * small) / rate


def test_a_reservation_holds_against_newcomers_even_when_the_queue_is_full():
    pool = rated("pool", tokens=600)  # 60 at once, 10 a second
    gate, to = gate_of(100, queue_limit=1), (To((pool,)),)
    ask(gate, to, size=weigh(60))
    large = ask(gate, to, size=weigh(60))
    gate.advance(RESERVE_SECONDS)
    assert ask(gate, to, size=weigh(5), now=RESERVE_SECONDS).state is State.REFUSED
    gate.advance(6.0)
    assert large.state is State.HELD


def test_whoever_a_reservation_holds_up_does_not_keep_the_owner_busy():
    pool = rated("pool", tokens=600)
    gate, to = gate_of(100), (To((pool,)),)
    ask(gate, to, size=weigh(60))
    large = ask(gate, to, size=weigh(60), caller="a")
    gate.advance(RESERVE_SECONDS)
    small = ask(gate, to, size=weigh(5), caller="b", priority=Priority.BATCH, now=RESERVE_SECONDS)
    assert small.state is State.WAITING
    assert gate.wake_at == pytest.approx(6.0)
    gate.advance(6.0)
    assert large.state is State.HELD
    assert gate.wake_at == pytest.approx(6.5)


def test_a_reservation_does_not_hold_up_those_of_a_better_turn():
    pool = rated("pool", tokens=600)
    gate, to = gate_of(100), (To((pool,)),)
    ask(gate, to, size=weigh(60))
    ask(gate, to, size=weigh(60), priority=Priority.BATCH)
    gate.advance(RESERVE_SECONDS)
    urgent = ask(gate, to, size=weigh(5), priority=Priority.INTERACTIVE, now=RESERVE_SECONDS)
    assert urgent.state is State.HELD


def busy_pools(gate, pools, now=0.0):
    """Each pool full, and its own traffic waiting for it; `turn` ends who is inside of one, and one more comes."""
    inside = {pool: ask(gate, (To((pool,)),), caller=pool.name, now=now) for pool in pools}
    for pool in pools:
        ask(gate, (To((pool,)),), caller=pool.name, now=now)
    let_in(gate)

    def turn(pool, now):
        leave(gate, inside[pool], now)
        for ticket in let_in(gate):
            inside[ticket.target.pools[0]] = ticket
        ask(gate, (To((pool,)),), caller=pool.name, now=now)

    return turn


def test_a_call_that_needs_places_in_two_pools_gets_in_though_each_of_them_is_never_idle():
    one, other = places("one", 1), places("other", 1)
    gate = gate_of(100)
    turn = busy_pools(gate, (one, other))
    both = ask(gate, (To((one, other)),), caller="both")
    now = 0.0
    while both.state is State.WAITING:
        now += 0.5
        turn(one if now % 1.0 else other, now)
        assert now <= RESERVE_SECONDS + 1.0  # the next place of each
    assert (one.in_use, other.in_use) == (1, 1)


def test_a_place_is_kept_for_nobody_whom_one_pool_keeps_out_all_the_time():
    free, full = places("free", 1), places("full", 0)
    gate = gate_of(100)
    ask(gate, (To((free, full)),))
    turn = busy_pools(gate, (free,), now=10.0)
    for now in (11.0, 12.0, 13.0):
        turn(free, now)
        assert free.in_use == 1


def test_whoever_is_inside_already_is_not_held_up_by_one_who_waits_for_the_process():
    """Neither would ever move: one keeps the pool, the other the place in the process."""
    pool, other = places("pool", 1), places("other", 1)
    gate = gate_of(2)
    inside, elsewhere = ask(gate, (To((pool,)),), priority=Priority.BATCH), ask(gate, (To((other,)),))
    both = ask(gate, (To((pool, other)),), priority=Priority.INTERACTIVE)
    for now in (2.0, 3.0):
        pause(gate, inside, now)
        gate.again(inside, (To((pool,)),), now)
    assert (inside.state, both.state) == (State.HELD, State.WAITING)
    leave(gate, elsewhere, 4.0)
    leave(gate, inside, 4.0)
    assert both.state is State.HELD


POOLS = st.lists(st.sampled_from(("one", "two", "three", "tokens")), min_size=1, max_size=3, unique=True)
LANES = st.lists(
    st.tuples(
        st.sampled_from(Priority),
        st.sampled_from(("a", "b", "c")),
        st.lists(POOLS, min_size=1, max_size=2),
        st.sampled_from((1, 20, 60)),
    ),
    min_size=2,
    max_size=6,
)


@given(LANES, st.integers(1, 6), st.integers(1, 2), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_no_caller_with_a_feasible_head_waits_for_ever(lanes, process, concurrency, seed):
    """Everybody always has more; calls take up to 3 s, and whatever they need is free at some time."""
    pools = {name: places(name, concurrency) for name in ("one", "two", "three")} | {
        "tokens": rated("tokens", tokens=600)  # 60 at once, 10 a second
    }
    routes = [tuple(To(tuple(pools[name] for name in names)) for names in targets) for _, _, targets, _ in lanes]
    gate, now, random = gate_of(process), 0.0, Random(seed)
    waiting, inside = {}, []

    def another(number):
        priority, caller, _, tokens = lanes[number]
        ticket = ask(gate, routes[number], size=weigh(tokens), priority=priority, caller=caller, now=now)
        waiting[ticket] = number

    for number in 2 * [*range(len(lanes))]:
        another(number)
    while now < 400.0:
        gate.woken.clear()
        entered = [ticket for ticket in waiting if ticket.state is State.HELD]
        inside += [(now + random.uniform(0.1, 3.0), waiting.pop(ticket), ticket) for ticket in entered]
        assert all(now - ticket.since <= 200.0 for ticket in waiting)
        inside.sort(key=lambda entry: entry[:2])
        if inside and inside[0][0] <= gate.wake_at:
            now, number, ticket = inside.pop(0)
            leave(gate, ticket, now)
            another(number)
        else:
            now = max(now, gate.wake_at)
            gate.advance(now)


# ── rule 7 ──


def test_a_caller_that_was_idle_has_saved_up_no_turns():
    gate = gate_of(1)
    leave(gate, ask(gate, caller="idle"), 0.0)
    held = ask(gate, caller="busy")
    for _ in range(60):
        ask(gate, caller="busy")
    for _ in range(40):
        leave(gate, held, 0.0)
        (held,) = let_in(gate)
    for _ in range(20):
        ask(gate, caller="idle")
    order = [ticket.caller for ticket in drained(gate, held, now=0.0)][:20]
    assert 9 <= order.count("idle") <= 11


def test_a_caller_cannot_shed_its_service_by_leaving_for_a_moment():
    gate = gate_of(1)
    held = ask(gate, caller="steady")
    for _ in range(3):
        ask(gate, caller="steady")
    visitor = ask(gate, caller="visitor", size=weigh(1000))
    leave(gate, held, 0.0)
    while visitor.state is State.WAITING:
        leave(gate, let_in(gate)[0], 0.0)
    leave(gate, visitor, 0.0)
    ask(gate, caller="visitor")
    for _ in range(3):
        ask(gate, caller="steady", now=1.0)
    order = [ticket.caller for ticket in drained(gate, let_in(gate)[-1], now=1.0)]
    assert order[-1] == "visitor"


def test_when_all_have_left_everybody_begins_anew():
    gate = gate_of(1)
    for _ in range(5):
        leave(gate, ask(gate, caller="a", size=weigh(1000)), 0.0)
    held = ask(gate, caller="c")
    ask(gate, caller="a")
    ask(gate, caller="b", now=1.0)
    assert [ticket.caller for ticket in drained(gate, held, now=1.0)] == ["a", "b"]


# ── rule 8 ──


def test_batch_calls_keep_a_share_of_the_turns():
    gate = gate_of(1)
    held = ask(gate)
    for _ in range(100):
        ask(gate, priority=Priority.INTERACTIVE)
    for _ in range(10):
        ask(gate, priority=Priority.BATCH)
    order = [ticket.priority for ticket in drained(gate, held, now=1.0)]
    assert [place for place, priority in enumerate(order[:100]) if priority is Priority.BATCH] == [19, 39, 59, 79, 99]


def test_batch_calls_save_up_no_share_while_none_waits():
    gate = gate_of(1)
    held = ask(gate)
    for _ in range(100):
        ask(gate)
    for _ in range(60):
        leave(gate, held, 0.0)
        (held,) = let_in(gate)
    ask(gate, priority=Priority.BATCH)
    order = [ticket.priority for ticket in drained(gate, held, now=0.0)]
    assert order.index(Priority.BATCH) == 19


# ── rule 9 ──


def test_who_would_wait_beyond_the_deadline_is_refused_at_once():
    gate = gate_of(1)
    held, now = ask(gate), 0.0
    for _ in range(20):
        ask(gate)
    hopeful = ask(gate, now=now, deadline=1.0)
    assert hopeful.state is State.WAITING  # nothing has left yet, so nothing is known
    for _ in range(10):
        now += 2.0
        leave(gate, held, now)
        (held,) = let_in(gate)
    late = ask(gate, now=now, deadline=now + 15.0)
    assert (late.state, late.refusal) == (State.REFUSED, Refusal.LATE)
    assert late.expected_wait == pytest.approx(CAUTION * 2.0 * (gate.waiting + 1))
    early = ask(gate, now=now, deadline=now + 25.0)
    assert early.state is State.WAITING
    gate.end(late, now)
    assert (gate.waiting, gate.process.in_use) == (12, 1)


def test_a_rate_says_itself_how_long_the_wait_will_be():
    pool = rated("pool", requests=60)  # 6 at once, 1 a second
    gate, to = gate_of(100), (To((pool,)),)
    for _ in range(6):
        ask(gate, to)
    late = ask(gate, to, deadline=0.5)
    assert (late.state, late.refusal, late.waited_for) == (State.REFUSED, Refusal.LATE, "pool")
    assert late.expected_wait == pytest.approx(1.0)
    assert ask(gate, to, deadline=1.5).state is State.WAITING


class Counted(Learner):
    """Counts how often it is asked."""

    looks = 0

    def wait(self, size, now):
        self.looks += 1
        return super().wait(size, now)


def test_who_waits_for_a_rate_is_looked_at_when_it_may_have_room_and_not_whenever_somebody_leaves():
    rates = Counted(requests_per_minute=60, learn=False)
    targets = (To((Pool("account", "account", 100, rates),)),)
    gate = gate_of(100)
    inside = [ask(gate, targets) for _ in range(6)]  # all that may go at once
    waiting = [ask(gate, targets, caller=str(number)) for number in range(3)]
    rates.looks = 0
    for ticket in inside:
        leave(gate, ticket, 0.5)
    assert rates.looks == 0
    assert gate.wake_at == pytest.approx(1.0)
    gate.advance(1.0)
    assert let_in(gate) == waiting[:1]
    assert rates.looks == len(waiting)


def test_a_better_class_does_not_wait_for_those_behind_it():
    gate, now = gate_of(1), 0.0
    held = ask(gate)
    for _ in range(30):
        ask(gate, priority=Priority.BATCH)
    for _ in range(10):
        now += 2.0
        leave(gate, held, now)
        (held,) = let_in(gate)
    assert ask(gate, now=now, deadline=now + 5.0, priority=Priority.BATCH).refusal is Refusal.LATE
    assert ask(gate, now=now, deadline=now + 5.0, priority=Priority.INTERACTIVE).state is State.WAITING


# ── rule 10 ──


def test_an_overloaded_class_serves_the_newest_and_refuses_who_waited_long():
    gate = Gate(places("process", 1), 100, overload=frozenset({Priority.INTERACTIVE}))
    held = gate.ask(0.0, NOWHERE, weigh(1), priority=Priority.INTERACTIVE)
    waiting = [gate.ask(at, NOWHERE, weigh(1), priority=Priority.INTERACTIVE) for at in (0.0, 0.1, 0.2)]
    patient = gate.ask(0.0, NOWHERE, weigh(1), priority=Priority.DEFAULT)
    assert gate.wake_at == pytest.approx(2.0)  # when the first has waited too long
    gate.end(held, 1.0)  # the queue has stood for longer than half a second
    assert [ticket.state for ticket in waiting] == [State.WAITING, State.WAITING, State.HELD]
    gate.advance(2.05)
    assert [ticket.refusal for ticket in waiting] == [Refusal.OVERLOAD, None, None]
    assert gate.woken == [waiting[2], waiting[0]]
    gate.advance(2.15)
    assert waiting[1].refusal is Refusal.OVERLOAD
    assert patient.state is State.WAITING
    gate.end(waiting[2], 3.0)
    assert (patient.state, gate.waiting) == (State.HELD, 0)


def test_a_short_queue_is_no_overload():
    gate = Gate(places("process", 1), 100, overload=frozenset({Priority.INTERACTIVE}))
    held = gate.ask(0.0, NOWHERE, weigh(1), priority=Priority.INTERACTIVE)
    first, second = (gate.ask(at, NOWHERE, weigh(1), priority=Priority.INTERACTIVE) for at in (0.0, 0.1))
    gate.end(held, 0.3)
    assert (first.state, second.state) == (State.HELD, State.WAITING)


def test_batch_calls_have_all_the_time_there_is():
    gate = gate_of(1, overload=(Priority.INTERACTIVE, Priority.DEFAULT))
    held = ask(gate)
    waiters = [ask(gate, priority=Priority.BATCH, now=now) for now in (0.0, 100.0, 200.0)]
    leave(gate, held, 300.0)
    assert [ticket.state for ticket in waiters] == [State.HELD, State.WAITING, State.WAITING]


def test_whoever_is_inside_already_goes_before_the_newest_and_is_not_refused():
    """Rule 5 holds in overload too."""
    pool = places("pool", 1)
    gate, to = gate_of(2, overload=[Priority.DEFAULT]), (To((pool,)),)
    refused, other = ask(gate, to), ask(gate, to)
    pause(gate, refused, 0.0)
    assert other.state is State.HELD
    gate.again(refused, to, 0.0)
    for now in (2.0, 4.0, 6.0, 8.0):
        ask(gate, to, now=now)
    let_in(gate)
    leave(gate, other, 8.0)
    assert let_in(gate) == [refused]


# ── what it tells ──


def test_its_levels_tell_who_waits_for_what():
    full, other = places("full", 1), places("other", None)
    gate, to = gate_of(10), (To((full,)),)
    ask(gate, to)
    ask(gate, to)
    ask(gate, to, priority=Priority.BATCH)
    levels = {level.label: level for level in gate.levels((gate.process, full, other), 0.0)}
    assert (levels["full"].concurrency, levels["full"].in_use) == (1, 1)
    assert levels["full"].waiting == {Priority.DEFAULT: 1, Priority.BATCH: 1}
    assert levels["process"].in_use == 1
    assert (levels["other"].concurrency, levels["other"].waiting) == (None, {})
    assert repr(gate) == "<Gate 1/10 in flight, 2 waiting>"


def test_pools_of_one_label_are_one_level():
    one, two = Pool("one", "both", 5), Pool("two", "both", 5)
    gate = gate_of(10)
    ask(gate, (To((one,)),))
    ask(gate, (To((two,)),))
    assert [(level.label, level.in_use) for level in gate.levels((one, two), 0.0)] == [("both", 2)]


def test_a_newcomer_is_not_lifted_to_guesses_for_calls_in_flight():  # rule 7
    gate = gate_of(20)
    flood = [ask(gate, caller="flood") for _ in range(20)]
    waiting = [ask(gate, caller="flood") for _ in range(20)]
    quiet = ask(gate, caller="quiet")
    for ticket in flood[:2]:
        gate.served(ticket, 1, 1)  # far less than was guessed
        leave(gate, ticket, 1.0)
    assert quiet.state is State.HELD
    assert sum(ticket.state is State.HELD for ticket in waiting) == 1


def test_a_backlog_does_not_age_past_those_who_are_served_in_turn():  # rule 2
    gate = gate_of(1)
    held, now = ask(gate, priority=Priority.BATCH, caller="bulk"), 0.0
    for _ in range(300):
        ask(gate, priority=Priority.BATCH, caller="bulk")
    for _ in range(100):
        now += 1.0
        leave(gate, held, now)
        (held,) = let_in(gate)
    quick = ask(gate, priority=Priority.DEFAULT, caller="quick", now=now)
    leave(gate, held, now + 1.0)
    assert let_in(gate) == [quick]
