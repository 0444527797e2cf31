"""Waiting for places and rates with the real gate, in virtual time: who gets in when, and that nothing is left over."""

import asyncio
import math
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.core.gate import Gate, Priority, State
from proxy.core.learner import Learner, Size
from proxy.core.outcome import Meaning, Outcome, Reason, Retry
from proxy.core.pool import Pool
from proxy.core.usage import Usage
from proxy.errors import Draining, QueueFull, QueueTimeout
from proxy.limits.local import LocalLimits
from tests.virtual_time import START, everybody_waits, in_virtual_time, loop, run

LITTLE = Usage(1, 1)
REFUSED = Meaning(Outcome.THROTTLED, Reason.REQUESTS, Retry.PACED)


@dataclass(frozen=True, eq=False)
class To:
    """A target: something with pools, of which one keeps the provider's own limits."""

    pools: tuple[Pool, ...]
    account: Pool | None = None


class Notes:
    """What the record is told of a wait."""

    def __init__(self):
        self.waits = []
        self.admissions = []
        self.moved = []
        self.stood = []

    def waited(self, kind, started, ended, *, gate="", result="", source="", reason="", stood=None):
        self.stood.append(stood)
        self.waits.append((kind, gate, result, ended - started, source, reason))

    def limit_changed(self, at, gate, limit, before, after, cause):
        self.moved.append((gate, limit, before, after, cause))

    def admission(self, result, gate):
        self.admissions.append((result, gate))


class House:
    """The limits, one target's pool, and the visitors."""

    def __init__(self, *, places=10, pool=None, queue_limit=100, rates=None, overload=()):
        self.gate = Gate(Pool("process", "process", places), queue_limit, overload=frozenset(overload))
        self.limits = LocalLimits(self.gate, loop().time, wall=lambda: 1.7e9, draw=lambda: 0.5)
        self.pool = Pool("pool", "pool", pool, rates)
        self.to = To((self.pool,), self.pool)
        self.visitors = []

    def visit(self, **how):
        visitor = Visitor(self, **how)
        self.visitors.append(visitor)
        return visitor

    async def is_empty(self):
        """Nobody holds or awaits anything, and no timer is left."""
        await asyncio.gather(*(visitor.task for visitor in self.visitors), return_exceptions=True)
        assert (self.gate.process.in_use, self.pool.in_use, self.limits.waiting) == (0, 0, 0)
        assert not self.limits._sleepers
        assert not loop().pending
        if self.pool.rates is not None:
            known = self.pool.rates.snapshot(loop().time())
            assert (known.unanswered, known.reserved) == (0, pytest.approx(0.0, abs=1e-6))


class Visitor:
    """One call: it asks, is refused by the upstream as often as `again` says, and stays."""

    def __init__(
        self, house, *, stay=math.inf, patience=600.0, again=(), priority=Priority.DEFAULT, caller="", used=LITTLE
    ):
        self.house, self.stay, self.again, self.used = house, stay, again, used
        self.notes = Notes()
        self.state = "asking"
        self.entered = []  # when it was let in, seconds since the start
        self.error = None
        self.left_at = None
        self._leave = asyncio.Event()
        self._admission = house.limits.admit(
            (house.to,),
            Size(input_tokens=1.0, max_tokens=0),
            priority=priority,
            caller=caller,
            deadline=loop().time() + patience,
            notes=self.notes,
        )
        self.task = asyncio.create_task(self._visit())

    async def _visit(self):
        try:
            async with self._admission as admission:
                self._enter()
                for after in self.again:
                    admission.settle(None)
                    self.state = "pausing"
                    await admission.again((self.house.to,), after=after, reason="server", source="computed")
                    self._enter()
                try:
                    async with asyncio.timeout(None if self.stay == math.inf else self.stay):
                        await self._leave.wait()
                except TimeoutError:
                    pass
                admission.settle(self.used)
        except (QueueFull, QueueTimeout, Draining) as error:
            self.error = error
        finally:
            self.state, self.left_at = "gone", loop().time() - START

    def _enter(self):
        self.state = "inside"
        self.entered.append(round(loop().time() - START, 5))

    def leave(self):
        self._leave.set()


async def the_gate_lets_in(house):
    """Return when nobody stands at the gate any more, and not so late that those let in have learned of it."""
    for _ in range(10):
        if not house.limits.waiting:
            return
        await asyncio.sleep(0)


def rates(**ceilings):
    return Learner(**ceilings, learn=False, now=START)


# ── coming in ──


