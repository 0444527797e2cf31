"""An event loop whose clock moves only when everybody waits for it: an hour takes no time, and a test takes the same
course each time it runs.

`now` is virtual seconds; `timers` are all that were ever set. `at_iteration` is called in each round of the loop with
its number, so that a test can cut in wherever tasks change over.
"""

from __future__ import annotations

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVarTuple

START = 1000.0  # not 0, so that a time is never mistaken for a stretch of it
Arguments = TypeVarTuple("Arguments")


class Stuck(Exception):
    """Everybody waits, and for nothing that time could bring."""


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.now = START
        self.iterations = 0
        self.at_iteration: Callable[[int], None] = lambda _: None
        self.timers: list[asyncio.TimerHandle] = []
        self.troubles: list[dict[str, Any]] = []  # what callbacks raised, and what nobody retrieved
        super().__init__(_Selector(self))
        self.set_exception_handler(lambda _, trouble: self.troubles.append(trouble))

    def time(self) -> float:
        return self.now

    def call_at(
        self,
        when: float,
        callback: Callable[[*Arguments], object],
        *args: *Arguments,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        self.timers.append(super().call_at(when, callback, *args, context=context))
        return self.timers[-1]

    @property
    def pending(self) -> list[asyncio.TimerHandle]:
        """The timers that will fire yet."""
        return [timer for timer in self.timers if timer.when() > self.now and not timer.cancelled()]


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        loop = self._loop
        loop.iterations += 1
        loop.at_iteration(loop.iterations)
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise Stuck
            loop.now += timeout
        return ready


def loop() -> VirtualLoop:
    """The one that runs."""
    running = asyncio.get_running_loop()
    assert isinstance(running, VirtualLoop)
    return running


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run `work` to its end on a loop of its own, on which nothing may go wrong unseen."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        result = runner.run(work)
        running = runner.get_loop()
        assert isinstance(running, VirtualLoop)
        assert not running.troubles
        return result


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine function, run on a loop of its own."""

    @functools.wraps(test)
    def runs(*args: Any, **kwargs: Any) -> None:
        run(test(*args, **kwargs))

    return runs


async def everybody_waits() -> None:
    """Return when all other tasks wait: time moves only then, and this is the least time there is."""
    await asyncio.sleep(1e-6)
