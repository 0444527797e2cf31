"""Lateness: one timer for a whole attempt instead of one for every read.

What is waited for is said by `expect`, which only notes two numbers; the timer looks at them when it fires and is set
anew if the wait it was set for is over. So a stream of ten thousand chunks costs one timer, not ten thousand.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Generic, TypeVar

What = TypeVar("What")


class Late(Exception, Generic[What]):
    """The block waited too long. `what` is what it was waiting for."""

    def __init__(self, what: What) -> None:
        super().__init__(what)
        self.what = what


class Watch(Generic[What]):
    """Cancels the body of an `async with` block when one of its waits lasts too long, and raises `Late` instead."""

    __slots__ = ("_due", "_loop", "_scope", "_timer", "_until", "_what")

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._scope = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # when it fires; uvloop's handle does not say so of a time that is as good as now
        self._until: float | None = None
        self._what: What | None = None

    def expect(self, what: What, seconds: float) -> None:
        """From now on wait for `what`, at most `seconds`."""
        if not self._in_time():
            return
        self._what, self._until = what, self._loop.time() + seconds
        if self._timer is None or self._due > self._until:
            self._set(self._until)

    def rest(self) -> None:
        """From now on nothing is waited for."""
        if self._in_time():
            self._until = None

    def _in_time(self) -> bool:
        """False once the block is being cancelled: what it does then is not watched. Who gets here before, even in the
        round of the loop in which the timer fired, is in time."""
        if self._scope.expired():
            return False
        if self._scope.when() is not None:
            self._scope.reschedule(None)
        return True

    def _set(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._due = self._loop.call_at(when, self._look), when

    def _look(self) -> None:
        self._timer = None
        if self._until is None:
            return
        if self._until <= self._loop.time():
            self._scope.reschedule(self._until)
        else:
            self._set(self._until)

    async def __aenter__(self) -> Watch[What]:
        await self._scope.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._until = None
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError:
            assert self._what is not None
            raise Late(self._what) from error