@in_virtual_time
async def test_who_finds_room_does_not_wait():
    house = House()
    visitor = house.visit(stay=5.0)
    await visitor.task
    assert visitor.entered == [0.0]
    assert (visitor.notes.admissions, visitor.notes.waits) == ([("immediate", "")], [])
    await house.is_empty()


@in_virtual_time
async def test_who_finds_none_waits_until_another_leaves():
    house = House(pool=1)
    first, second = house.visit(stay=5.0), house.visit(stay=1.0)
    await asyncio.gather(first.task, second.task)
    assert second.entered == [5.0]
    assert second.notes.admissions == [("queued", "pool")]
    assert second.notes.waits == [("queue", "pool", "admitted", pytest.approx(5.0), "", "")]
    (stood,) = second.notes.stood
    assert (stood.label, stood.concurrency, stood.in_use, stood.waiting) == ("pool", 1, 1, {Priority.DEFAULT: 1})
    await house.is_empty()


@in_virtual_time
async def test_what_it_has_counted_grows_by_the_means_of_what_happened():
    """Two places, three calls of 4 s: two are in while one waits, then that one is, then nobody for 2 s."""
    house = House(pool=2)
    (before,) = house.limits.levels([house.pool])
    began = loop().time()
    await asyncio.gather(*(house.visit(stay=4.0).task for _ in range(3)))
    await asyncio.sleep(2.0)
    (after,) = house.limits.levels([house.pool])
    seconds = loop().time() - began
    assert seconds == 10.0
    assert (after.held_seconds - before.held_seconds) / seconds == pytest.approx(1.2)  # (2 * 4 + 1 * 4) / 10 in use
    assert (after.queued_seconds - before.queued_seconds) / seconds == pytest.approx(0.4)  # 1 * 4 / 10 waiting
    assert (after.full_seconds - before.full_seconds) / seconds == pytest.approx(0.4)  # full for 4 of 10
    await house.is_empty()


@in_virtual_time
async def test_a_queue_that_is_full_refuses_and_says_when_to_come_back():
    house = House(places=1, queue_limit=1)
    house.visit(stay=5.0)
    house.visit(stay=5.0)
    refused = house.visit()
    await refused.task
    assert isinstance(refused.error, QueueFull)
    assert "process" in str(refused.error)
    assert refused.error.retry_after == 1.0
    assert (refused.notes.admissions, refused.notes.waits) == ([("rejected_full", "process")], [])
    assert refused.left_at == 0.0
    await house.is_empty()


@in_virtual_time
async def test_at_the_deadline_a_waiter_is_gone_and_leaves_no_place_behind():
    house = House(pool=1)
    house.visit(stay=10.0)
    late = house.visit(patience=4.0)
    await late.task
    assert isinstance(late.error, QueueTimeout)
    assert "pool" in str(late.error)
    assert late.left_at == pytest.approx(4.0)
    assert late.notes.admissions == [("rejected_timeout", "pool")]
    assert late.notes.waits == [("queue", "pool", "timeout", pytest.approx(4.0), "", "")]
    await house.is_empty()


@in_virtual_time
async def test_a_wait_that_is_known_to_be_too_long_is_not_begun():
    house = House(rates=rates(requests_per_minute=6))  # one at once, one each 10 s
    house.visit(stay=1.0)
    late = house.visit(patience=5.0)
    await late.task
    assert isinstance(late.error, QueueTimeout)
    assert (late.left_at, late.notes.waits) == (0.0, [])
    assert late.notes.admissions == [("rejected_timeout", "pool")]
    assert late.error.retry_after == pytest.approx(10.0)
    await house.is_empty()


@pytest.mark.parametrize("patience", [4.999, 5.0, 5.001])
@in_virtual_time
async def test_a_place_that_comes_free_at_the_very_deadline_is_given_or_not_and_never_lost(patience):
    house = House(pool=1)
    house.visit(stay=5.0)
    late = house.visit(patience=patience, stay=1.0)
    third = house.visit(stay=1.0)
    await asyncio.gather(late.task, third.task)
    assert (late.error is None) == (late.entered == [5.0])
    assert late.notes.waits[0][2] == ("admitted" if late.entered else "timeout")
    assert third.entered == [6.0 if late.entered else 5.0]
    await house.is_empty()


