"""How callers without a gateway send; what the provider makes of each of them stands beside Penstock's row."""

from __future__ import annotations

from collections import deque

from benchmarks.limits.world import Job, World
from proxy.simulator.provider import Admitted, Refused


class FixedConcurrency:
    """So many calls in flight, always; who is refused tries again at once."""

    def __init__(self, world: World, places: int) -> None:
        self.world, self.places = world, float(places)
        self.in_flight = 0
        self.queue: deque[Job] = deque()

    @property
    def waiting(self) -> int:
        return len(self.queue)

    def ask(self, job: Job) -> None:
        self.queue.append(job)
        self._fill()

    def _fill(self) -> None:
        while self.queue and self.in_flight < self.places:
            self.in_flight += 1
            self._send(self.queue.popleft())

    def _send(self, job: Job) -> None:
        sent = self.world.now

        def refused(answer: Refused) -> None:
            self.in_flight -= 1
            self.queue.appendleft(job)
            self.was_refused(sent)
            self._fill()

        def ended(answer: Admitted) -> None:
            self.in_flight -= 1
            self.was_served()
            self._fill()

        self.world.send(job, answered=lambda answer: None, refused=refused, ended=ended)

    def was_refused(self, sent: float) -> None: ...

    def was_served(self) -> None: ...


class Aimd(FixedConcurrency):
    """Concurrency that grows by one per round and is halved by a refusal; calls sent before the last cut count for
    nothing."""

    def __init__(self, world: World) -> None:
        super().__init__(world, 8)
        self.cut_at = -1.0

    def was_refused(self, sent: float) -> None:
        if sent > self.cut_at:
            self.places, self.cut_at = max(1.0, self.places / 2), self.world.now

    def was_served(self) -> None:
        self.places += 1.0 / self.places


class UserCode:
    """What users write: a semaphore of 20, and on a refusal 3 retries after 1, 2 and 4 s, give or take 10 %, with the
    place in hand. After that the call has failed."""

    PLACES = 20
    RETRIES = 3

    def __init__(self, world: World) -> None:
        self.world = world
        self.free = self.PLACES
        self.failed = 0
        self.queue: deque[Job] = deque()

    @property
    def waiting(self) -> int:
        return len(self.queue)

    def ask(self, job: Job) -> None:
        self.queue.append(job)
        self._fill()

    def _fill(self) -> None:
        while self.queue and self.free:
            self.free -= 1
            self._send(self.queue.popleft())

    def _send(self, job: Job) -> None:
        def refused(answer: Refused) -> None:
            if job.failures == self.RETRIES:
                self.failed += 1
                self._leave()
                return
            pause = 2.0**job.failures * self.world.random.uniform(0.9, 1.1)
            job.failures += 1
            self.world.at(self.world.now + pause, lambda: self._send(job))

        self.world.send(job, answered=lambda answer: None, refused=refused, ended=lambda answer: self._leave())

    def _leave(self) -> None:
        self.free += 1
        self._fill()
