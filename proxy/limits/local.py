"""Limits of one process: the pure gate, futures to wake those who wait, and one timer for rates and holds."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Generic, cast

from proxy.core import backoff, headers
from proxy.core.gate import Gate, Level, Priority, Refusal, State, Ticket
from proxy.core.learner import Learner, Reservation, Size
from proxy.core.outcome import Meaning
from proxy.core.pool import Pool
from proxy.core.usage import Usage
from proxy.errors import Draining, GatewayError, QueueFull, QueueTimeout
from proxy.limits import AnyTarget, Notes, Now

COME_BACK_SECONDS = (1.0, 60.0)  # SDKs ignore a retry-after above 60 s, or sleep whatever it says


class LocalLimits:
    """
    Args:
        gate: who may start; told of time by `now`, the monotonic clock, in seconds.
        wall: the wall clock, for dates in headers.
        draw: random numbers in [0, 1), to spread those who are told to come back.
    """

    def __init__(
        self, gate: Gate, now: Now, wall: Callable[[], float], draw: Callable[[], float] = random.random
    ) -> None:
        self._gate, self._now, self._wall, self._draw = gate, now, wall, draw
        self._sleepers: dict[Ticket, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._closed = False

    def admit(
        self,
        targets: tuple[AnyTarget, ...],
        size: Size,
        *,
        priority: Priority,
        caller: str,
        deadline: float,
        notes: Notes,
    ) -> LocalAdmission[AnyTarget]:
        return LocalAdmission(self, targets, size, priority, caller, deadline, notes)

    def levels(self, pools: Iterable[Pool]) -> Iterable[Level]:
        return self._gate.levels(pools, self._now())

    @property
    def waiting(self) -> int:
        return self._gate.waiting

    @property
    def process(self) -> Pool:
        return self._gate.process

    def configure(
        self,
        concurrency: int | None,
        queue_limit: int,
        weights: Mapping[str, float],
        overload: frozenset[Priority],
    ) -> None:
        """Take the bounds and ways of a plan; nobody inside or waiting is dropped."""
        gate = self._gate
        gate.process.resize(concurrency, self._now())
        gate.queue_limit = queue_limit
        gate.weights, gate.overload = weights, overload
        gate.advance(self._now())
        self._wake()

    def close(self) -> None:
        """Refuse everybody who waits, and all who come from now on; those inside finish."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for sleeper in self._sleepers.values():
            if not sleeper.done():
                sleeper.set_exception(_draining())

    def _changed(self) -> None:
        """A pool may have more room than before: see who fits."""
        if self._gate.waiting:
            self._gate.advance(self._now())
            self._wake()

    def _wake(self) -> None:
        """After any change of the gate: wake whom it let in, and be there when time lets in the next."""
        woken, self._gate.woken = self._gate.woken, []
        for ticket in woken:
            if (sleeper := self._sleepers.get(ticket)) is not None and not sleeper.done():
                sleeper.set_result(None)
        wake_at = self._gate.wake_at
        if wake_at == self._timer_at:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_at = wake_at
        if wake_at < math.inf and not self._closed:
            self._timer = asyncio.get_running_loop().call_later(max(0.0, wake_at - self._now()), self._advance)

    def _advance(self) -> None:
        self._timer, self._timer_at = None, math.inf
        self._gate.advance(self._now())
        self._wake()

    def _come_back(self, expected_wait: float) -> float:
        """Seconds after which to tell a client to come back, spread so that they do not come together."""
        least, most = COME_BACK_SECONDS
        return backoff.spread(min(most / 1.2, max(least, expected_wait)), self._draw())