@pytest.mark.parametrize("is_set_first", [True, False])
@in_virtual_time
async def test_room_that_comes_in_the_same_instant_as_the_deadline_still_counts(is_set_first):
    """The timer has fired, but the gate alone says who is in."""
    house = House(places=1)
    at = loop().time() + 5.0
    if is_set_first:
        loop().call_at(at, house.limits.configure, 2, 100, {}, frozenset())
    house.visit(stay=9.0)
    last = house.visit(stay=1.0, patience=5.0)
    await everybody_waits()
    if not is_set_first:
        loop().call_at(at, house.limits.configure, 2, 100, {}, frozenset())
    await last.task
    assert last.entered == [5.0]
    assert last.notes.waits[0][2] == "admitted"
    await house.is_empty()


# ── time lets in ──


@in_virtual_time
async def test_a_rate_lets_the_next_one_in_when_there_is_room_and_not_before():
    house = House(rates=rates(requests_per_minute=60))  # 6 at once, 1 a second
    visitors = [house.visit(stay=0.1) for _ in range(10)]
    await asyncio.gather(*(visitor.task for visitor in visitors))
    entered = [visitor.entered[0] for visitor in visitors]
    assert entered == pytest.approx([0.0] * 6 + [1.0, 2.0, 3.0, 4.0], abs=1e-3)
    await house.is_empty()


@in_virtual_time
async def test_few_timers_fire_however_many_wait():
    house = House(places=1000, rates=rates(requests_per_minute=60))
    for _ in range(200):
        house.visit(stay=0.1)
    await everybody_waits()
    before = loop().iterations
    await asyncio.sleep(50.0)
    assert loop().iterations - before < 50 * 10
    for visitor in house.visitors:
        visitor.task.cancel()
    await house.is_empty()


@in_virtual_time
async def test_a_refusal_holds_everybody_back_until_the_upstreams_own_word():
    house = House(rates=Learner(now=START))
    async with house.limits.admit(
        (house.to,), Size(), priority=Priority.DEFAULT, caller="", deadline=START + 100, notes=Notes()
    ) as admission:
        admission.refused(REFUSED, {}, 7.0)
        admission.settle(None)
        other = house.visit(stay=1.0)
        await admission.again((house.to,), after=0.0, reason="requests", source="retry_after")
        assert loop().time() - START == pytest.approx(7.0, abs=0.1)
        admission.answered({})
        admission.settle(Usage(1, 1))
    await other.task
    assert other.entered[0] >= 7.0
    await house.is_empty()


@in_virtual_time
async def test_an_answer_that_tells_of_room_lets_in_whoever_waits_for_it():
    """The cold start: eight go, and the ninth goes when the first of them is answered, not at some later look."""
    house = House(rates=Learner(now=START))
    places = [
        house.limits.admit((house.to,), Size(), priority=Priority.DEFAULT, caller="", deadline=math.inf, notes=Notes())
        for _ in range(8)
    ]
    inside = [await place.__aenter__() for place in places]
    ninth = house.visit(stay=1.0)
    await asyncio.sleep(3.0)
    assert ninth.state == "asking"
    inside[0].answered({})
    await everybody_waits()
    assert ninth.entered == [3.0]
    for place in places:
        await place.__aexit__(None, None, None)
    await house.is_empty()


@in_virtual_time
async def test_what_a_call_really_used_counts_for_its_callers_turn():
    house = House(places=1)
    house.visit(stay=5.0, caller="a", used=Usage(1000, 0))
    first, second = house.visit(stay=1.0, caller="a"), house.visit(stay=1.0, caller="b")
    await asyncio.gather(first.task, second.task)
    assert (first.entered, second.entered) == ([6.0], [5.0])
    await house.is_empty()


@in_virtual_time
async def test_in_overload_the_oldest_waiters_are_sent_away():
    house = House(places=1, overload=[Priority.INTERACTIVE])
    house.visit()
    old = house.visit(priority=Priority.INTERACTIVE)
    await asyncio.sleep(1.5)
    new = house.visit(priority=Priority.INTERACTIVE, stay=1.0)
    await old.task
    assert isinstance(old.error, QueueTimeout)
    assert "overloaded" in str(old.error)
    assert old.left_at == pytest.approx(2.0)
    house.visitors[0].leave()
    await new.task
    assert new.entered == [2.0]
    await house.is_empty()


# ── asking again ──


