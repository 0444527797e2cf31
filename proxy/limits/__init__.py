"""Places and rates behind one small interface.

The relay asks for admission and holds it for the length of a `with` block; it does not know whether one process decides
(`local`) or several share their limits through a store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

from proxy.core.gate import Level, Priority, Target
from proxy.core.learner import Size
from proxy.core.outcome import Meaning
from proxy.core.usage import Usage

Now = Callable[[], float]
AnyTarget = TypeVar("AnyTarget", bound=Target)


class Notes(Protocol):
    """Where an admission writes down what it did; the call's record does."""

    def waited(
        self,
        kind: str,
        started: float,
        ended: float,
        *,
        gate: str = "",
        result: str = "",
        source: str = "",
        reason: str = "",
        stood: Level | None = None,
    ) -> None:
        """A stretch of waiting is over.

        Args:
            kind: "queue", or "backoff" if an attempt had failed before.
            gate: name of the pool that was waited for.
            result: admitted, timeout or cancelled.
            source: of a backoff: retry_after, computed, or limit where the pool's hold paced it.
            reason: of a backoff: why the attempt before it failed.
            stood: the gate as it was when the wait began.
        """

    def limit_changed(self, at: float, gate: str, limit: str, before: float | None, after: float, cause: str) -> None:
        """What this call was told moved a limit.

        Args:
            gate: label of the pool.
            limit: what is limited: requests, tokens, concurrency, ...
            before, after: per minute, or places; None: it was not known.
            cause: header, upstream_429, upstream_5xx or latency.
        """

    def admission(self, result: str, gate: str) -> None:
        """How the door decided: immediate, queued, rejected_full, rejected_timeout, cancelled."""


class Admission(Protocol[AnyTarget]):
    """A place in the process, and room at `target`; held until the `with` block ends."""

    @property
    def target(self) -> AnyTarget: ...

    def answered(self, headers: Mapping[str, str]) -> None:
        """The target answered: its headers may tell its limits."""

    def refused(self, meaning: Meaning, headers: Mapping[str, str], retry_after: float | None) -> None:
        """The target refused because of a limit: hold it for everybody."""

    def failed(self, *, is_full: bool = False) -> None:
        """The target gave no answer that tells anything about its rates; `is_full`: it said that it has no capacity."""

    def sped(self, first_token_seconds: float) -> None:
        """The target's first token came so long after the call was sent."""

    def settle(self, usage: Usage | None) -> None:
        """The attempt at `target` is over; `usage` is what it really took, None if nobody knows."""

    async def again(self, targets: tuple[AnyTarget, ...], *, after: float, reason: str, source: str) -> None:
        """Give `target` back, pause for `after` seconds, then wait for room at one of `targets`.

        Raises:
            QueueTimeout: the deadline came first. Nothing of a target is held then.
        """


class Limits(Protocol):
    """What a call may have to wait for."""

    def admit(
        self,
        targets: tuple[AnyTarget, ...],
        size: Size,
        *,
        priority: Priority,
        caller: str,
        deadline: float,
        notes: Notes,
    ) -> AbstractAsyncContextManager[Admission[AnyTarget]]:
        """Wait for room at one of `targets`, best first, and hold it for the length of the block.

        Args:
            deadline: on the gateway's monotonic clock.

        Raises:
            QueueFull: too many wait already.
            QueueTimeout: no room before the deadline.
        """
        ...
