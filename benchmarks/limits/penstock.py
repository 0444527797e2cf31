"""Penstock's own objects in virtual time: the gate and the learner, told what the relay would tell them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import msgspec

from benchmarks.limits.world import Job, World
from proxy.core import headers, outcome
from proxy.core.gate import Gate, Priority, State, Ticket
from proxy.core.learner import Learner, Reservation, Size
from proxy.core.outcome import Outcome
from proxy.core.pool import Pool
from proxy.core.usage import Usage
from proxy.simulator.provider import EPOCH, Admitted, Refused

TICK = 1e-4  # seconds; no timer of an event loop is finer


class Target:
    def __init__(self, account: Pool) -> None:
        self.account = account
        self.pools: Sequence[Pool] = (account,)


class Penstock:
    """Sends jobs through the gate.

    Args:
        done: is told of each job that has ended.
        estimate: what the gateway takes the input of a call for, in tokens; characters / 4 unless told.
    """

    def __init__(
        self,
        world: World,
        done: Callable[[Job], None] = lambda job: None,
        *,
        estimate: Callable[[Job], float] = lambda job: job.size.characters / 4,
    ) -> None:
        self.world, self.done, self.estimate = world, done, estimate
        self.learner = Learner()
        self.targets = (Target(Pool("account", "account", rates=self.learner)),)
        self.gate = Gate(Pool("process", "process", concurrency=1_000_000), queue_limit=1_000_000)
        self._jobs: dict[Ticket, Job] = {}
        self._timer_at = math.inf

    def __repr__(self) -> str:
        return "penstock"

    @property
    def waiting(self) -> int:
        return self.gate.waiting

    def ask(self, job: Job) -> None:
        size = Size(input_tokens=self.estimate(job), max_tokens=job.size.max_tokens)
        ticket = self.gate.ask(self.world.now, self.targets, size, priority=Priority.DEFAULT, caller=job.caller)
        self._jobs[ticket] = job
        if ticket.state is State.HELD and ticket not in self.gate.woken:
            self._send(ticket)
        self._wake()

    def _wake(self) -> None:
        while self.gate.woken:
            woken, self.gate.woken = self.gate.woken, []
            for ticket in woken:
                self._send(ticket)
        if self.gate.wake_at < self._timer_at:
            self._timer_at = max(self.gate.wake_at, self.world.now + TICK)
            self.world.at(self._timer_at, self._advance)

    def _advance(self) -> None:
        if self.world.now < self._timer_at:
            return  # a timer that was overtaken by an earlier one
        self._timer_at = math.inf
        self.gate.advance(self.world.now)
        self._wake()

    def _send(self, ticket: Ticket) -> None:
        job, world, learner = self._jobs[ticket], self.world, self.learner
        ((_, reservation),) = ticket.reservations
        ticket.reservations.clear()

        def answered(answer: Admitted) -> None:
            if learner.answered(reservation, headers.readings(answer.headers, EPOCH + world.now), world.now):
                self.gate.advance(world.now)
                self._wake()

        def refused(answer: Refused) -> None:
            self._refused(ticket, reservation, answer)

        def ended(answer: Admitted) -> None:
            learner.settle(reservation, Usage(answer.input_tokens, answer.output_tokens), world.now)
            self.gate.served(ticket, answer.input_tokens, answer.output_tokens)
            del self._jobs[ticket]
            self.gate.end(ticket, world.now)
            self._wake()
            self.done(job)

        world.send(job, answered=answered, refused=refused, ended=ended)

    def _refused(self, ticket: Ticket, reservation: Reservation, answer: Refused) -> None:
        """As `Relay._refusal` has it: a paced refusal asks again, and the learner keeps the hold."""
        now = self.world.now
        body = msgspec.json.encode(answer.body)
        code, kind, message = headers.error_of_body(body)
        meaning = outcome.of_answer(answer.status, code=code, kind=kind, message=message)
        retry_after = headers.retry_after(answer.headers, EPOCH + now)
        if retry_after is None:
            retry_after = headers.retry_after_of_body(body)
        assert meaning.outcome is Outcome.THROTTLED, meaning
        self.learner.refused(reservation, meaning, headers.readings(answer.headers, EPOCH + now), retry_after, now)
        self.learner.settle(reservation, None, now)
        self.gate.pause(ticket, now)
        self.gate.again(ticket, self.targets, now)
        self._wake()