@in_virtual_time
async def test_while_it_pauses_a_call_keeps_its_place_in_the_process_and_gives_the_targets_back():
    house = House(places=2, pool=1)
    paused = house.visit(again=[5.0], stay=1.0)
    other = house.visit(stay=1.0)
    await asyncio.sleep(2.0)
    third = house.visit(stay=0.5)
    await asyncio.sleep(1.0)
    assert other.entered == [0.0]
    assert third.entered == [2.0]
    assert paused.state == "pausing"
    assert (house.gate.process.in_use, house.pool.in_use) == (1, 0)
    await paused.task
    assert paused.entered == [0.0, 5.0]
    assert paused.notes.admissions == [("immediate", "")]
    assert paused.notes.waits == [("backoff", "", "", 5.0, "computed", "server")]
    await house.is_empty()


@in_virtual_time
async def test_what_a_pause_gives_back_goes_to_the_next_one_at_once():
    house = House(pool=1)
    house.visit(stay=1.0)
    paused, behind = house.visit(again=[5.0], stay=1.0), house.visit(stay=1.0)
    await asyncio.gather(paused.task, behind.task)
    assert (paused.entered, behind.entered) == ([1.0, 6.0], [1.0])
    await house.is_empty()


@in_virtual_time
async def test_a_call_that_asks_again_is_let_in_by_time_too():
    house = House(rates=rates(requests_per_minute=6))
    visitor = house.visit(again=[1.0], stay=1.0)
    await visitor.task
    assert visitor.entered == pytest.approx([0.0, 10.0], abs=1e-3)
    await house.is_empty()


@in_virtual_time
async def test_after_its_pause_a_call_waits_for_room_at_the_head_of_the_queue():
    house = House(places=4, pool=1)
    paused = house.visit(again=[1.0], stay=1.0)
    inside = house.visit(stay=3.0)
    behind = house.visit(stay=1.0)
    await asyncio.gather(paused.task, inside.task, behind.task)
    assert (paused.entered, behind.entered) == ([0.0, 3.0], [4.0])
    assert paused.notes.waits[1] == ("backoff", "pool", "admitted", pytest.approx(2.0), "limit", "server")
    await house.is_empty()


@in_virtual_time
async def test_a_call_that_asks_again_is_late_at_its_deadline_and_holds_nothing_then():
    house = House(places=4, pool=1)
    paused = house.visit(again=[1.0], patience=2.5)
    house.visit(stay=10.0)
    await paused.task
    assert isinstance(paused.error, QueueTimeout)
    assert paused.left_at == pytest.approx(2.5)
    assert paused.notes.waits[-1][:3] == ("backoff", "pool", "timeout")
    await house.is_empty()


# ── clients that leave ──


async def _queued(house):
    house.visit(stay=10.0)
    return house.visit(), "asking"


async def _inside(house):
    return house.visit(), "inside"


async def _pausing(house):
    return house.visit(again=[100.0]), "pausing"


async def _asking_again(house):
    visitor = house.visit(again=[1.0])
    house.visit(stay=10.0)
    await asyncio.sleep(2.0)
    return visitor, "pausing"


async def _let_in_this_instant(house):
    """The gate has let it in; it is cancelled before it learns of it."""
    first = house.visit()
    visitor = house.visit()
    await everybody_waits()
    first.leave()
    await the_gate_lets_in(house)
    return visitor, "asking"


async def _let_in_again_this_instant(house):
    visitor = house.visit(again=[1.0])
    other = house.visit()
    await asyncio.sleep(2.0)
    other.leave()
    await the_gate_lets_in(house)
    return visitor, "pausing"


@pytest.mark.parametrize(
    "until", [_queued, _inside, _pausing, _asking_again, _let_in_this_instant, _let_in_again_this_instant]
)
@in_virtual_time
async def test_a_client_that_leaves_is_gone_at_once_and_frees_all_it_held(until):
    house = House(places=3, pool=1, rates=rates(requests_per_minute=6000, tokens_per_minute=60_000))
    visitor, state = await until(house)
    if until not in (_let_in_this_instant, _let_in_again_this_instant):
        await everybody_waits()
    assert visitor.state == state
    at = loop().time()
    visitor.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await visitor.task
    assert loop().time() == at
    for other in house.visitors:
        other.leave()
    await house.is_empty()
    if state == "asking":
        assert [result for result, _ in visitor.notes.admissions] == ["cancelled"]
        assert visitor.notes.waits[0][2] == "cancelled"


@in_virtual_time
async def test_the_place_of_a_client_that_leaves_goes_to_the_next_one():
    house = House(pool=1)
    first, second = house.visit(), house.visit(stay=1.0)
    await asyncio.sleep(1.0)
    first.task.cancel()
    await second.task
    assert second.entered == [1.0]
    await house.is_empty()


# ── stopping and changing ──