class LocalAdmission(Generic[AnyTarget]):
    """One call's place; see `proxy.limits.Admission`."""

    __slots__ = ("_caller", "_deadline", "_limits", "_notes", "_priority", "_sent", "_size", "_targets", "_ticket")

    def __init__(
        self,
        limits: LocalLimits,
        targets: tuple[AnyTarget, ...],
        size: Size,
        priority: Priority,
        caller: str,
        deadline: float,
        notes: Notes,
    ) -> None:
        self._limits, self._targets, self._size = limits, targets, size
        self._priority, self._caller, self._deadline, self._notes = priority, caller, deadline, notes
        self._ticket: Ticket | None = None
        self._sent = 0.0  # when it was last let in

    async def __aenter__(self) -> LocalAdmission[AnyTarget]:
        limits, notes = self._limits, self._notes
        if limits._closed:
            notes.admission("shutdown", limits._gate.process.label)
            raise _draining()
        ticket = limits._gate.ask(
            limits._now(),
            self._targets,
            self._size,
            priority=self._priority,
            caller=self._caller,
            deadline=self._deadline,
        )
        self._ticket, self._sent = ticket, ticket.since
        limits._wake()
        if ticket.state is State.HELD:
            notes.admission("immediate", "")
            return self
        if ticket.state is State.REFUSED:
            error = self._turned_away(ticket)
            notes.admission(_refusal(error), ticket.waited_for)
            raise error
        try:
            await self._sleep(ticket, "queue")
        except BaseException as error:
            self._end()
            notes.admission(_refusal(error), ticket.waited_for)
            raise
        notes.admission("queued", ticket.waited_for)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    @property
    def target(self) -> AnyTarget:
        assert self._ticket is not None
        return cast(AnyTarget, self._ticket.target)  # one of those asked for; the gate does not care what they are

    def answered(self, said: Mapping[str, str]) -> None:
        limits = self._limits
        if (told := self._account()) is not None:
            learner, reservation = told
            more = learner.answered(reservation, headers.readings(said, limits._wall()), limits._now())
            self._tell(learner)
            if more:
                limits._changed()

    def refused(self, meaning: Meaning, said: Mapping[str, str], retry_after: float | None) -> None:
        limits = self._limits
        if (told := self._account()) is not None:
            learner, reservation = told
            readings = headers.readings(said, limits._wall())
            learner.refused(reservation, meaning, readings, retry_after, limits._now())
            self._tell(learner)

    def failed(self, *, is_full: bool = False) -> None:
        now = self._limits._now()
        if (told := self._account()) is not None:
            learner, reservation = told
            if learner.failed(reservation, now):
                self._limits._changed()
        if is_full:
            for pool in self.target.pools:
                if (moved := pool.dropped(self._sent, now)) is not None:
                    self._notes.limit_changed(now, pool.label, "concurrency", *moved, "upstream_5xx")

    def sped(self, first_token_seconds: float) -> None:
        now = self._limits._now()
        for pool in self.target.pools:
            if (moved := pool.sped(first_token_seconds, self._size, now)) is not None:
                self._notes.limit_changed(now, pool.label, "concurrency", *moved, "latency")
        self._limits._changed()

    def settle(self, usage: Usage | None) -> None:
        limits, ticket, more = self._limits, self._ticket, False
        assert ticket is not None
        for pool, reservation in ticket.reservations:
            assert pool.rates is not None
            more |= pool.rates.settle(reservation, usage, limits._now())
        ticket.reservations.clear()
        if usage is not None:
            limits._gate.served(ticket, usage.input, usage.output)
        if more:
            limits._changed()

    async def again(self, targets: tuple[AnyTarget, ...], *, after: float, reason: str, source: str) -> None:
        limits, ticket = self._limits, self._ticket
        assert ticket is not None
        limits._gate.pause(ticket, limits._now())
        limits._wake()
        if after > 0.0:
            started = limits._now()
            try:
                await asyncio.sleep(after)
            finally:
                self._notes.waited("backoff", started, limits._now(), source=source, reason=reason)
        limits._gate.again(ticket, targets, limits._now())
        limits._wake()
        if ticket.state is State.WAITING:
            await self._sleep(ticket, "backoff", source="limit", reason=reason)

    async def _sleep(self, ticket: Ticket, kind: str, *, source: str = "", reason: str = "") -> None:
        """Until the gate lets `ticket` in; the gate alone says whether it did, even at the last moment."""
        limits = self._limits
        if limits._closed:
            raise _draining()
        loop = asyncio.get_running_loop()
        started, result, stood = limits._now(), "cancelled", limits._gate.before(ticket, limits._now())
        sleeper = limits._sleepers[ticket] = loop.create_future()
        late = loop.call_later(max(0.0, self._deadline - started), _let_go, sleeper)
        try:
            await sleeper
            result = "admitted" if ticket.state is State.HELD else "timeout"
        finally:
            late.cancel()
            del limits._sleepers[ticket]
            self._sent = limits._now()
            self._notes.waited(
                kind,
                started,
                self._sent,
                gate=ticket.waited_for,
                result=result,
                source=source,
                reason=reason,
                stood=stood,
            )
        if ticket.state is not State.HELD:
            raise self._turned_away(ticket)

    def _turned_away(self, ticket: Ticket) -> GatewayError:
        """The error for a ticket that the gate refused, or that was still waiting at its deadline."""
        limits = self._limits
        gate, seconds = ticket.waited_for, ticket.expected_wait
        again = limits._come_back(seconds)
        if ticket.refusal is Refusal.FULL:
            return QueueFull(f"{limits.waiting} calls wait already for {gate}; come back later", retry_after=again)
        if ticket.refusal is Refusal.OVERLOAD:
            return QueueTimeout(f"{gate} is overloaded; come back later", retry_after=again)
        if ticket.refusal is Refusal.LATE:
            message = f"the wait for {gate} would be {seconds:.0f} s, beyond the deadline; come back later"
            return QueueTimeout(message, retry_after=again)
        return QueueTimeout(
            f"no room at {gate} before the deadline; ask for less at a time, or allow more time", retry_after=again
        )

    def _tell(self, learner: Learner) -> None:
        account = self.target.account
        changes, learner.changes = learner.changes, []
        for change in changes:
            cause = "header" if change.cause == "header" else "upstream_429"
            assert account is not None
            self._notes.limit_changed(
                self._limits._now(), account.label, change.limit, change.before, change.per_minute, cause
            )

    def _account(self) -> tuple[Learner, Reservation] | None:
        """Who learns from this attempt, and what it reserved there."""
        assert self._ticket is not None
        account = self.target.account
        for pool, reservation in self._ticket.reservations:
            if pool is account and pool.rates is not None:
                return pool.rates, reservation
        return None

    def _end(self) -> None:
        limits = self._limits
        assert self._ticket is not None
        if self._ticket.reservations:  # the attempt never settled: nobody knows what it took
            self.settle(None)
        limits._gate.end(self._ticket, limits._now())
        limits._wake()


def _let_go(sleeper: asyncio.Future[None]) -> None:
    if not sleeper.done():
        sleeper.set_result(None)


def _draining() -> Draining:
    return Draining("the gateway is stopping", retry_after=1.0)


def _refusal(error: BaseException) -> str:
    if isinstance(error, QueueFull):
        return "rejected_full"
    if isinstance(error, QueueTimeout):
        return "rejected_timeout"
    return "shutdown" if isinstance(error, GatewayError) else "cancelled"
