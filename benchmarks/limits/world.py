"""Virtual time: a heap of events, a network with a delay, and the simulated provider at its far end."""

from __future__ import annotations

import gc
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random
from typing import Protocol

from proxy.simulator.profile import Profile
from proxy.simulator.provider import Admitted, Provider, Refused, Size

WAY = (0.010, 0.030)  # seconds from us to the provider, and back again; uniform, so that calls overtake each other


@dataclass(slots=True, eq=False)
class Job:
    """One call that somebody wants answered."""

    size: Size
    asked: float
    caller: str = ""
    stream: bool = True  # its headers come with the first token, not with the last
    begun: float | None = None  # when it was first sent
    ended: float | None = None
    failures: int = 0

    @property
    def waited(self) -> float:
        assert self.begun is not None
        return self.begun - self.asked


@dataclass(slots=True)
class Tally:
    """What happened on the wire. Times are those at the provider, but for `sent_at`."""

    sent_at: list[float] = field(default_factory=list)
    refused_at: list[float] = field(default_factory=list)
    admitted: list[tuple[float, float]] = field(default_factory=list)  # (time, tokens charged)

    @property
    def refused_share(self) -> float:
        return len(self.refused_at) / max(1, len(self.sent_at))


class Client(Protocol):
    """Whoever sends jobs to the provider, by its own rules."""

    @property
    def waiting(self) -> int:
        """Jobs that were asked for and have not been sent."""
        ...

    def ask(self, job: Job) -> None: ...


class World:
    """Time, the network and the provider. `now` is virtual seconds; the provider is `phase` seconds older."""

    def __init__(self, profile: Profile, seed: int, *, phase: float = 0.0) -> None:
        self.now = 0.0
        self.random = Random(f"world {seed}")
        self.provider = Provider(profile, seed, started=-phase)
        self.tally = Tally()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()

    def at(self, time: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), do))

    def run(self, until: float, *, sent_at_most: int = 1 << 60) -> None:
        """Live until then, or until so many attempts were made."""
        events, sent = self._events, self.tally.sent_at
        gc.freeze()
        gc.disable()  # the heap of events is one large live object
        while events and events[0][0] <= until and len(sent) < sent_at_most:
            self.now, _, do = heapq.heappop(events)
            do()
        gc.enable()
        gc.unfreeze()
        if len(sent) < sent_at_most:
            self.now = until

    def send(
        self,
        job: Job,
        *,
        answered: Callable[[Admitted], None],
        refused: Callable[[Refused], None],
        ended: Callable[[Admitted], None],
    ) -> None:
        """One attempt: either `refused`, or `answered` when its headers are back and `ended` with its last byte."""
        least, most = WAY
        tally, uniform = self.tally, self.random.uniform
        tally.sent_at.append(self.now)
        if job.begun is None:
            job.begun = self.now
        back = uniform(least, most)

        def arrive() -> None:
            answer = self.provider.arrive(self.now, job.size)
            if isinstance(answer, Refused):
                tally.refused_at.append(self.now)
                self.at(self.now + back, lambda: refused(answer))
                return
            tally.admitted.append((self.now, answer.charged))
            last = self.now + answer.seconds
            if job.stream:
                self.at(self.now + answer.first_token + back, lambda: answered(answer))
                self.at(last + back, lambda: end(answer))
            else:
                self.at(last + back, lambda: whole(answer))

        def whole(answer: Admitted) -> None:
            answered(answer)
            end(answer)

        def end(answer: Admitted) -> None:
            self.provider.leave(answer, self.now)
            job.ended = self.now
            ended(answer)

        self.at(self.now + uniform(least, most), arrive)