@in_virtual_time
async def test_closing_refuses_who_waits_and_who_comes_and_lets_those_inside_finish():
    house = House(pool=1)
    inside, waiting = house.visit(stay=5.0), house.visit()
    await everybody_waits()
    house.limits.close()
    newcomer = house.visit()
    await asyncio.gather(inside.task, waiting.task, newcomer.task)
    assert inside.left_at == pytest.approx(5.0)
    assert isinstance(waiting.error, Draining)
    assert isinstance(newcomer.error, Draining)
    assert waiting.notes.admissions == [("shutdown", "pool")]
    assert newcomer.notes.admissions == [("shutdown", "process")]
    await house.is_empty()


@in_virtual_time
async def test_after_closing_nobody_begins_to_wait_who_asks_again():
    """No timer would let it in any more."""
    house = House(pool=1, rates=rates(requests_per_minute=6))
    paused = house.visit(again=[1.0])
    await everybody_waits()
    house.limits.close()
    await paused.task
    assert isinstance(paused.error, Draining)
    assert paused.left_at == pytest.approx(1.0)
    await house.is_empty()


@in_virtual_time
async def test_whoever_was_let_in_just_before_the_close_stays_in():
    house = House(pool=1)
    first, second = house.visit(), house.visit(stay=1.0)
    await everybody_waits()
    first.leave()
    await the_gate_lets_in(house)
    house.limits.close()
    await second.task
    assert second.error is None
    await house.is_empty()


@in_virtual_time
async def test_a_new_configuration_lets_in_as_many_as_it_allows_and_drops_nobody():
    house = House(places=1)
    visitors = [house.visit() for _ in range(5)]
    await everybody_waits()
    house.limits.configure(3, 100, {}, frozenset())
    await everybody_waits()
    assert [visitor.state for visitor in visitors] == ["inside"] * 3 + ["asking"] * 2
    house.limits.configure(1, 0, {}, frozenset())
    await everybody_waits()
    assert [visitor.state for visitor in visitors] == ["inside"] * 3 + ["asking"] * 2
    for visitor in visitors:
        visitor.leave()
    await asyncio.gather(*(visitor.task for visitor in visitors))
    assert house.visit().house.limits.process.concurrency == 1
    house.visitors[-1].leave()
    await house.is_empty()


# ── all of it at once ──

times = st.sampled_from([0.0, 0.25, 1.0, 2.0, 3.0, 4.0])
visits = st.tuples(
    times,  # comes after the one before
    st.sampled_from([0.5, 2.0, 3.0, 100.0]),  # patience
    times,  # stay
    st.none() | times,  # is cancelled so long after it came
    st.lists(times, max_size=2),  # pauses
    st.sampled_from(Priority),
)


@given(
    st.lists(visits, max_size=12),
    st.integers(1, 3),
    st.sampled_from([None, 1, 2]),
    st.sampled_from([None, 30, 120]),
    st.integers(0, 4),
    st.none() | times,
)
@settings(max_examples=80, deadline=None)
def test_whatever_happens_nobody_is_left_behind(calls, places, pool, per_minute, queue_limit, closes):
    async def story():
        learner = None if per_minute is None else rates(requests_per_minute=per_minute)
        house = House(places=places, pool=pool, queue_limit=queue_limit, rates=learner, overload=[Priority.INTERACTIVE])
        if closes is not None:
            loop().call_later(closes, house.limits.close)
        for gap, patience, stay, cancelled, again, priority in calls:
            await asyncio.sleep(gap)
            visitor = house.visit(patience=patience, stay=stay, again=again, priority=priority)
            visitor.came, visitor.patience = loop().time() - START, patience
            if cancelled is not None:
                loop().call_later(cancelled, visitor.task.cancel)
            assert house.gate.process.in_use <= places
        await asyncio.sleep(5.0)
        await house.is_empty()
        for visitor in house.visitors:
            assert visitor.state == "gone" or visitor.task.cancelled()
            assert len(visitor.notes.admissions) <= 1
            deadline = visitor.came + visitor.patience + 1e-4
            if visitor.entered:
                assert visitor.notes.admissions[0][0] in ("immediate", "queued")
                assert visitor.entered[0] <= deadline
            if isinstance(visitor.error, QueueTimeout):
                assert visitor.left_at <= deadline + sum(visitor.again)

    run(story())


def test_a_ticket_has_no_other_states_than_those_tried_here():
    assert {state.value for state in State} == {"waiting", "held", "paused", "refused", "ended"}
